"""Losses between matched masks: cross-entropy, dice, and the projection loss of box supervision (DESIGN section 6).

All functions take pairs that are already matched and return one value per pair, so that the caller alone decides how
pairs are summed and normalised. They compute in float32 whatever comes in.

Shape suffixes: M matched pairs, H W pixels, K pixels or sampled points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from instructsam.losses.matching import MaskSums, mask_sums

DICE_EPS = 1.0


@dataclass(frozen=True)
class PointSampling:
    """Where the mask losses are taken: on `num_points` points a pair, or on all pixels with ``num_points=0``.

    Attributes:
        num_points: points per pair (12,544 in DESIGN section 6).
        oversample: candidates drawn per point before the most uncertain ones are kept.
        importance: share of the points taken at the most uncertain logits; the rest is uniform.
    """

    num_points: int = 0
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        if self.num_points < 0:
            raise ValueError(f"num_points={self.num_points} must be 0 (all pixels) or positive")
        if not self.oversample >= 1:
            raise ValueError(f"oversample={self.oversample} must be at least 1")
        if not 0 <= self.importance <= 1:
            raise ValueError(f"importance={self.importance} must lie in 0…1")


def resize_masks(masks_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Ground truth at mask resolution: (K, H, W) → (K, *size), dtype kept.

    Source pixel floor(i · H / h), which is ``F.interpolate(mode="nearest")``; "nearest-exact" (pixel centres) is *not*
    what the released figures were computed with.
    """
    resized = F.interpolate(masks_KHW[:, None].float(), size=size, mode="nearest")[:, 0]
    return resized.to(masks_KHW.dtype)


class _PairLosses(torch.autograd.Function):
    """Mean cross-entropy and dice loss of pairs whose sums are known, with the gradient written out.

    The matching has computed every sum already, so that the forward pass touches no pixel; the backward pass keeps
    nothing but the logits (in their own dtype) and the masks, and builds the gradient in one go.
    """

    @staticmethod
    def forward(ctx: Any, logits_MK: Tensor, targets_MK: Tensor, overlap_M: Tensor, area_M: Tensor, bce_M: Tensor):
        ctx.save_for_backward(logits_MK, targets_MK, overlap_M, area_M)
        return bce_M.clone(), 1 - (2 * overlap_M + DICE_EPS) / (area_M + DICE_EPS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bce_M: Tensor, grad_dice_M: Tensor):  # type: ignore[override]  # one for each loss
        logits_MK, targets_MK, overlap_M, area_M = ctx.saved_tensors
        probs, targets = logits_MK.float().sigmoid(), targets_MK.float()
        total = area_M + DICE_EPS
        # bce: (p − m) / K. dice = 1 − (2 Σpm + eps) / total: d/dp = (2 Σpm + eps) / total² − 2 m / total.
        grad = (probs - targets).mul_((grad_bce_M / logits_MK.shape[1])[:, None])
        constant = grad_dice_M * (2 * overlap_M + DICE_EPS) / total**2
        by_target = grad_dice_M * -2 / total
        per_prob = (targets * by_target[:, None]).add_(constant[:, None])
        grad.addcmul_(per_prob, probs * (1 - probs))
        return grad.to(logits_MK.dtype), None, None, None, None


