"""Runs a module under DeepSpeed on a CPU (started by a test) without compiling what only inference calls.

    python -m zero_on_cpu MODULE ARGUMENT...

On CPUs DeepSpeed compiles its all-reduce over shared memory when it starts, two minutes of work; training never calls
it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

import torch

if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed decorates what it imports with `torch.compile`
    # Not `import deepspeed.comm.torch`: in that package the name is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
