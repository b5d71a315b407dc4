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
@pytest.mark.parametrize("presence_token", [True, False])
def test_padding_of_phrases_changes_nothing(pair, presence_token):
    """Also in the layers that run where there is no presence token."""
    _, ours = pair
    if not presence_token:
        state = {name: tensor for name, tensor in ours.state_dict().items() if "presence" not in name}
        ours = InstanceDetector(sam3_config(), presence_token=False).eval().double()
        ours.load_state_dict(state, strict=True)
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


@torch.no_grad()
def test_earlier_detections_are_those_of_a_shorter_decoder_in_order(pair, monkeypatch):
    _, ours = pair
    torch.manual_seed(4)
    features = ours.encode_image(torch.randn(1, 3, 112, 112))
    inputs = features, torch.tensor([0]), torch.randn(1, 7, 32), torch.randn(1, 4, 32), None
    earlier, layers = ours(*inputs, with_aux=True).aux, ours.detr_decoder.layers
    assert len(earlier) == len(layers) - 1 > 0
    for number, detections in enumerate(earlier, 1):
        monkeypatch.setitem(ours.detr_decoder._modules, "layers", layers[:number])
        shorter = ours(*inputs)
        for name in ("pred_masks", "pred_logits", "pred_boxes", "presence_logits"):
            assert difference(getattr(detections, name), getattr(shorter, name)) < CLOSE, name


@torch.no_grad()
@pytest.mark.parametrize("sign", [-1, 1])
def test_presence_is_limited_on_both_sides(pair, monkeypatch, sign):
    _, ours = pair
    decoder = ours.detr_decoder
    bias = decoder.presence_head.layer3.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, sign * 1e4))
    features = ours.encode_image(torch.zeros(1, 3, 112, 112))
    found = ours(features, torch.tensor([0]), torch.zeros(1, 7, 32), torch.zeros(1, 4, 32), None)
    assert found.presence_logits.tolist() == [[sign * decoder.clamp_presence_logit_max_val]]


@torch.no_grad()
def test_boxes_are_float32_where_the_weights_are_bfloat16():
    """A box head that says nothing leaves the boxes where they are."""
    decoder = InstanceDetector(sam3_config()).eval().bfloat16().detr_decoder
    for parameter in decoder.box_head.parameters():
        parameter.zero_()
    points = torch.linspace(-2, 2, decoder.reference_points.weight.numel()).view_as(decoder.reference_points.weight)
    decoder.reference_points.weight.copy_(points)
    exact = decoder.reference_points.weight.double().sigmoid()
    size = decoder.config.hidden_size
    queries, text, cells = (torch.zeros(1, count, size, dtype=torch.bfloat16) for count in (len(exact), 3, 16))
    _, boxes, _ = decoder(queries, cells, text, cells, None, (4, 4))
    assert boxes.dtype == torch.float32
    for layer in boxes:
        torch.testing.assert_close(layer[0].double(), exact, rtol=0, atol=1e-5)