def bce_and_dice(logits_MK: Tensor, targets_MK: Tensor, sums_M: MaskSums | None = None) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy with logits, and dice loss (eps 1), of every pair: (M,) float32 each.

    Args:
        logits_MK: logits, any float dtype.
        targets_MK: bool, or floats in 0…1 without gradient.
        sums_M: their sums where they are known (from the matching); computed if None.
    """
    if sums_M is None:
        sums = mask_sums(logits_MK[:, None], targets_MK[:, None])
        sums_M = MaskSums(sums.overlap.flatten(), sums.area.flatten(), sums.bce.flatten())
    bce_M, dice_M = _PairLosses.apply(logits_MK, targets_MK, sums_M.overlap, sums_M.area, sums_M.bce)
    return bce_M, dice_M


def dice_loss(probs_MK: Tensor, targets_MK: Tensor, eps: float = DICE_EPS) -> Tensor:
    """1 − (2 Σ p·m + eps) / (Σ p + Σ m + eps) of every pair, (M,)."""
    overlap = (probs_MK * targets_MK).sum(-1)
    return 1 - (2 * overlap + eps) / (probs_MK.sum(-1) + targets_MK.sum(-1) + eps)


def projection_loss(logits_MHW: Tensor, box_masks_MHW: Tensor, eps: float = DICE_EPS) -> Tensor:
    """Loss of box-only pairs: dice between the max-projections of mask and box along rows, plus along columns, (M,).

    Computed on probabilities with the dice of the mask loss. ``amax`` shares the gradient among equal maxima, so the
    result does not depend on the order of pixels.
    """
    probs, boxes = logits_MHW.float().sigmoid(), box_masks_MHW.float()
    rows = dice_loss(probs.amax(-1), boxes.amax(-1), eps)
    columns = dice_loss(probs.amax(-2), boxes.amax(-2), eps)
    return rows + columns


def sample_at(maps_MHW: Tensor, points_MK2: Tensor) -> Tensor:
    """Bilinear values (M, K) of float maps at points (x, y) in 0…1 of the image (align_corners false).

    Points within half a pixel of the border take the border's value rather than fading to zero.
    """
    grid = 2 * points_MK2[:, :, None] - 1
    values = F.grid_sample(maps_MHW[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values[:, 0, :, 0]


@torch.no_grad()
def sample_points(logits_MHW: Tensor, sampling: PointSampling, generator: torch.Generator | None = None) -> Tensor:
    """Points (M, num_points, 2) as (x, y) in 0…1: the most uncertain of many candidates, the rest uniform.

    Uncertainty is −|logit|. Deterministic for a given generator (drawn on the generator's device, or on that of the
    logits without one).
    """
    device = logits_MHW.device
    draw_on = device if generator is None else generator.device

    def uniform(count: int) -> Tensor:
        return torch.rand(logits_MHW.shape[0], count, 2, generator=generator, device=draw_on).to(device)

    num_uncertain = int(sampling.importance * sampling.num_points)
    rest = uniform(sampling.num_points - num_uncertain)
    if num_uncertain == 0:
        return rest
    candidates = uniform(max(int(sampling.oversample * sampling.num_points), num_uncertain))
    certainty = sample_at(logits_MHW.float(), candidates).abs()
    index = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, index[:, :, None].expand(-1, -1, 2))
    return torch.cat([uncertain, rest], dim=1)


@dataclass(frozen=True)
class PairLosses:
    """Unweighted losses of every matched pair, (M,) float32 each; the parts that do not apply to a pair are 0."""

    bce_M: Tensor
    dice_M: Tensor
    projection_M: Tensor


def mask_losses(
    logits_MHW: Tensor,
    targets_MHW: Tensor,
    box_only_M: Tensor | None = None,
    sampling: PointSampling | None = None,
    generator: torch.Generator | None = None,
    sums_M: MaskSums | None = None,
) -> PairLosses:
    """Mask losses of matched pairs.

    Args:
        logits_MHW: mask logits of the matched queries, any float dtype; M may be 0.
        targets_MHW: their ground truth, bool or 0/1.
        box_only_M: bool; such pairs have only the projection loss (always on all pixels), the others bce and dice.
        sampling: points instead of all pixels; None is all pixels.
        generator: source of the points.
        sums_M: the pairs' sums over all pixels where they are known; they spare the forward pass its pixel work.
    """
    with torch.autocast(logits_MHW.device.type, enabled=False):
        if sampling is None or sampling.num_points == 0:
            bce, dice = bce_and_dice(logits_MHW.flatten(1), targets_MHW.flatten(1), sums_M)
        else:
            logits = logits_MHW.float()
            points = sample_points(logits, sampling, generator)
            bce, dice = bce_and_dice(sample_at(logits, points), sample_at(targets_MHW.float(), points))
        zero = torch.zeros_like(bce)
        if box_only_M is None:
            return PairLosses(bce, dice, zero)
        # Selection by where, not by indexing: no wait for the device to know how many pairs are box-only.
        projection = projection_loss(logits_MHW, targets_MHW)
        return PairLosses(
            torch.where(box_only_M, zero, bce),
            torch.where(box_only_M, zero, dice),
            torch.where(box_only_M, projection, zero),
        )
