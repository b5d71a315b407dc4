"""Several dtypes in one model: frozen parameters in half precision beside float32 ones that train.

Trainable parameters are float32 master weights, computed with in half precision under autocast. Frozen ones need no
master: in the dtype that autocast computes in they take half the memory and save a cast in every step. Weights that are
published in that dtype (the hub's Qwen3-VL is bfloat16) lose nothing; SAM 3's vision encoder, float32 there, is
rounded, as it is in the released checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from instructsam.models.placement import cast_parameters

# trainer.precision → the dtype that autocast computes in
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> int:
    """Cast the floating-point parameters that do not train, in place; returns how many elements that are.

    Call it before the optimizer and DDP see the module. Buffers stay as they are.
    """
    return cast_parameters((parameter for parameter in module.parameters() if not parameter.requires_grad), dtype)


def check_master_weights(module: nn.Module) -> None:
    """ValueError naming a parameter that trains in half precision: small updates would round to nothing there."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            raise ValueError(
                f"{name} trains in {str(parameter.dtype).removeprefix('torch.')}, which is too coarse for its updates: "
                "set model.dtype=float32 (trainer.precision and trainer.frozen_dtype may be half)"
            )


def autocast_if_mixed(module: nn.Module) -> AbstractContextManager[object]:
    """What a model with parameters of several dtypes must run under; nothing for one with a single dtype."""
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    half = {parameter.dtype for parameter in parameters} - {torch.float32}
    if len(half) == 1 and any(parameter.dtype == torch.float32 for parameter in parameters):
        return torch.autocast(parameters[0].device.type, dtype=half.pop())
    return nullcontext()
