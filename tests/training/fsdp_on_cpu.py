"""Runs `instructsam.train` under FSDP2 on a CPU (started by a test), where accelerate itself has FSDP for GPUs only."""

from __future__ import annotations

import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from instructsam.train import main


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend = prepare_backend
PartialState.set_device = set_device

if __name__ == "__main__":
    sys.argv[0] = "instructsam.train"
    main()
