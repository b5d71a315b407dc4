"""The language model under FlexAttention's block mask gives what it gives under SDPA's dense mask."""

from __future__ import annotations

import pytest
import torch
from golden_fixtures import GOLDEN_ROOT
from golden_model import load_golden

from instructsam.models.modeling import InstructSAMModel


@pytest.mark.slow
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
    hidden = []
    for one in (model, flex):
        one.config.attention_variant = variant
        hidden.append(one.run_language_model(*[tensors[name] for name in names]).hidden_BLC)
    valid = tensors["attention_mask"]
    torch.testing.assert_close(hidden[0][valid], hidden[1][valid], rtol=1e-4, atol=1e-4)
