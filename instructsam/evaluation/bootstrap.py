"""How far figures would move with other instructions: bootstrap confidence intervals (DESIGN section 10).

Instructions are drawn with replacement, as many as there are; those about one image come and go together, since a
model that fails on an image fails on several of them. An interval holds the middle 95 % of the figures of 1,000 such
draws (percentile bootstrap). Masks are not looked at again: ratios come from sums, AP from the lists of hits.

Shapes: B resamples, R records, C clusters (images), P predictions in the order of the pooled ranking, T thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam.evaluation import concept_f1
from instructsam.evaluation.average_precision import IOU_THRESHOLDS, rank
from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.metrics import PRECISION_THRESHOLDS, single_precision

FIGURES = ("mAP", "AP50", "AP75", "giou", "ciou", "n_acc", "t_acc")
RESAMPLES = 1000
_AP = {"AP50": (0,), "AP75": (5,), "mAP": tuple(range(len(IOU_THRESHOLDS)))}
_AP |= {f"AP@{threshold:.2f}": (row,) for row, threshold in enumerate(IOU_THRESHOLDS)}
_CONCEPT = ("cgf1", "pmf1", "il_mcc")
_RATIOS = ("giou", "ciou", *(f"P@{threshold}" for threshold in PRECISION_THRESHOLDS), "n_acc", "no_target_accuracy")
_RATIOS += ("t_acc", "duplicate_rate", "count_error", "phrase_accuracy")
_BLOCK = 64  # resamples drawn at once


def intervals(
    records: Measurements | Iterable[Mapping[str, Any]],
    figures: Sequence[str] = FIGURES,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    by_image: bool = True,
    score_threshold: float | None = None,
    min_area: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals of figures.

    Args:
        records: records, measured here with ``score_threshold`` and ``min_area``, or what `measure` returned.
        figures: keys of `summarise`.
        by_image: draw images with all their instructions, where the records name images, not single instructions.

    Returns:
        figure -> (low, high), or None where there is nothing to measure. Resamples in which a figure has nothing to
        measure (all no-target instructions left out, say) are not counted.

    Raises:
        ValueError: for an unknown figure, numbers out of range, or malformed records.
    """
    measured = records if isinstance(records, Measurements) else measure(records, score_threshold, min_area)
    drawn = resample([measured], figures, resamples=resamples, seed=seed, by_image=by_image)[0]
    return {figure: percentile_interval(values_B, level) for figure, values_B in drawn.items()}


def is_known(figure: str) -> bool:
    """Whether a figure can be resampled."""
    return figure in _AP or figure in _CONCEPT or figure in _RATIOS


def conventions(resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95, by_image: bool = True) -> str:
    """In words how intervals were computed, to stand beside them."""
    unit = "images with all their instructions" if by_image else "instructions"
    return (
        f"percentile bootstrap, {level:.0%} of {resamples} resamples of {unit}, drawn with replacement, seed {seed}; "
        "predictions of equal score keep their order"
    )


def percentile_interval(values_B: NDArray[np.float64], level: float) -> tuple[float, float] | None:
    """The middle ``level`` of resampled values, NaN left out; None where nothing is left."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    values_B = values_B[~np.isnan(values_B)]
    if not len(values_B):
        return None
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clusters_of(measured: Measurements, by_image: bool = True) -> NDArray[np.int64]:
    """(R,) number of the cluster that each record belongs to: its image, or itself where it names none."""
    numbers: dict[Any, int] = {}
    keys = [
        ("image", image) if by_image and image is not None else ("id", own)
        for image, own in zip(measured.images.tolist(), measured.ids.tolist(), strict=True)
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def resample(
    runs: Sequence[Measurements],
    figures: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    by_image: bool = True,
) -> list[dict[str, NDArray[np.float64]]]:
    """Figures (B,) of resamples, the same draws for every run.

    Args:
        runs: measured records of one or several runs, on the same instructions in the same order.

    Returns:
        Of each run, figure -> values, NaN where a resample has nothing to measure.

    Raises:
        ValueError: for an unknown figure or fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"at least one resample is needed, got {resamples}")
    if unknown := [figure for figure in figures if not is_known(figure)]:
        known = ", ".join((*_AP, *_CONCEPT, *_RATIOS))
        raise ValueError(f"no figure to resample is called {unknown[0]!r}; there are {known}")
    for run in runs:
        assert run.ids.tolist() == runs[0].ids.tolist(), "runs to be resampled together hold the same instructions"
    cluster_R = clusters_of(runs[0], by_image)
    num_clusters = int(cluster_R.max()) + 1
    computers = [_Resampled(run, figures, cluster_R, num_clusters) for run in runs]
    rng = np.random.default_rng(seed)
    found: list[dict[str, list[NDArray[np.float64]]]] = [{figure: [] for figure in figures} for _ in runs]
    for first in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - first)
        draws = [np.bincount(rng.integers(0, num_clusters, num_clusters), minlength=num_clusters) for _ in range(size)]
        weight_BC = np.stack(draws)
        for computer, lists in zip(computers, found, strict=True):
            for figure, values_B in computer.figures(weight_BC).items():
                lists[figure].append(values_B)
    return [{figure: np.concatenate(parts) for figure, parts in lists.items()} for lists in found]


