"""How a process of a distributed run ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """End this process at once, for when everything is written: threads of the process group sometimes abort the
    interpreter while it shuts down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
