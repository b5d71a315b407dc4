"""The language model under FlexAttention's block mask gives what it gives under SDPA's dense mask."""

from __future__ import annotations

import os

import pytest
import torch
from double_precision import difference, doubled, float64
from golden_fixtures import GOLDEN_ROOT
from golden_model import load_golden

from instructsam.models.modeling import InstructSAMModel


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch.compile fails under it")
@pytest.mark.parametrize("variant", ["hybrid", "prefix"])
@torch.no_grad()
def test_flex_equals_sdpa(variant):
    model, _, tensors = load_golden(GOLDEN_ROOT / "a")
    config = type(model.config).from_dict(model.config.to_dict())
    flex = InstructSAMModel._from_config(config, attn_implementation="flex_attention").eval()
    assert flex.vlm.language_model.config._attn_implementation == "flex_attention"
    assert flex.vlm.visual.config._attn_implementation == "sdpa"
    flex.load_state_dict(model.state_dict())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")

    def hidden(one, tensors):
        one.config.attention_variant = variant
        return one.run_language_model(*[tensors[name] for name in names]).hidden_BLC[tensors["attention_mask"]].double()

    found = {"sdpa": hidden(model, tensors), "flex": hidden(flex, tensors)}
    with float64():
        exact = hidden(model.double(), doubled(tensors))
    errors = {name: difference(one, exact) for name, one in found.items()}
    assert errors["flex"] < 10 * errors["sdpa"] < 1e-3, errors  # its kernel for processors has no float64
