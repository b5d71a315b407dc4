"""What the curves of a report show: precision over recall, calibration of the scores, numbers of instances.

Plain arrays from measured records, no drawing (that is `evaluation.charts`). Like AP, everything here is over all
predictions that the records list, and hits are those of `evaluation.average_precision`.

Shapes: P pooled predictions, R points of recall, B bins of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instructsam.evaluation.average_precision import IOU_THRESHOLDS, rank
from instructsam.evaluation.measure import Measurements

NUM_BINS = 10
MAX_COUNT = 8
"""Instructions with more instances than this share a bar."""
CURVE_THRESHOLDS = {"IoU 0.50": 0.5, "IoU 0.75": 0.75}
MEAN = "mean of IoU 0.50, 0.55, …, 0.95"

CONVENTIONS = {
    "precision-recall curve": "the ranking of AP; precision at a recall is the best at that recall or beyond",
    "calibration": f"all listed predictions in {NUM_BINS} bins of equal width over scores 0…1 (lower edges and 1 "
    "belong to the bin); precision is the share of hits at IoU 0.5, where each true instance is hit once, so that "
    "duplicates miss; ECE is the mean of |precision - mean score| over bins, weighted by their predictions",
}


@dataclass(frozen=True)
class Curve:
    """Interpolated precision (R,) at recalls (R,), both in 0…1."""

    name: str
    recall_R: NDArray[np.float64]
    precision_R: NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Bins of scores: edges (B + 1,), number of predictions, mean score and precision (B,), NaN in empty bins."""

    edges: NDArray[np.float64]
    count_B: NDArray[np.int64]
    score_B: NDArray[np.float64]
    precision_B: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error, in 0…1."""
        weight_B = self.count_B / self.count_B.sum()
        return float(np.nansum(weight_B * np.abs(self.precision_B - self.score_B)))


def precision_recall(measured: Measurements, points: int = 101) -> list[Curve]:
    """Curves at IoU 0.5, at 0.75 and their mean over all ten thresholds; none where there is no true instance.

    The recalls are 0, 1 / (points - 1), ..., 1.
    """
    num_truths = int(measured.num_truths_R.sum())
    if num_truths == 0:
        return []
    ranked_TP = measured.hits_TP[:, rank(measured.scores_P)]
    found_TP = np.cumsum(ranked_TP, axis=1)
    precision_TP = found_TP / np.arange(1, ranked_TP.shape[1] + 1)
    envelope_TP = np.maximum.accumulate(precision_TP[:, ::-1], axis=1)[:, ::-1]
    # Whole numbers of hits, since recalls as fractions would miss a point by rounding. A recall of 0 needs one, too.
    needed_R = np.maximum(-(-np.arange(points) * num_truths // (points - 1)), 1)
    precision_TR = np.zeros((len(IOU_THRESHOLDS), points))
    for row, (found_P, envelope_P) in enumerate(zip(found_TP, envelope_TP, strict=True)):
        first_R = np.searchsorted(found_P, needed_R)
        reached_R = first_R < len(found_P)
        precision_TR[row, reached_R] = envelope_P[first_R[reached_R]]
    recall_R = np.arange(points) / (points - 1)
    curves = [Curve(name, recall_R, precision_TR[_row(value)]) for name, value in CURVE_THRESHOLDS.items()]
    return [*curves, Curve(MEAN, recall_R, precision_TR.mean(axis=0))]


def calibration(measured: Measurements, num_bins: int = NUM_BINS) -> Calibration | None:
    """How far scores are precisions, at IoU 0.5; None where nothing was predicted.

    Raises:
        ValueError: for a score outside 0…1.
    """
    scores_P, hit_P = measured.scores_P, measured.hits_TP[_row(0.5)]
    if not len(scores_P):
        return None
    if len(outside := scores_P[(scores_P < 0) | (scores_P > 1)]):
        raise ValueError(f"score {outside[0]} is outside 0…1, such scores have no calibration")
    edges = np.arange(num_bins + 1) / num_bins
    bin_P = np.digitize(scores_P, edges[1:-1])
    count_B = np.bincount(bin_P, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        score_B = np.bincount(bin_P, weights=scores_P, minlength=num_bins) / count_B
        precision_B = np.bincount(bin_P, weights=hit_P, minlength=num_bins) / count_B
    return Calibration(edges, count_B, score_B, precision_B)


def count_table(measured: Measurements, max_count: int = MAX_COUNT) -> NDArray[np.int64]:
    """Instructions by true (rows) and kept (columns) number of instances; the last row and column hold all larger."""
    table = np.zeros((max_count + 1, max_count + 1), dtype=np.int64)
    np.add.at(table, (np.minimum(measured.num_truths_R, max_count), np.minimum(measured.num_kept_R, max_count)), 1)
    return table


def _row(threshold: float) -> int:
    return int(np.flatnonzero(threshold == IOU_THRESHOLDS)[0])
