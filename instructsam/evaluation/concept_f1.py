"""The figures of SA-Co: cgF1 = pmF1 x IL_MCC, over units that are an image and a phrase (DESIGN section 10).

Unlike everywhere else, a prediction of exactly the score 0.5 is kept, and predictions are assigned to ground truths
all at once (Hungarian, greatest sum of IoU), not one after another. A record is taken as one unit, so it should ask
for one phrase.

Shapes: R units, P predictions by rank, G ground truths, T IoU thresholds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from instructsam.evaluation.average_precision import IOU_THRESHOLDS

KEEP_SCORE = 0.5
EPSILON = 1e-4

CONVENTIONS = {
    "pmf1": f"positive micro F1; a unit is one instruction (an image and a phrase), kept: score >= {KEEP_SCORE}; "
    "Hungarian assignment on IoU, true positive if IoU >= t; P = TP / (TP + FP + 1e-4), R = TP / (TP + FN + 1e-4), F1 "
    "= 2PR / (P + R + 1e-4) from sums over units; FP only from units that have both ground truths and kept "
    "predictions, FN from all; mean over t = 0.50, 0.55, ..., 0.95; none where there is no ground truth",
    "il_mcc": f"Matthews correlation of 'something is kept (score >= {KEEP_SCORE})' with 'there is a ground truth' "
    "over units; 0 where the predictions are all of one kind, none where the truths are",
    "cgf1": "pmf1 x il_mcc, at each t and in the mean",
}


def assigned_hits(
    ious_RPG: NDArray[np.float64], num_kept_R: NDArray[np.int64], thresholds_T: NDArray[np.float64] = IOU_THRESHOLDS
) -> NDArray[np.int64]:
    """True positives (R, T) of units with equally many predictions and truths; the first ``num_kept_R`` are kept."""
    num_units, num_predictions, num_truths = ious_RPG.shape
    hits_RT = np.zeros((num_units, len(thresholds_T)), dtype=np.int64)
    if not num_truths or not num_predictions:
        return hits_RT
    # Where every truth's best prediction is another one, that is the assignment.
    is_kept_RP = np.arange(num_predictions) < num_kept_R[:, None]
    masked_RPG = np.where(is_kept_RP[:, :, None], ious_RPG, -1.0)
    best_RG = np.sort(masked_RPG.argmax(axis=1), axis=1)
    is_plain_R = (num_kept_R >= num_truths) & (np.diff(best_RG, axis=1) > 0).all(axis=1)
    hits_RT[is_plain_R] = (masked_RPG[is_plain_R].max(axis=1)[:, None, :] >= thresholds_T[:, None]).sum(axis=2)
    for unit in np.flatnonzero(~is_plain_R & (num_kept_R > 0)).tolist():
        ious_PG = ious_RPG[unit, : num_kept_R[unit]]
        rows, columns = linear_sum_assignment(ious_PG, maximize=True)
        hits_RT[unit] = (ious_PG[rows, columns] >= thresholds_T[:, None]).sum(axis=1)
    return hits_RT


def unit_counts(
    hits_RT: NDArray[np.int64], num_kept_R: NDArray[np.int64], num_truths_R: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(R, 6 + T) what each unit adds to the sums that :func:`from_sums` takes."""
    is_there_R, is_kept_R = num_truths_R > 0, num_kept_R > 0
    columns = [
        np.where(is_there_R, num_kept_R, 0),
        num_truths_R,
        is_there_R & is_kept_R,
        ~is_there_R & is_kept_R,
        is_there_R & ~is_kept_R,
        ~is_there_R & ~is_kept_R,
    ]
    return np.concatenate([np.stack(columns, axis=1), hits_RT], axis=1).astype(np.float64)


def from_sums(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Figures of summed :func:`unit_counts` (..., 6 + T).

    Returns:
        pmF1 (..., T), IL_MCC (...), cgF1 (..., T); NaN where there is nothing to measure.
    """
    kept, truths, tp, fp, fn, tn = (sums[..., column] for column in range(6))
    hits_T = sums[..., 6:]
    precision_T = hits_T / (kept + EPSILON)[..., None]
    recall_T = hits_T / (truths + EPSILON)[..., None]
    pmf1_T = 2 * precision_T * recall_T / (precision_T + recall_T + EPSILON)
    pmf1_T = np.where((truths > 0)[..., None], pmf1_T, np.nan)
    scale = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    mcc = np.where(scale > 0, (tp * tn - fp * fn) / np.where(scale > 0, scale, 1.0), 0.0)
    mcc = np.where((tp + fn > 0) & (tn + fp > 0), mcc, np.nan)
    return pmf1_T, mcc, pmf1_T * mcc[..., None]


def concept_f1(counts: NDArray[np.float64]) -> dict[str, float | None]:
    """``pmf1``, ``il_mcc``, ``cgf1`` and ``pmf1@0.50`` ... ``cgf1@0.95`` of units, from their :func:`unit_counts`."""
    pmf1_T, mcc, cgf1_T = from_sums(counts.sum(axis=0))
    named = {"cgf1": cgf1_T.mean(), "pmf1": pmf1_T.mean(), "il_mcc": mcc}
    for name, values_T in (("cgf1", cgf1_T), ("pmf1", pmf1_T)):
        named |= {f"{name}@{t:.2f}": value for t, value in zip(IOU_THRESHOLDS, values_T, strict=True)}
    return {name: None if np.isnan(value) else float(value) for name, value in named.items()}
