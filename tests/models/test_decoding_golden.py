"""Decoding against the fixture's teacher-forced figures (DESIGN section 7, rule ``trained``)."""

from __future__ import annotations

import torch
from golden_model import load_golden
from test_modeling_golden import close

from instructsam.models.decoding import decode


@torch.no_grad()
def test_decoding_gives_the_teacher_forced_masks(golden):
    model, meta, tensors = load_golden(golden)
    ids = meta["tokens"]
    answer = tensors["labels"][0] != -100
    start = int(answer.nonzero()[0])
    prompt = tensors["input_ids"][:1, :start]
    blocks = {ids["seg"], ids["mask_start"], ids["mask_end"]}
    forced = [token for token in tensors["input_ids"][0, answer].tolist() if token not in blocks]
    patches = int(tensors["image_grid_thw"][0].prod())

    def choose(step, logits):
        return torch.tensor([forced[step] if step < len(forced) else ids["eos"]])

    decoded = decode(
        model,
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        tensors["pixel_values"][:patches],
        tensors["image_grid_thw"][:1],
        choose=choose,
    )
    length = decoded.input_ids.shape[1]
    assert torch.equal(decoded.input_ids[0], tensors["input_ids"][0, :length])
    close(decoded.language.hidden_BLC[0], tensors["out.last_hidden_state"][0, :length])
    bridge = model.bridge(decoded.input_ids, decoded.language)
    detections = model.detect(model.detector.encode_image(tensors["detector_pixel_values"][:1]), bridge)
    close(detections.pred_masks, tensors["out.pred_masks.0"])
    close(detections.pred_logits, tensors["out.pred_logits.0"])
