"""Figures of an ablation's cells over their seeds, and their differences from the default, paired by seed and image.

Shapes: S seeds that both cells have, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from instructsam.evaluation import bootstrap
from instructsam.evaluation.measure import Measurements
from instructsam.evaluation.metrics import summarise

# Name -> fewest and most true instances of an instruction.
INSTANCE_GROUPS = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), ">=5": (5, None)}

CONVENTIONS = {
    "mean and deviation": "over seeds; the deviation is that of a sample (n - 1), none for a single seed",
    "difference": "cell minus default, mean over the seeds that both have",
    "interval": "percentile bootstrap of the difference: in each resample images (with all their instructions) and "
    "seeds are drawn with replacement, the same for both cells; with one seed it knows of images only, and with few "
    "seeds it is too narrow",
    "p": "two-sided, from the same resamples: twice the smaller share of differences on one side of 0, with +1 in both "
    "counts; no correction for the number of cells",
    "p (t-test)": "paired t-test over seeds, two or more; it knows of seeds only",
}


def spread_of(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """{"mean", "deviation", "n"} of the values that there are."""
    known = np.array([value for value in values if value is not None], np.float64)
    return {
        "mean": float(known.mean()) if len(known) else None,
        "deviation": float(known.std(ddof=1)) if len(known) > 1 else None,
        "n": len(known),
    }


def by_instances(measured: Measurements, figures: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Figure -> group -> value over the instructions with so many true instances; None for an empty group."""
    found: dict[str, dict[str, float | None]] = {figure: {} for figure in figures}
    for name, (least, most) in INSTANCE_GROUPS.items():
        chosen_R = (measured.num_truths_R >= least) & (True if most is None else measured.num_truths_R <= most)
        values = summarise(measured.select(chosen_R)) if chosen_R.any() else {}
        for figure in figures:
            found[figure][name] = values.get(figure)
    return found


def by_kind(measured: Measurements, figure: str) -> dict[str, float | None]:
    """A figure of every kind of instructions that has targets."""
    kinds = sorted(set(measured.kinds[measured.num_truths_R > 0].tolist()) - {""})
    return {kind: summarise(measured.select(measured.kinds == kind))[figure] for kind in kinds}


def paired(
    cell: Mapping[int, Measurements],
    default: Mapping[int, Measurements],
    figures: Sequence[str],
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Differences of a cell from the default.

    Args:
        cell, default: training seed -> measured records, all on the same instructions in the same order.
        figures: keys of `summarise` that can be resampled.
        seed: of the resampling.

    Returns:
        figure -> difference, low, high, p, p_t_test, n (seeds that both have), values (the difference of each); None
        where there is nothing to compare.
    """
    seeds = sorted(set(cell) & set(default))
    if not seeds:
        nothing: dict[str, Any] = {
            "difference": None,
            "low": None,
            "high": None,
            "p": None,
            "p_t_test": None,
            "n": 0,
            "values": [],
        }
        return {figure: dict(nothing) for figure in figures}
    runs = [runs[s] for runs in (cell, default) for s in seeds]
    drawn = bootstrap.resample(runs, figures, resamples=resamples, seed=seed)
    chosen_BS = np.random.default_rng(seed + 1).integers(0, len(seeds), (resamples, len(seeds)))
    overall = [summarise(run) for run in runs]
    found = {}
    for figure in figures:
        values_S = [(one[figure], other[figure]) for one, other in zip(overall, overall[len(seeds) :], strict=False)]
        pairs = [(float(one), float(other)) for one, other in values_S if one is not None and other is not None]
        drawn_S = zip(drawn[: len(seeds)], drawn[len(seeds) :], strict=True)
        difference_SB = np.stack([one[figure] - other[figure] for one, other in drawn_S])
        difference_B = difference_SB[chosen_BS, np.arange(resamples)[:, None]].mean(axis=1)
        found[figure] = _row(pairs, difference_B)
    return found


def _row(pairs: Sequence[tuple[float, float]], difference_B: NDArray[np.float64]) -> dict[str, Any]:
    interval = bootstrap.percentile_interval(difference_B, 0.95)
    values = [one - other for one, other in pairs]
    p_t_test = None
    # Without any spread there is no t; floating point noise is no spread.
    if len(values) > 1 and np.ptp(values) > 1e-12:
        p_t_test = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return {
        "difference": float(np.mean(values)) if values else None,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "p": bootstrap_p(difference_B),
        "p_t_test": p_t_test,
        "n": len(values),
        "values": values,
    }


def bootstrap_p(difference_B: NDArray[np.float64]) -> float | None:
    """Two-sided p-value of resampled differences, see ``CONVENTIONS``; None where nothing was measured."""
    difference_B = difference_B[~np.isnan(difference_B)]
    if not len(difference_B):
        return None
    below, above = int((difference_B <= 0).sum()), int((difference_B >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(difference_B)))
