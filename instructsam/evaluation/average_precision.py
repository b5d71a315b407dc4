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
    order = rank(scores_P)
    hits_TP = np.zeros((np.size(thresholds_T), len(order)), dtype=np.bool_)
    hits_TP[:, order] = match_ranked(ious_PG[None, order], thresholds_T)[0]
    return hits_TP


def match_ranked(ious_RPG: NDArray[np.float64], thresholds_T: ArrayLike = IOU_THRESHOLDS) -> NDArray[np.bool_]:
    """Hits (R, T, P) of R instructions with equally many predictions, each in the order of its ranking, and truths."""
    thresholds = np.asarray(thresholds_T, dtype=np.float64)
    num_records, num_predictions, num_truths = ious_RPG.shape
    hits_RTP = np.zeros((num_records, len(thresholds), num_predictions), dtype=np.bool_)
    if num_truths == 0:
        return hits_RTP
    taken_RTG = np.zeros((num_records, len(thresholds), num_truths), dtype=np.bool_)
    for index in range(num_predictions):
        free_RTG = np.where(taken_RTG, -1.0, ious_RPG[:, None, index])
        best_RT1 = free_RTG.argmax(axis=2)[:, :, None]
        hit_RT = np.take_along_axis(free_RTG, best_RT1, axis=2)[:, :, 0] >= thresholds
        hits_RTP[:, :, index] = hit_RT
        rows_R, rows_T = np.nonzero(hit_RT)
        taken_RTG[rows_R, rows_T, best_RT1[rows_R, rows_T, 0]] = True
    return hits_RTP


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


def average_precision_101(hits_TP: NDArray[np.bool_], scores_P: ArrayLike, num_truths: int) -> NDArray[np.float64]:
    """COCO's interpolation of the same curve: the best precision at a recall or beyond, at recalls 0, 0.01, ..., 1.

    Arguments and result as :func:`average_precision`. Recalls that are not reached count 0.
    """
    if num_truths == 0 or hits_TP.shape[1] == 0:
        return np.zeros(hits_TP.shape[0])
    found_TP = np.cumsum(hits_TP[:, rank(scores_P)], axis=1)
    precision_TP = found_TP / np.arange(1, found_TP.shape[1] + 1)
    envelope_TP = np.maximum.accumulate(precision_TP[:, ::-1], axis=1)[:, ::-1]
    recalls = np.linspace(0, 1, 101)
    ap_T = np.zeros(len(found_TP))
    for row, (found_P, envelope_P) in enumerate(zip(found_TP, envelope_TP, strict=True)):
        first = np.searchsorted(found_P / num_truths, recalls)
        ap_T[row] = np.append(envelope_P, 0.0)[first].mean()
    return ap_T


def rank(scores_P: ArrayLike) -> NDArray[np.intp]:
    """Indices (P,) by falling score; equal scores keep their order."""
    return np.argsort(-np.asarray(scores_P, dtype=np.float64), kind="stable")
