"""What commands of ours import, imported once: `forked` forks from a process that has done this."""

from __future__ import annotations

import importlib.util
import os

import hydra._internal.hydra
import hydra.core.override_parser.overrides_parser  # noqa: F401
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import instructsam.evaluation.session  # noqa: F401
import instructsam.inference.model  # noqa: F401
import instructsam.training.build  # noqa: F401
import instructsam.training.evaluating  # noqa: F401
import instructsam.training.trainer  # noqa: F401

get_checkpoint_conversion_mapping("qwen3_vl")  # made once a process, when the first model is loaded or saved

# Where it is installed, saving a model imports it. It asks GPUs what they can: no fork could use them afterwards.
if torch.cuda.device_count() == 0 and importlib.util.find_spec("deepspeed"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
