"""Computing in float64, in which two ways to one result agree.

They do to nine digits and more on every processor. Run as ``python -m double_precision MODULE ARGUMENTS``, it does so
for a whole command.
"""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

CLOSE = 1e-9
"""By this share of the largest magnitude two ways may differ: they do by 1e-12, and an error in float32 by 1e-7."""

FLOAT32, SINGLE = torch.float32, torch.Tensor.float
stored = io.BytesIO()
torch.save(torch.zeros(1), stored)
stored.seek(0)
torch.load(stored)  # makes the tables of dtypes that are kept for ever, before they could be made of a wrong float32


@contextmanager
def float32_is(dtype: torch.dtype) -> Iterator[None]:
    """What ``torch.float32``, ``Tensor.float()`` and new tensors mean."""
    before = torch.get_default_dtype()
    cast = torch.Tensor.double if dtype == torch.double else SINGLE
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in ((torch, "float32", dtype), (torch, "float", dtype), (torch.Tensor, "float", cast)):
            patch.setattr(owner, name, value)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def float64() -> Iterator[None]:
    """Within it, or as a decorator, float32 means float64.

    So casts inside the model, its losses and transformers lose nothing. Models that are loaded within it are cast;
    others are by their ``double()``.
    """
    from instructsam.models.modeling import InstructSAMModel

    load = InstructSAMModel.from_pretrained

    def load_and_cast(*args: Any, **options: Any) -> InstructSAMModel:
        with float32_is(FLOAT32):  # which files are read by
            if options.get("dtype") == torch.double:
                options["dtype"] = FLOAT32
            model = load(*args, **options)
        return model.double() if model.dtype == FLOAT32 else model

    with float32_is(torch.float64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstructSAMModel, "from_pretrained", load_and_cast)
        yield


def doubled(values: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its floating-point tensors in float64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude (at least 1e-6)."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.double
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)) if found.numel() else 0.0


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with float64():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
