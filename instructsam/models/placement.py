"""Where a model computes and in which precision: devices and dtypes by name, and the cast of parameters alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import nn


def as_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError where there is no such device on this computer."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is no device; use cpu, cuda, cuda:1 (the second GPU) or mps") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            there = f"only {count} there, counted from cuda:0" if count else "PyTorch finds none"
            raise ValueError(f"device={str(device)!r}: no such NVIDIA GPU ({there}); device=cpu works everywhere")
        return found
    try:
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(
            f"device={str(device)!r} is not there, or computes nothing; device=cpu works everywhere"
        ) from None
    return found


@overload
def as_dtype(value: str | torch.dtype | None, setting: str = ...) -> torch.dtype | None: ...
@overload
def as_dtype(value: str | torch.dtype | None, setting: str, *, auto: Literal[False]) -> torch.dtype: ...
def as_dtype(value: str | torch.dtype | None, setting: str = "dtype", *, auto: bool = True) -> torch.dtype | None:
    """The floating-point type of that name; None for ``auto``, which keeps what is there.

    Args:
        setting: what asks for it, for the message.
        auto: False where a type must be named: ``auto`` and None are refused then.

    Raises:
        ValueError: another name.
    """
    if auto and (value is None or value == "auto"):
        return None
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{setting}={value!r} is not one of {'auto, ' if auto else ''}float32, bfloat16, float16")
    return dtype


def cast_parameters(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> int:
    """Cast the floating-point ones among them in place; returns how many elements changed their type.

    Unlike ``module.to`` it leaves buffers as they are: positions and frequencies are small, and not exact in half
    precision.
    """
    cast = 0
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            cast += parameter.numel()
    return cast
