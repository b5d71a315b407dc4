"""One-to-one matching of instance queries to ground-truth masks (DESIGN section 6, "Matching").

The pixel sums that the cost needs (intersections, areas, softplus means) come from batched matrix products over all
phrases at once and are kept: the class loss takes its soft targets from the same sums. Only the assignment itself runs
on the host, after a single transfer for all phrases and decoder layers.

Shape suffixes: P phrases, N queries, G ground truths, H W pixels, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

COST_DICE = 0.5
COST_BCE = 2.0
COST_CLASS = 1.0
COST_DICE_EPS = 1e-3


class Matches(NamedTuple):
    """Matched pairs, ordered by phrase and then by query: three (M,) int64 tensors."""

    phrase_M: Tensor
    query_M: Tensor
    target_M: Tensor


@dataclass(frozen=True)
class MaskSums:
    """Pixel sums over every (query, ground truth) pair of every phrase; float32, without gradient.

    Attributes:
        intersection_PNG: Σ p·m with p = sigmoid(mask logit).
        bce_PNG: mean over pixels of the binary cross-entropy with logits.
        pred_area_PN: Σ p.
        target_area_PG: Σ m.
    """

    intersection_PNG: Tensor
    bce_PNG: Tensor
    pred_area_PN: Tensor
    target_area_PG: Tensor

    def dice_score(self, eps: float) -> Tensor:
        """(2 Σ p·m + eps) / (Σ p + Σ m + eps), shape (P, N, G)."""
        areas_PNG = self.pred_area_PN[:, :, None] + self.target_area_PG[:, None, :]
        return (2 * self.intersection_PNG + eps) / (areas_PNG + eps)


@torch.no_grad()
def mask_sums(pred_masks_PNHW: Tensor, target_masks_PGHW: Tensor) -> MaskSums:
    """Pixel sums of all pairs by two batched products; bce(n, g) = mean softplus(x) − Σ x·m / HW.

    Args:
        pred_masks_PNHW: mask logits, any float dtype.
        target_masks_PGHW: masks, bool or 0/1 floats; G may be 0.

    The products are float32 also under autocast; where TF32 is allowed for matrix products it applies here too (the
    targets are exact in it, the logits keep three digits).
    """
    with torch.autocast(pred_masks_PNHW.device.type, enabled=False):
        logits = pred_masks_PNHW.float().flatten(2)
        targets = target_masks_PGHW.float().flatten(2)
        # A product with 0 ground truths or 0 phrases is legal and yields empty tensors.
        dot = torch.einsum("pnx,pgx->png", logits, targets)
        bce = F.softplus(logits).mean(-1)[:, :, None] - dot / logits.shape[-1]
        probs = logits.sigmoid()
        intersection = torch.einsum("pnx,pgx->png", probs, targets)
        return MaskSums(intersection, bce, probs.sum(-1), targets.sum(-1))


@torch.no_grad()
def matching_cost(
    sums: MaskSums,
    pred_logits_PN: Tensor,
    dice_weight: float = COST_DICE,
    bce_weight: float = COST_BCE,
    class_weight: float = COST_CLASS,
) -> Tensor:
    """Cost (P, N, G), float32: 0.5·dice + 2·bce + softplus(−logit) with the release's weights (DESIGN section 6)."""
    dice = 1 - sums.dice_score(COST_DICE_EPS)
    return (
        dice_weight * dice + bce_weight * sums.bce_PNG + class_weight * F.softplus(-pred_logits_PN.float())[..., None]
    )


def assign(costs: Sequence[Tensor], target_valid_PG: Tensor) -> list[Matches]:
    """Hungarian assignment per phrase, for one or several sets of predictions against the same ground truth.

    Args:
        costs: (P, N, G) float32 each; one per decoder layer.
        target_valid_PG: bool; padding is False. Valid targets need not come first.

    Returns:
        One `Matches` per cost, on the costs' device. Every valid target is matched to exactly one query.

    Raises:
        ValueError: a phrase has more valid targets than queries, or a non-finite cost.
    """
    num_phrases, num_queries, _ = costs[0].shape
    # The validity rides along as one more row, so that the host is waited for once.
    validity = target_valid_PG.to(costs[0])[:, None]
    table = torch.cat([*costs, validity], dim=1).cpu().numpy()
    valid = table[:, -1] > 0.5

    results = []
    for layer in range(len(costs)):
        cost_PNG = table[:, layer * num_queries : (layer + 1) * num_queries]
        parts: list[np.ndarray] = [np.zeros((3, 0), dtype=np.int64)]
        for phrase in range(num_phrases):
            columns = np.flatnonzero(valid[phrase])
            if len(columns) == 0:
                continue
            if len(columns) > num_queries:
                raise ValueError(
                    f"phrase {phrase} of the batch has {len(columns)} ground-truth masks but the model only "
                    f"{num_queries} queries; drop or truncate such phrases in the data"
                )
            cost_NG = cost_PNG[phrase][:, columns]
            if not np.isfinite(cost_NG).all():
                raise ValueError(
                    f"non-finite matching cost at phrase {phrase} of the batch (set {layer} of {len(costs)}): "
                    "its mask or class logits are NaN or infinite"
                )
            queries, chosen = linear_sum_assignment(cost_NG)
            parts.append(np.stack([np.full_like(queries, phrase), queries, columns[chosen]]))
        index_3M = torch.from_numpy(np.concatenate(parts, axis=1)).to(costs[0].device)
        results.append(Matches(*index_3M.unbind(0)))
    return results


@torch.no_grad()
def match(
    pred_masks_PNHW: Tensor, pred_logits_PN: Tensor, target_masks_PGHW: Tensor, target_valid_PG: Tensor
) -> Matches:
    """Match one set of predictions with the release's cost: `mask_sums`, `matching_cost` and `assign` in one call."""
    cost = matching_cost(mask_sums(pred_masks_PNHW, target_masks_PGHW), pred_logits_PN)
    return assign([cost], target_valid_PG)[0]
