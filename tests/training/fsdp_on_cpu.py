"""Runs a module under FSDP2 on a CPU (started by a test), where accelerate itself has FSDP for GPUs only.

python -m fsdp_on_cpu MODULE ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend = prepare_backend
PartialState.set_device = set_device

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
