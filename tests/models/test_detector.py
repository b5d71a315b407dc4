"""With SAM 3's own queries, presence token and text features put in, the detector returns what Sam3Model returns."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from double_precision import CLOSE, difference, float64
from transformers.models.sam3.configuration_sam3 import Sam3Config
from transformers.models.sam3.modeling_sam3 import Sam3Model

from instructsam.models.detector import InstanceDetector

META = Path(__file__).parents[1] / "golden" / "a" / "meta.json"


def sam3_config() -> Sam3Config:
    return Sam3Config(**{k: v for k, v in json.loads(META.read_text())["detector_config"].items() if k != "model_type"})


@pytest.fixture(scope="module")
def pair():
    """Transformers' model and ours with the same weights, in float64."""
    with float64():
        torch.manual_seed(0)
        theirs = Sam3Model(sam3_config()).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        ours = InstanceDetector(sam3_config(), presence_token=True).eval()
        state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("text_encoder.")}
        ours.load_state_dict(state, strict=True)
        yield theirs.double(), ours.double()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 5), (3, 5)])
def test_same_as_sam3(pair, lengths):
    theirs, ours = pair
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 112, 112)
    text = torch.randn(2, 5, 32)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    expected = theirs(pixel_values=pixels, text_embeds=SimpleNamespace(pooler_output=text), attention_mask=mask)
    queries = ours.detr_decoder.query_embed.weight.expand(2, -1, -1)
    actual = ours(ours.encode_image(pixels), torch.arange(2), queries, text, mask)
    for name in ("pred_masks", "pred_logits", "pred_boxes", "presence_logits"):
        assert difference(getattr(actual, name), getattr(expected, name)) < CLOSE, name


@torch.no_grad()
def test_phrases_select_their_image(pair):
    _, ours = pair
    torch.manual_seed(2)
    features = ours.encode_image(torch.randn(2, 3, 112, 112))
    queries, text = torch.randn(3, 7, 32), torch.randn(3, 4, 32)
    together = ours(features, torch.tensor([0, 1, 1]), queries, text, None, with_aux=True)
    for p, image in enumerate((0, 1, 1)):
        alone = ours(features, torch.tensor([image]), queries[p : p + 1], text[p : p + 1], None, with_aux=True)
        assert difference(together.pred_masks[p], alone.pred_masks[0]) < CLOSE
        assert difference(together.aux[0].pred_logits[p], alone.aux[0].pred_logits[0]) < CLOSE
    assert len(together.aux) == ours.config.detr_decoder_config.num_layers - 1


@torch.no_grad()
def test_padding_of_phrases_changes_nothing(pair):
    _, ours = pair
    torch.manual_seed(3)
    features = ours.encode_image(torch.randn(1, 3, 112, 112))
    queries, text = torch.randn(1, 7, 32), torch.randn(1, 4, 32)
    short = ours(features, torch.tensor([0]), queries, text, torch.ones(1, 4, dtype=torch.bool))
    padded_text = torch.cat([text, 9 * torch.ones(1, 3, 32)], 1)
    padded = ours(features, torch.tensor([0]), queries, padded_text, torch.arange(7)[None] < 4)
    assert difference(short.pred_masks, padded.pred_masks) < CLOSE
    assert difference(short.pred_logits, padded.pred_logits) < CLOSE


def test_without_presence_token_no_such_tensors():
    names = {name for name, _ in InstanceDetector(sam3_config(), presence_token=False).named_parameters()}
    assert not any("presence" in name for name in names)
    assert "detr_decoder.reference_points.weight" in names
