"""Batches in which some rows, or all, are conversations about no picture."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from double_precision import CLOSE, difference, float64

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.predictor import Predictor
from instructsam.structures import PhraseTarget, Sample, Turn

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
TALK = Sample("talk", None, 0, 0, (Turn("the red one", answer=("all of them are blue",)),))


@pytest.fixture(scope="module")
def tiny(checkpoint):
    predictor = Predictor.from_pretrained(checkpoint)
    torch.manual_seed(0)
    torch.nn.init.normal_(predictor.model.query_bank.weight, std=0.1)
    with float64():
        yield predictor.model.double(), predictor.processor


def items_of(processor, world, independent: bool = True):
    """Two pictures of different sizes with phrases, and a conversation about none."""
    square, wide = read_coco_instructions(world, "train")[:2]
    phrases = (PhraseTarget("red stars"), PhraseTarget("blue squares"))
    square = dataclasses.replace(square, turns=(Turn("all", phrases), Turn("the stars", phrases[:1])))
    wide = dataclasses.replace(wide, turns=(Turn("a", phrases[:1], answer=("the ", ".")),))
    items = [processor.encode_sample(square, independent), processor.encode_sample(wide, independent)]
    half = {name: value[: len(value) // 2] for name, value in items[1].items() if name == "pixel_values"}
    grid = items[1]["image_grid_thw"].clone()
    grid[1] //= 2
    chat = processor.encode_chat(grid, [("a", ["red stars"], ("the ", "."))], independent)
    items[1] |= {**half, "image_grid_thw": grid, "input_ids": chat.input_ids, "labels": chat.labels}
    items[1] |= {"turn_ids": chat.turn_ids} if independent else {}
    return [*items, processor.encode_sample(TALK, independent)]


def run(model, processor, items):
    batch = processor.collate(items)
    return batch, model(*[batch[name] for name in INPUTS], turn_ids=batch.get("turn_ids"), with_aux=True)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return difference(one, other) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("independent", [False, True])
@torch.no_grad()
def test_every_row_is_as_if_alone(tiny, world, independent):
    model, processor = tiny
    items = [*items_of(processor, world, independent), processor.neutral_item("skipped")]
    alone = [run(model, processor, [item])[1] for item in items]
    assert [len(output.detections.pred_masks) for output in alone] == [3, 1, 0, 0]
    assert difference(alone[0].detections.pred_masks[:1], alone[1].detections.pred_masks) > 1e-3
    for order in permutations(range(4)):
        _, output = run(model, processor, [items[k] for k in order])
        for row, k in enumerate(order):
            length = len(items[k]["input_ids"])
            assert same(output.language.hidden_BLC[row, :length], alone[k].language.hidden_BLC[0])
        for name in ("pred_masks", "pred_logits", "pred_boxes"):
            expected = torch.cat([getattr(alone[k].detections, name) for k in order])
            assert same(getattr(output.detections, name), expected), order


@pytest.mark.parametrize("independent", [False, True])
@torch.no_grad()
def test_positions_count_on_without_a_picture(tiny, world, independent):
    model, processor = tiny
    several = dataclasses.replace(TALK, turns=TALK.turns * 2)
    talk = processor.encode_sample(several, independent)
    picture = items_of(processor, world, independent)[0]
    for items, row in (([talk], 0), ([talk, picture], 0), ([picture, talk], 1)):
        batch = processor.collate(items)
        found = model.positions(
            batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"], batch.get("turn_ids")
        )[:, row, : len(talk["input_ids"])]
        expected = torch.arange(len(talk["input_ids"]))
        if independent:
            length = int((talk["turn_ids"] == 1).sum())
            assert (talk["turn_ids"] == 2).sum() == length
            expected = torch.where(talk["turn_ids"] == 2, expected - length, expected)
        assert torch.equal(found, expected.expand(3, -1))


@torch.no_grad()
def test_an_ordinary_conversation_among_independent_turns(tiny, world):
    """A row without turn numbers is the same in a batch that has them."""
    model, processor = tiny
    several = dataclasses.replace(TALK, turns=TALK.turns * 2)
    ordinary, packed = (processor.encode_sample(several, independent) for independent in (False, True))
    together = run(model, processor, [items_of(processor, world)[0], ordinary])[1].language.hidden_BLC[1]
    length = len(ordinary["input_ids"])
    alone = run(model, processor, [ordinary])[1].language.hidden_BLC[0]
    assert same(together[:length], alone)
    apart = run(model, processor, [packed])[1].language.hidden_BLC[0]
    last = int((packed["turn_ids"] == 2).sum())
    assert difference(apart[-last:], alone[-last:]) > 1e-3


def test_the_detector_does_not_see_rows_without_a_picture(tiny, world, monkeypatch):
    model, processor = tiny
    items = items_of(processor, world)
    seen: list[int] = []
    encode_image = model.detector.encode_image

    def counting(pixels):
        seen.append(len(pixels))
        return encode_image(pixels)

    monkeypatch.setattr(model.detector, "encode_image", counting)
    with torch.no_grad():
        for rows in ([0, 2], [2, 0, 2, 1], [2, 2, 2]):
            run(model, processor, [items[k] for k in rows])
    assert seen == [1, 2, 1]


@pytest.mark.parametrize("rows", [[2], [2, 2], [0, 2], [2, 1], [0, 1]])
def test_every_parameter_has_a_gradient(tiny, world, rows):
    """Also with everything trained that can be; what belongs to pictures has none but zeros where there is none."""
    model, processor = tiny
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    model.freeze_unused()
    try:
        _, output = run(model, processor, [items_of(processor, world)[k] for k in rows])
        detections = [output.detections, *output.detections.aux]
        outputs = [tensor for d in detections for tensor in (d.pred_masks, d.pred_logits, d.pred_boxes)]
        (output.language.hidden_BLC.square().sum() + sum(tensor.square().sum() for tensor in outputs)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, grad in gradients.items() if grad is None] == []
        assert all(bool(grad.isfinite().all()) for grad in gradients.values())
        flat = {name for name, grad in gradients.items() if not grad.any()}
        of_pictures = {name for name in gradients if not name.startswith(("vlm.language_model", "lm_head"))}
        if set(rows) == {2}:
            assert flat == of_pictures
        else:
            assert not [name for name in flat if "merger" in name or "query_bank" in name or "projector" in name]
    finally:
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def test_phrases_without_a_picture(tiny, world):
    model, processor = tiny
    picture, _, talk = items_of(processor, world)
    asked = processor.encode_chat(None, [("the red one", ["stars"])], True)
    lost = {**talk, "input_ids": asked.input_ids, "labels": asked.labels, "turn_ids": asked.turn_ids}
    with pytest.raises(ValueError, match="batch row 1: a phrase in a conversation about no image"):
        run(model, processor, [picture, lost])
    with pytest.raises(ValueError, match="batch row 0: a phrase in a conversation about no image"):
        run(model, processor, [lost, talk])
    batch = processor.collate([picture, talk])
    batch["detector_pixel_values"] = batch["detector_pixel_values"][:0]
    with pytest.raises(ValueError, match="1 rows with image tokens for 0 images of the detector"):
        model(*[batch[name] for name in INPUTS], turn_ids=batch["turn_ids"])
    batch = processor.collate([picture])
    batch["pixel_values"] = batch["pixel_values"][:0]
    with pytest.raises(ValueError, match="image tokens for 0 image features"):
        model(
            *[batch[name] for name in INPUTS],
            turn_ids=batch["turn_ids"],
            position_ids=torch.zeros(3, *batch["input_ids"].shape, dtype=torch.long),
        )