def _ratio(measured: Measurements, figure: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """(R,) numerators and denominators whose sums' quotient is a figure."""
    ones_R, has_target_R, iou_R = np.ones(len(measured)), measured.num_truths_R > 0, measured.iou_R
    if figure == "giou":
        return single_precision(iou_R), ones_R
    if figure == "ciou":
        return measured.intersection_R, measured.union_R
    if figure in (named := {f"P@{threshold}": threshold for threshold in PRECISION_THRESHOLDS}):
        return iou_R >= named[figure], ones_R
    if figure in ("n_acc", "no_target_accuracy"):
        return measured.is_empty_R & ~has_target_R, ~has_target_R
    if figure == "t_acc":
        return ~measured.is_empty_R & has_target_R, has_target_R
    if figure == "duplicate_rate":
        return measured.num_duplicates_R, measured.num_kept_R
    if figure == "count_error":
        return np.abs(measured.num_kept_R - measured.num_truths_R), ones_R
    assert figure == "phrase_accuracy", figure
    return measured.match_R == 1, measured.match_R >= 0


class _Resampled:
    """Figures of one run under weights of its clusters."""

    def __init__(
        self, measured: Measurements, figures: Sequence[str], cluster_R: NDArray[np.int64], num_clusters: int
    ) -> None:
        def by_cluster(column_R: NDArray[Any]) -> NDArray[np.float64]:
            return np.asarray(np.bincount(cluster_R, weights=column_R, minlength=num_clusters), dtype=np.float64)

        self.order = tuple(figures)
        ratios = [figure for figure in figures if figure not in _AP and figure not in _CONCEPT]
        sums = {figure: tuple(map(by_cluster, _ratio(measured, figure))) for figure in ratios}
        self.ratios = {figure: np.stack(pair, axis=1) for figure, pair in sums.items()}  # (C, 2)
        self.concept_CK = np.stack([by_cluster(column) for column in measured.concept_R.T], axis=1)
        self.ap = {figure: _AP[figure] for figure in figures if figure in _AP}
        order_P = rank(measured.scores_P)
        self.cluster_P = np.repeat(cluster_R, np.diff(measured.starts))[order_P]
        rows = sorted({row for rows in self.ap.values() for row in rows})
        self.hits = {row: np.flatnonzero(measured.hits_TP[row][order_P]) for row in rows}
        self.truths_C = by_cluster(measured.num_truths_R)

    def figures(self, weight_BC: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        weight = weight_BC.astype(np.float64)
        values: dict[str, NDArray[np.float64]] = {}
        for figure, pair_C2 in self.ratios.items():
            above_B, below_B = (weight @ pair_C2).T
            values[figure] = np.where(below_B > 0, above_B / np.where(below_B > 0, below_B, 1.0), np.nan)
        if any(figure in _CONCEPT for figure in self.order):
            pmf1_BT, mcc_B, cgf1_BT = concept_f1.from_sums(weight @ self.concept_CK)
            values.update(pmf1=pmf1_BT.mean(axis=-1), il_mcc=mcc_B, cgf1=cgf1_BT.mean(axis=-1))
        if self.ap:
            ap_rows = [self._average_precision(weight_C) for weight_C in weight_BC]
            for figure, rows in self.ap.items():
                values[figure] = np.array([np.mean([ap[row] for row in rows]) for ap in ap_rows], np.float64)
        return {figure: values[figure] for figure in self.order}

    def _average_precision(self, weight_C: NDArray[np.int64]) -> dict[int, float]:
        """AP per threshold with every prediction there as often as its cluster was drawn; copies rank side by side."""
        num_truths = float(weight_C @ self.truths_C)
        weight_P = weight_C[self.cluster_P]
        listed_P = np.cumsum(weight_P)
        found: dict[int, float] = {}
        for row, hits in self.hits.items():
            times = weight_P[hits]
            # At a run of copies, precision is highest at the last; between hits it only falls.
            precision = np.cumsum(times) / np.maximum(listed_P[hits], 1)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            found[row] = float(times @ envelope) / num_truths if num_truths else np.nan
        return found
