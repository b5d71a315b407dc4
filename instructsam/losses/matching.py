"""One-to-one matching of instance queries to ground-truth masks (DESIGN section 6, "Matching").

The pixel sums that the cost needs (intersections, areas, softplus means) come from batched matrix products over all
phrases at once and are kept: mask and class losses are read off the same sums. Only the assignment itself runs on the
host, after a single transfer for all phrases and decoder layers.

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

# Logits worked on at once by `mask_sums`: about a core's cache on a CPU, a bound on memory elsewhere.
CHUNK_LOGITS = {"cpu": 2**20, "other": 2**26}


class Matches(NamedTuple):
    """Matched pairs, ordered by phrase and then by query: three (M,) int64 tensors."""

    phrase_M: Tensor
    query_M: Tensor
    target_M: Tensor


@dataclass(frozen=True)
class MaskSums:
    """Pixel sums over pairs of a predicted and a ground-truth mask; float32, without gradient, all of one shape.

    Attributes:
        overlap: Σ p·m with p = sigmoid(mask logit).
        area: Σ p + Σ m.
        bce: mean over pixels of the binary cross-entropy with logits.
    """

    overlap: Tensor
    area: Tensor
    bce: Tensor

    def dice_score(self, eps: float) -> Tensor:
        """(2 Σ p·m + eps) / (Σ p + Σ m + eps), the shape of the sums."""
        return (2 * self.overlap + eps) / (self.area + eps)

    def at(self, matches: Matches) -> MaskSums:
        """Sums (M,) of the matched pairs, where these are (P, N, G)."""
        return MaskSums(self.overlap[matches], self.area[matches], self.bce[matches])


@torch.no_grad()
def mask_sums(pred_masks_PNX: Tensor, target_masks_PGX: Tensor) -> MaskSums:
    """Sums (P, N, G) of all pairs, by batched products over pixels X.

    The cross-entropy is softplus(−|x|) + max(x, 0)·(1 − m) + max(−x, 0)·m, whose last two terms are products.

    Args:
        pred_masks_PNX: mask logits (P, N, …) of any float dtype; all dimensions from the third on are pixels.
        target_masks_PGX: masks (P, G, …), bool or in 0…1; G may be 0.

    The products are float32 also under autocast; where TF32 is allowed for matrix products it applies here too (the
    targets are exact in it, the logits keep three digits).
    """
    device = pred_masks_PNX.device.type
    limit = CHUNK_LOGITS.get(device, CHUNK_LOGITS["other"])
    step = max(1, limit // max(pred_masks_PNX[:1].numel(), 1))
    with torch.autocast(device, enabled=False):
        parts = zip(pred_masks_PNX.split(step), target_masks_PGX.split(step), strict=True)
        overlap, area, bce = zip(*(_sums(masks, truth) for masks, truth in parts), strict=True)
        return MaskSums(torch.cat(overlap), torch.cat(area), torch.cat(bce))


def _sums(pred_masks_PNX: Tensor, target_masks_PGX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = pred_masks_PNX.float().flatten(2), target_masks_PGX.float().flatten(2)
    # Only non-negative numbers are added: mean softplus(x) − Σ x·m / X, one product less, would lose small losses of
    # confident logits to cancellation. Products with 0 ground truths or 0 phrases are legal and yield empty tensors.
    positive = logits.clamp(min=0)
    wrong = torch.einsum("pnx,pgx->png", positive, 1 - targets)
    wrong += torch.einsum("pnx,pgx->png", positive - logits, targets)
    bce = F.softplus(-logits.abs()).mean(-1)[:, :, None] + wrong / logits.shape[-1]
    probs = logits.sigmoid()
    overlap = torch.einsum("pnx,pgx->png", probs, targets)
    return overlap, probs.sum(-1)[:, :, None] + targets.sum(-1)[:, None, :], bce


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
    return dice_weight * dice + bce_weight * sums.bce + class_weight * F.softplus(-pred_logits_PN.float())[..., None]


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
