"""Class-agnostic average precision of instance masks, as Inst2Seg measures it (DESIGN section 10).

Matching happens within an instruction, ranking over the predictions of all of them. Matching depends on the order of
an instruction's own predictions only, so it is done once per instruction, whatever group is summed up afterwards.

Shapes: T thresholds, P predictions, G ground truths.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Quotients of whole numbers, since 0.5 + k * 0.05 misses IoUs that lie exactly on a threshold.
IOU_THRESHOLDS: NDArray[np.float64] = np.arange(10, 20) / 20


def match_predictions(
    ious_PG: NDArray[np.float64], scores_P: ArrayLike, thresholds_T: ArrayLike = IOU_THRESHOLDS
) -> NDArray[np.bool_]:
    """Which predictions of one instruction hit, at every threshold.

    By falling score (equal scores in the order listed), each prediction takes the ground truth of highest IoU among
    those not taken yet (the first of equals), and hits if that IoU is at least the threshold. One that does not hit
    takes nothing.

    Returns:
        (T, P) boolean, columns in the order that the predictions are listed in.
    """
    thresholds = np.asarray(thresholds_T, dtype=np.float64)
    num_predictions, num_truths = ious_PG.shape
    hits_TP = np.zeros((len(thresholds), num_predictions), dtype=np.bool_)
    if num_truths == 0:
        return hits_TP
    rows = np.arange(len(thresholds))
    taken_TG = np.zeros((len(thresholds), num_truths), dtype=np.bool_)
    for index in rank(scores_P):
        free_TG = np.where(taken_TG, -1.0, ious_PG[index])
        best_T = free_TG.argmax(axis=1)
        hit_T = free_TG[rows, best_T] >= thresholds
        hits_TP[:, index] = hit_T
        taken_TG[rows[hit_T], best_T[hit_T]] = True
    return hits_TP


def average_precision(hits_TP: NDArray[np.bool_], scores_P: ArrayLike, num_truths: int) -> NDArray[np.float64]:
    """All-point interpolated average precision at every threshold, over the pooled predictions of many instructions.

    Predictions are ranked by falling score, equal scores in the order listed. Precision at a rank is raised to the
    best precision at that rank or later; the average is over ground truths, those never hit counting 0.

    Args:
        hits_TP: (T, P) hits, from :func:`match_predictions` of every instruction side by side.
        scores_P: (P,) scores.
        num_truths: number of ground truths of all instructions.

    Returns:
        (T,) in 0...1; zeros where there is no ground truth, or no prediction.
    """
    if num_truths == 0 or hits_TP.shape[1] == 0:
        return np.zeros(hits_TP.shape[0])
    ranked_TP = hits_TP[:, rank(scores_P)]
    precision_TP = np.cumsum(ranked_TP, axis=1) / np.arange(1, ranked_TP.shape[1] + 1)
    envelope_TP = np.maximum.accumulate(precision_TP[:, ::-1], axis=1)[:, ::-1]
    # Recall rises by 1 / num_truths at each hit and nowhere else.
    return np.where(ranked_TP, envelope_TP, 0.0).sum(axis=1) / num_truths


def rank(scores_P: ArrayLike) -> NDArray[np.intp]:
    """Indices (P,) by falling score; equal scores keep their order."""
    return np.argsort(-np.asarray(scores_P, dtype=np.float64), kind="stable")
