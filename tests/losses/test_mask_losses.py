"""Mask losses of matched pairs: hand-computed values, sampled points, and the resizing of ground truth."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from double_precision import CLOSE, float64
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.losses.mask_losses import (
    PointSampling,
    bce_and_dice,
    dice_loss,
    mask_losses,
    projection_loss,
    resize_masks,
    sample_at,
    sample_points,
)

LN3 = math.log(3.0)


def pairs(seed=0, count=3, height=16, width=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, height, width, generator=generator), torch.rand(
        count, height, width, generator=generator
    ) > 0.5


def blocks(seed, size=64, cells=4, count=2):
    """Piecewise constant logits and masks, on which interpolation hardly matters."""
    logits, masks = pairs(seed, count, cells, cells)
    return (F.interpolate(part[:, None].float(), size=(size, size))[:, 0] for part in (logits, masks))


@float64()
def test_bce_and_dice_by_hand():
    logits = torch.tensor([[[0.0, LN3], [-LN3, 0.0]]])  # probabilities ½ ¾ ¼ ½
    masks = torch.tensor([[[True, True], [False, False]]])
    losses = mask_losses(logits, masks)
    assert losses.bce_M.item() == pytest.approx((2 * math.log(2) + 2 * math.log(4 / 3)) / 4)
    assert losses.dice_M.item() == pytest.approx(1 - (2 * 1.25 + 1) / (2.0 + 2.0 + 1))
    assert losses.projection_M.item() == 0


def test_gradient_equals_autograd_of_the_plain_formulas():
    logits, masks = pairs()
    soft = torch.rand(3, 16 * 12, generator=torch.Generator().manual_seed(9))
    for targets in (masks.flatten(1), soft):
        mine = (logits.flatten(1) * 3).requires_grad_()
        plain = mine.detach().double().requires_grad_()
        weights = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3]])
        bce, dice = bce_and_dice(mine, targets)
        (weights[0] @ bce + weights[1] @ dice).backward()
        truth = targets.double()
        plain_bce = F.binary_cross_entropy_with_logits(plain, truth, reduction="none").mean(1)
        plain_dice = dice_loss(plain.sigmoid(), truth)
        (weights[0].double() @ plain_bce + weights[1].double() @ plain_dice).backward()
        torch.testing.assert_close(bce, plain_bce.float())
        torch.testing.assert_close(dice, plain_dice.float())
        torch.testing.assert_close(mine.grad, plain.grad.float(), rtol=1e-4, atol=1e-8)


@float64()
def test_projection_by_hand():
    logits = torch.tensor([[[0.0, -LN3], [-LN3, LN3]]])  # probabilities ½ ¼ / ¼ ¾
    box = torch.tensor([[[True, True], [False, False]]])
    rows = 1 - (2 * 0.5 + 1) / (0.5 + 0.75 + 1 + 1)
    columns = 1 - (2 * 1.25 + 1) / (0.5 + 0.75 + 2 + 1)
    assert projection_loss(logits, box).item() == pytest.approx(rows + columns)


def test_projection_sees_only_the_box_of_the_mask():
    """A mask that touches all four sides of the box is as good as the filled box."""
    box = torch.zeros(1, 8, 8, dtype=torch.bool)
    box[:, 2:6, 1:7] = True
    cross = torch.full((1, 8, 8), -30.0)
    cross[:, 2:6, 3] = 30.0
    cross[:, 4, 1:7] = 30.0
    assert projection_loss(cross, box).item() == pytest.approx(0, abs=1e-6)
    assert projection_loss(torch.roll(cross, 1, dims=2), box).item() > 0.1


def test_box_only_pairs_have_the_projection_loss_and_nothing_else():
    logits, masks = pairs()
    box_only = torch.tensor([False, True, False])
    mixed, plain = mask_losses(logits, masks, box_only), mask_losses(logits, masks)
    assert torch.equal(mixed.bce_M, plain.bce_M * ~box_only)
    assert torch.equal(mixed.dice_M, plain.dice_M * ~box_only)
    assert torch.equal(mixed.projection_M, projection_loss(logits, masks) * box_only)


@pytest.mark.parametrize("num_points", [0, 20])
def test_no_pairs_is_zero_and_connected(num_points):
    logits = torch.randn(2, 8, 8, requires_grad=True)
    losses = mask_losses(
        logits[:0], torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.bool), PointSampling(num_points=num_points)
    )
    (losses.bce_M.sum() + losses.dice_M.sum() + losses.projection_M.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@float64()
@settings(deadline=None, max_examples=25)
@given(
    logit=st.floats(-8, 8),
    truth=st.booleans(),
    importance=st.sampled_from([0.0, 0.75, 1.0]),
    seed=st.integers(0, 100),
)
def test_points_on_constant_masks_are_exact(logit, truth, importance, seed):
    """Whatever points are drawn, also at the very border, the loss is that of all pixels."""
    logits, masks = torch.full((2, 9, 5), logit), torch.full((2, 9, 5), truth)
    sampling = PointSampling(num_points=45, importance=importance)
    points = mask_losses(logits, masks, None, sampling, torch.Generator().manual_seed(seed))
    full = mask_losses(logits, masks)
    torch.testing.assert_close(points.bce_M, full.bce_M, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(points.dice_M, full.dice_M, rtol=CLOSE, atol=CLOSE)


def test_uniform_points_estimate_the_full_loss():
    logits, masks = blocks(seed=3)
    full = mask_losses(logits, masks)
    sampling = PointSampling(num_points=2_000, importance=0.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [mask_losses(logits, masks, None, sampling, generator).bce_M for _ in range(20)]
    torch.testing.assert_close(torch.stack(drawn).mean(0), full.bce_M, rtol=0.03, atol=0)


def test_gradient_of_points_estimates_the_full_gradient():
    logits, masks = blocks(seed=4, size=64)
    logits.requires_grad_()
    (full,) = torch.autograd.grad(mask_losses(logits, masks).bce_M.sum(), logits)
    sampling = PointSampling(num_points=40_000, importance=0.0)
    points = mask_losses(logits, masks, None, sampling, torch.Generator().manual_seed(1)).bce_M.sum()
    (sampled,) = torch.autograd.grad(points, logits)
    full_cells, sampled_cells = (F.avg_pool2d(grad[:, None], 16) for grad in (full, sampled))
    # Interpolation blends neighbouring cells along one of sixteen pixels, hence the tolerance.
    torch.testing.assert_close(sampled_cells, full_cells, rtol=0, atol=0.08 * full_cells.abs().max().item())


def test_important_points_lie_where_the_logit_is_uncertain():
    logits = torch.full((1, 20, 20), 6.0)
    logits[:, :, 10:12] = 0.05
    sampling = PointSampling(num_points=60, oversample=10, importance=0.75)
    points = sample_points(logits, sampling, torch.Generator().manual_seed(0))
    assert points.shape == (1, 60, 2) and points.min() >= 0 and points.max() <= 1
    near = (points[0, :, 0] - 11 / 20).abs() < 2 / 20
    assert near[:45].all() and near[45:].float().mean() < 0.7


def test_points_depend_on_the_generator_alone():
    logits, _ = pairs()
    draw = [sample_points(logits, PointSampling(50), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@float64()
def test_sampling_at_pixel_centres_reads_the_pixels():
    logits, _ = pairs(height=4, width=5)
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(5) + 0.5) / 5, indexing="ij")
    centres = torch.stack([x, y], -1).reshape(1, -1, 2).expand(3, -1, -1)
    torch.testing.assert_close(sample_at(logits, centres), logits.flatten(1), rtol=CLOSE, atol=CLOSE)


def test_bf16_logits_are_computed_in_float32():
    logits, masks = pairs(height=64, width=64)
    coarse = mask_losses(logits.bfloat16(), masks)
    exact = mask_losses(logits.bfloat16().float(), masks)
    assert coarse.bce_M.dtype == torch.float32
    assert torch.equal(coarse.bce_M, exact.bce_M) and torch.equal(coarse.dice_M, exact.dice_M)
    leaf = logits.bfloat16().requires_grad_()
    mask_losses(leaf, masks).dice_M.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16 and leaf.grad.any()


def test_dice_of_empty_prediction_and_empty_truth_is_zero():
    assert dice_loss(torch.zeros(1, 9), torch.zeros(1, 9)).item() == 0


def test_resizing_takes_the_floor_pixel():
    masks = torch.arange(5)[None, None, :].expand(1, 5, 5)
    assert resize_masks(masks, (3, 3))[0, 0].tolist() == [0, 1, 3]
    assert resize_masks(torch.ones(2, 5, 5, dtype=torch.bool), (3, 4)).dtype == torch.bool
    assert resize_masks(torch.ones(0, 5, 5, dtype=torch.bool), (3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("wrong", [{"num_points": -1}, {"oversample": 0.5}, {"importance": 1.5}])
def test_sampling_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PointSampling(**wrong)
