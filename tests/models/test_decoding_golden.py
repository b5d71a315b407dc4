"""Decoding against the fixture's figures (DESIGN section 7): teacher-forced ones, and those of the released code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_fixtures import GOLDEN_ROOT
from golden_model import load_golden
from test_modeling_golden import close

from instructsam.models.decoding import decode
from instructsam.models.decoding_rules import RULES


def forced(answers, eos):
    """A chooser that writes the given text tokens of every row, then ends it."""

    def choose(step, logits):
        return torch.tensor([answer[step] if step < len(answer) else eos for answer in answers])

    return choose


def decode_sample(model, meta, tensors, answer, rule):
    """Decode the fixture's sample 0 with a forced answer; returns (decoded, detections)."""
    start = int((tensors["labels"][0] != -100).nonzero()[0])
    prompt = tensors["input_ids"][:1, :start]
    patches = int(tensors["image_grid_thw"][0].prod())
    decoded = decode(
        model,
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        tensors["pixel_values"][:patches],
        tensors["image_grid_thw"][:1],
        choose=forced([answer], meta["tokens"]["eos"]),
        rule=rule,
    )
    bridge = model.bridge(decoded.input_ids, decoded.language)
    return decoded, model.detect(model.detector.encode_image(tensors["detector_pixel_values"][:1]), bridge)


@torch.no_grad()
def test_decoding_gives_the_teacher_forced_masks(golden):
    model, meta, tensors = load_golden(golden)
    ids = meta["tokens"]
    blocks = {ids["seg"], ids["mask_start"], ids["mask_end"]}
    answer = tensors["input_ids"][0, tensors["labels"][0] != -100].tolist()
    text = [token for token in answer if token not in blocks]
    decoded, detections = decode_sample(model, meta, tensors, text, "trained")
    length = decoded.input_ids.shape[1]
    assert torch.equal(decoded.input_ids[0], tensors["input_ids"][0, :length])
    close(decoded.language.hidden_BLC[0], tensors["out.last_hidden_state"][0, :length])
    close(detections.pred_masks, tensors["out.pred_masks.0"])
    close(detections.pred_logits, tensors["out.pred_logits.0"])


def released_answer(tensors):
    return tensors["released_decode.tokens"].flatten().tolist()


@torch.no_grad()
def test_the_released_rule_gives_the_released_masks(golden):
    model, meta, tensors = load_golden(golden)
    _, detections = decode_sample(model, meta, tensors, released_answer(tensors), "released")
    close(detections.pred_masks, tensors["released_decode.pred_masks"])
    close(detections.pred_logits.sigmoid(), tensors["released_decode.scores"])


@pytest.mark.parametrize("quirk", ["sequential_positions", "late_blocks", "open_blocks", "marked_phrases"])
@torch.no_grad()
def test_every_quirk_is_needed(quirk):
    """The fixture tells each of the four apart: without one of them its masks are missed."""
    model, meta, tensors = load_golden(GOLDEN_ROOT / "a")
    rule = replace(RULES["released"], **{quirk: False})
    _, detections = decode_sample(model, meta, tensors, released_answer(tensors), rule)
    with pytest.raises(AssertionError, match="of the largest magnitude"):
        close(detections.pred_masks, tensors["released_decode.pred_masks"])


@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_the_released_masks_inside_a_batch(golden, place):
    """The same beside a row with a longer prompt and an answer whose blocks come at other steps."""
    model, meta, tensors = load_golden(golden)
    ids = meta["tokens"]
    starts = [int((row != -100).nonzero()[0]) for row in tensors["labels"][:2]]
    prompts = [tensors["input_ids"][b, : starts[b]] for b in range(2)]
    prompts[1] = torch.cat([prompts[1], torch.tensor([40, 41, 42])])
    other = [45, ids["ref_start"], 20, ids["ref_end"], 44, 46, 47, ids["ref_start"], 21, 22, ids["ref_end"], ids["eos"]]
    answers = [released_answer(tensors), other]
    patches = list(tensors["pixel_values"].split(tensors["image_grid_thw"].prod(-1).tolist()))
    order = [0, 1] if place == 0 else [1, 0]
    length = max(map(len, prompts))
    input_ids = torch.full((2, length), ids["pad"])
    for row, b in enumerate(order):
        input_ids[row, : len(prompts[b])] = prompts[b]
    mask = torch.arange(length) < torch.tensor([[len(prompts[b])] for b in order])
    decoded = decode(
        model,
        input_ids,
        mask,
        torch.cat([patches[b] for b in order]),
        tensors["image_grid_thw"][order],
        choose=forced([answers[b] for b in order], ids["eos"]),
        rule="released",
    )
    features = model.detector.encode_image(tensors["detector_pixel_values"][order])
    detections = model.detect(features, model.bridge(decoded.input_ids, decoded.language))
    mine = decoded.language.phrases.row == place
    assert int(mine.sum()) == len(tensors["released_decode.scores"]) and int((~mine).sum()) == 2
    close(detections.pred_masks[mine], tensors["released_decode.pred_masks"])
    close(detections.pred_logits[mine].sigmoid(), tensors["released_decode.scores"])
