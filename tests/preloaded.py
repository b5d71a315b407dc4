"""What commands of ours import, imported once: `forked` forks from a process that has done this."""

from __future__ import annotations

import hydra._internal.hydra
import hydra.core.override_parser.overrides_parser  # noqa: F401

import instructsam.evaluation.session  # noqa: F401
import instructsam.inference.model  # noqa: F401
import instructsam.training.build  # noqa: F401
import instructsam.training.evaluating  # noqa: F401
import instructsam.training.trainer  # noqa: F401
