"""Names of dtypes, and the cast of parameters alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instructsam.models.placement import as_dtype, cast_parameters


def test_dtype_names():
    assert as_dtype("auto") is None and as_dtype(None) is None
    assert as_dtype("bfloat16") is torch.bfloat16 and as_dtype(torch.float16) is torch.float16
    for wrong in ("bf16", "int8", "zeros", "float64"):
        with pytest.raises(ValueError, match=f"dtype='{wrong}' is not one of auto, float32"):
            as_dtype(wrong)


def test_where_a_dtype_must_be_named():
    assert as_dtype("float16", "save_dtype", auto=False) is torch.float16
    for wrong in ("auto", None, "int8"):
        with pytest.raises(ValueError, match=f"save_dtype={wrong!r} is not one of float32, bfloat16, float16"):
            as_dtype(wrong, "save_dtype", auto=False)


def test_buffers_and_whole_numbers_are_not_cast():
    layer = nn.Linear(4, 2)
    layer.register_buffer("positions", torch.ones(3))
    layer.counter = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert cast_parameters(layer.parameters(), torch.bfloat16) == 10
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.requires_grad
    assert layer.positions.dtype == torch.float32 and layer.counter.dtype == torch.int64
    assert cast_parameters(layer.parameters(), torch.bfloat16) == 0
