"""Losses and gradients against figures of the released training code (DESIGN sections 6 and 15)."""

from __future__ import annotations

import pytest
import torch
from golden_model import load_golden, our_name

from instructsam.losses.criterion import SetCriterion
from instructsam.losses.mask_losses import resize_masks
from instructsam.processing.targets import resize_nearest
from instructsam.training.objectives import InstructionObjective


def golden_batch(meta: dict, tensors: dict, mask_size: tuple[int, int]) -> dict:
    """The fixture as a batch; a single all-zero mask stands for a no-target phrase."""
    masks = []
    for b, phrases in enumerate(meta["mask_ids"]):
        resized = resize_masks(tensors[f"gt_masks.{b}"], mask_size).bool()
        for ids in phrases:
            found = resized[ids]
            masks.append(found if tensors[f"gt_masks.{b}"][ids].any() else found[:0])
    most = max(map(len, masks))
    target_masks = torch.zeros(len(masks), most, *mask_size, dtype=torch.bool)
    valid = torch.zeros(len(masks), most, dtype=torch.bool)
    for p, found in enumerate(masks):
        target_masks[p, : len(found)] = found
        valid[p, : len(found)] = True
    names = ("input_ids", "labels", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
    return {**{name: tensors[name] for name in names}, "target_masks": target_masks, "target_valid": valid}


@pytest.fixture
def trained(golden):
    """Loss terms and the model with the gradients of their sum."""
    model, meta, tensors = load_golden(golden)
    objective = InstructionObjective(model, SetCriterion()).eval()
    batch = golden_batch(meta, tensors, model.config.mask_size)
    counts = {name: torch.tensor(value) for name, value in objective.count_units(batch).items()}
    terms = objective(batch, counts)
    sum(terms.values()).backward()
    return model, meta, terms


def test_every_loss_term(trained):
    _, meta, terms = trained
    names = {"language": "ce_loss", "mask_bce": "mask_bce_loss", "mask_dice": "mask_dice_loss", "cls": "cls_loss"}
    for ours, theirs in names.items():
        assert float(terms[ours].detach()) == pytest.approx(meta["losses"][theirs], rel=1e-4), ours
    assert float(sum(terms.values()).detach()) == pytest.approx(meta["losses"]["loss"], rel=1e-4)


def test_gradient_norms(trained):
    model, meta, _ = trained
    parameters = dict(model.named_parameters())
    largest = max(meta["grad_norms"].values())
    seen = set()
    for released, expected in meta["grad_norms"].items():
        name = our_name(released)
        seen.add(name)
        actual = 0.0 if parameters[name].grad is None else float(parameters[name].grad.norm())
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-6 * largest), name
    others = {name for name, p in parameters.items() if p.grad is not None and float(p.grad.norm()) > 1e-6 * largest}
    frozen = {name for name in others if name.startswith("detector.vision_encoder.")}
    assert others - seen == frozen, (
        "only the image encoder, frozen in the release, may have gradients beyond the fixture"
    )


def test_two_nearest_resizes_agree(golden):
    """Targets are resized with numpy in the data workers, as torch's nearest does it."""
    _, meta, tensors = load_golden(golden)
    for b in range(len(meta["mask_ids"])):
        masks = tensors[f"gt_masks.{b}"]
        for size in ((32, 32), (7, 50)):
            ours = torch.from_numpy(resize_nearest(masks.permute(1, 2, 0).numpy(), size)).permute(2, 0, 1)
            assert torch.equal(ours, resize_masks(masks, size).bool())
            exact = torch.from_numpy(resize_nearest(masks.permute(1, 2, 0).numpy(), size, "nearest-exact"))
            theirs = torch.nn.functional.interpolate(masks[None].float(), size=size, mode="nearest-exact")[0].bool()
            assert torch.equal(exact.permute(2, 0, 1), theirs)
