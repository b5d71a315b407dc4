"""The model against figures of the released training code (DESIGN section 15)."""

from __future__ import annotations

import torch
from golden_model import load_golden


def close(actual, expected, tolerance=1e-4):
    """Relative to the tensor's largest magnitude."""
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference < tolerance, f"off by {difference:.2e} of the largest magnitude"


def run(model, tensors):
    return model(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors["pixel_values"],
        tensors["image_grid_thw"],
        tensors["detector_pixel_values"],
    )


@torch.no_grad()
def test_teacher_forced_outputs(golden):
    model, meta, tensors = load_golden(golden)
    output = run(model, tensors)
    valid = tensors["attention_mask"]
    close(output.language.hidden_BLC[valid], tensors["out.last_hidden_state"][valid])
    close(model.lm_logits(output.language.hidden_BLC)[valid], tensors["out.lm_logits"][valid])
    for name in ("pred_masks", "pred_logits", "pred_boxes"):
        batches = len(meta["phrases"])
        expected = torch.cat([tensors[f"out.{name}.{b}"] for b in range(batches)])
        close(getattr(output.detections, name), expected)


@torch.no_grad()
def test_positions(golden):
    model, _, tensors = load_golden(golden)
    mask = tensors["attention_mask"]
    positions = model.positions(tensors["input_ids"], mask, tensors["image_grid_thw"])
    assert torch.equal(positions[:, mask], tensors["position_ids"][:, mask])


@torch.no_grad()
def test_phrases_are_read_off_the_tokens(golden):
    model, meta, tensors = load_golden(golden)
    phrases = run(model, tensors).language.phrases
    ids = tensors["input_ids"][phrases.row[:, None], phrases.tokens]
    found = [row[keep].tolist() for row, keep in zip(ids, phrases.mask, strict=True)]
    assert found == [phrase for sample in meta["phrases"] for phrase in sample]
