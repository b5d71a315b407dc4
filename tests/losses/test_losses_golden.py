"""The set losses and the language loss against figures of the released training code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from instructsam.losses.criterion import SetCriterion, count_targets
from instructsam.losses.language import language_loss, language_targets
from instructsam.losses.mask_losses import resize_masks


def load(golden):
    meta = json.loads((golden / "meta.json").read_text())
    return meta, load_file(golden / "tensors.safetensors")


def set_batch(meta, tensors):
    """All phrases on one axis. A single all-zero mask stands for no-target and becomes G = 0."""
    masks_per_phrase, outputs = [], []
    for b, groups in enumerate(meta["mask_ids"]):
        pred_masks = tensors[f"out.pred_masks.{b}"]
        resized = resize_masks(tensors[f"gt_masks.{b}"], tuple(pred_masks.shape[-2:]))
        for ids in groups:
            no_target = len(ids) == 1 and not tensors[f"gt_masks.{b}"][ids[0]].any()
            masks_per_phrase.append(resized[ids][: 0 if no_target else None])
        outputs.append((pred_masks, tensors[f"out.pred_logits.{b}"], tensors[f"out.pred_boxes.{b}"]))
    pred_masks, pred_logits, pred_boxes = (torch.cat(part) for part in zip(*outputs, strict=True))
    most = max(len(masks) for masks in masks_per_phrase)
    target_masks = torch.zeros(len(masks_per_phrase), most, *pred_masks.shape[-2:], dtype=torch.bool)
    target_valid = torch.zeros(len(masks_per_phrase), most, dtype=torch.bool)
    for phrase, masks in enumerate(masks_per_phrase):
        target_masks[phrase, : len(masks)] = masks
        target_valid[phrase, : len(masks)] = True
    detections = SimpleNamespace(pred_masks=pred_masks, pred_logits=pred_logits, pred_boxes=pred_boxes)
    return detections, {"target_masks": target_masks, "target_valid": target_valid}


def test_set_losses_equal_released_figures(golden):
    meta, tensors = load(golden)
    outputs, targets = set_batch(meta, tensors)
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    expected = meta["losses"]
    assert terms["mask_bce"].item() == pytest.approx(expected["mask_bce_loss"], rel=1e-4)
    assert terms["mask_dice"].item() == pytest.approx(expected["mask_dice_loss"], rel=1e-4)
    assert terms["cls"].item() == pytest.approx(expected["cls_loss"], rel=1e-4)


def test_language_loss_and_total_equal_released_figures(golden):
    meta, tensors = load(golden)
    ignore = [meta["tokens"]["seg"], meta["tokens"]["mask_end"]]
    chosen = language_targets(tensors["input_ids"], tensors["labels"], ignore)
    logits = tensors["out.lm_logits"][chosen.row_T, chosen.position_T]
    loss = language_loss(logits, chosen.token_T, chosen.token_T.numel())
    assert loss.item() == pytest.approx(meta["losses"]["ce_loss"], rel=1e-4)

    outputs, targets = set_batch(meta, tensors)
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    assert (loss + sum(terms.values())).item() == pytest.approx(meta["losses"]["loss"], rel=1e-4)


def test_golden_figures_tell_the_resizing_rules_apart(golden):
    """The fixture would notice another nearest rule: figures differ by more than the tolerance."""
    meta, tensors = load(golden)
    outputs, targets = set_batch(meta, tensors)
    size = tuple(outputs.pred_masks.shape[-2:])
    phrase = 0
    for b, groups in enumerate(meta["mask_ids"]):
        exact = torch.nn.functional.interpolate(
            tensors[f"gt_masks.{b}"][:, None].float(), size=size, mode="nearest-exact"
        )[:, 0].bool()
        for ids in groups:
            count = int(targets["target_valid"][phrase].sum())
            targets["target_masks"][phrase, :count] = exact[ids][:count]
            phrase += 1
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    if any(tensors[f"gt_masks.{b}"].shape[-2:] != size for b in range(len(meta["mask_ids"]))):
        assert terms["mask_bce"].item() != pytest.approx(meta["losses"]["mask_bce_loss"], rel=1e-4)
