"""Frozen parameters in half precision beside float32 master weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instructsam.training.precision import autocast_if_mixed, cast_frozen, check_master_weights


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    layers.register_buffer("frequencies", torch.ones(3))
    layers[0].requires_grad_(False)
    layers[1].requires_grad_(False)
    return layers


def test_only_frozen_floating_point_parameters_are_cast():
    layers = model()
    layers.counter = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert cast_frozen(layers, torch.bfloat16) == 20 + 8
    dtypes = {name: parameter.dtype for name, parameter in layers.named_parameters()}
    assert dtypes["0.weight"] == dtypes["0.bias"] == dtypes["1.weight"] == torch.bfloat16
    assert dtypes["2.weight"] == dtypes["2.bias"] == torch.float32 and dtypes["counter"] == torch.int64
    assert layers.frequencies.dtype == torch.float32
    assert cast_frozen(layers, torch.bfloat16) == 0


def test_weights_published_in_the_dtype_lose_nothing():
    layers = model()
    published = layers[0].weight.data.to(torch.bfloat16)
    layers[0].weight.data = published.float()
    cast_frozen(layers, torch.bfloat16)
    assert torch.equal(layers[0].weight, published)


def test_training_in_half_precision_is_an_error():
    layers = model()
    cast_frozen(layers, torch.bfloat16)
    check_master_weights(layers)
    layers[2].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"2\.weight trains in bfloat16.*model.dtype=float32"):
        check_master_weights(layers)


def test_autocast_for_mixed_models_only():
    layers = model().eval()
    with autocast_if_mixed(layers):
        assert not torch.is_autocast_enabled("cpu")
    cast_frozen(layers, torch.bfloat16)
    with pytest.raises(RuntimeError):
        layers(torch.randn(3, 4))
    with autocast_if_mixed(layers):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        assert layers(torch.randn(3, 4)).isfinite().all()
    with autocast_if_mixed(layers.to(torch.bfloat16)):
        assert not torch.is_autocast_enabled("cpu")
