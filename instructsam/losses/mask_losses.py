"""Losses between matched masks: cross-entropy, dice, and the projection loss of box supervision (DESIGN section 6).

All functions take pairs that are already matched and return one value per pair, so that the caller alone decides how
pairs are summed and normalised. They compute in float32 whatever comes in.

Shape suffixes: M matched pairs, H W pixels, K pixels or sampled points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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


def bce_per_pair(logits_MK: Tensor, targets_MK: Tensor) -> Tensor:
    """Mean binary cross-entropy with logits of every pair, (M,)."""
    return F.binary_cross_entropy_with_logits(logits_MK, targets_MK, reduction="none").mean(-1)


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
) -> PairLosses:
    """Mask losses of matched pairs.

    Args:
        logits_MHW: mask logits of the matched queries, any float dtype; M may be 0.
        targets_MHW: their ground truth, bool or 0/1.
        box_only_M: bool; such pairs have only the projection loss (always on all pixels), the others bce and dice.
        sampling: points instead of all pixels; None is all pixels.
        generator: source of the points.
    """
    with torch.autocast(logits_MHW.device.type, enabled=False):
        logits, targets = logits_MHW.float(), targets_MHW.float()
        if sampling is None or sampling.num_points == 0:
            logits_MK, targets_MK = logits.flatten(1), targets.flatten(1)
        else:
            points = sample_points(logits, sampling, generator)
            logits_MK, targets_MK = sample_at(logits, points), sample_at(targets, points)
        bce = bce_per_pair(logits_MK, targets_MK)
        dice = dice_loss(logits_MK.sigmoid(), targets_MK)
        zero = torch.zeros_like(bce)
        if box_only_M is None:
            return PairLosses(bce, dice, zero)
        # Selection by where, not by indexing: no wait for the device to know how many pairs are box-only.
        projection = projection_loss(logits, targets)
        return PairLosses(
            torch.where(box_only_M, zero, bce),
            torch.where(box_only_M, zero, dice),
            torch.where(box_only_M, projection, zero),
        )
