"""Two runs on the same instructions: paired differences with intervals, and the instructions that changed most.

Everything is B minus A. Differences are resampled in pairs (both runs see the same draw of images), so that what makes
an image hard for both cancels out. Masks are read once for each run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from instructsam.evaluation import bootstrap
from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.metrics import summarise
from instructsam.evaluation.streaming import read_records

FLIPS = 10_000
_EXACT_CLUSTERS = 13  # up to 2^13 sign flips are all tried
_NAMED = 5  # ids that a message lists
RULES = ("name", "split", "threshold", "inclusive", "min_area")


@dataclass(frozen=True)
class Run:
    """Records of one evaluation and, where metrics.json lies beside them, its rules."""

    path: Path
    records: list[dict[str, Any]]
    benchmark: dict[str, Any]
    score_threshold: float | None
    min_area: int


def load_run(path: str | Path) -> Run:
    """Read a run from its metrics.json or its predictions.jsonl; the other is looked for beside it.

    Raises:
        ValueError: naming the file: no such file, no predictions, no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file (give a metrics.json or a predictions.jsonl)")
    is_predictions = path.suffix == ".jsonl"
    predictions = path if is_predictions else path.with_name("predictions.jsonl")
    if not predictions.is_file():
        raise ValueError(f"{path}: no predictions.jsonl beside it, and without records there is nothing to compare")
    metrics_path = path.with_name("metrics.json") if is_predictions else path
    metrics: Any = {}
    if metrics_path.is_file():
        try:
            metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{metrics_path}: not JSON: {error}") from None
        if not isinstance(metrics, dict):
            raise ValueError(f"{metrics_path}: expected the figures of an evaluation, got {type(metrics).__name__}")
    rules = metrics.get("conventions") or {}
    return Run(
        path=path,
        records=read_records(predictions),
        benchmark=metrics.get("benchmark") or {},
        score_threshold=rules.get("score_threshold"),
        min_area=rules.get("min_area") or 0,
    )


def compare_runs(
    a: Run,
    b: Run,
    figures: Sequence[str] | None = None,
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    changed: int = 10,
) -> dict[str, Any]:
    """Compare two runs.

    Args:
        figures: keys of `summarise`; None for the benchmark's headline figures, or the usual ones.
        changed: how many of the instructions that got worse, and better, are listed at most.

    Returns:
        ``num_samples``, ``num_images`` (clusters), ``figures`` (figure -> a, b, difference, low, high), ``iou`` (mean
        difference, numbers of better, worse and equal instructions, p-values), ``worse`` and ``better`` (id, IoU of
        both, change, instruction; the greatest change first), ``conventions``.

    Raises:
        ValueError: for different instructions, ground truths, benchmarks, splits or thresholds, or malformed records.
    """
    check_rules(a, b)
    if figures is None:
        headline = [figure for figure in a.benchmark.get("headline") or () if bootstrap.is_known(figure)]
        figures = headline or bootstrap.FIGURES
    measured_a = measure(a.records, a.score_threshold, a.min_area)
    measured_b = measure(aligned_records(a, b), b.score_threshold, b.min_area)
    cluster_R = bootstrap.clusters_of(measured_a)
    drawn_a, drawn_b = bootstrap.resample([measured_a, measured_b], figures, resamples=resamples, seed=seed)
    rows: dict[str, Any] = {}
    overall_a, overall_b = summarise(measured_a), summarise(measured_b)
    for figure in figures:
        value_a, value_b = overall_a[figure], overall_b[figure]
        interval = bootstrap.percentile_interval(drawn_b[figure] - drawn_a[figure], level)
        known = value_a is not None and value_b is not None and interval is not None
        low, high = interval if known and interval else (None, None)
        difference = value_b - value_a if value_a is not None and value_b is not None else None
        rows[figure] = {"a": value_a, "b": value_b, "difference": difference, "low": low, "high": high}
    difference_R = measured_b.iou_R - measured_a.iou_R
    better, worse = int((difference_R > 0).sum()), int((difference_R < 0).sum())
    return {
        "a": str(a.path),
        "b": str(b.path),
        "num_samples": len(measured_a),
        "num_images": int(cluster_R.max()) + 1,
        "figures": rows,
        "iou": {
            "mean_difference": float(difference_R.mean()),
            "better": better,
            "worse": worse,
            "equal": len(difference_R) - better - worse,
            "p_sign_flip": sign_flip_p(np.asarray(np.bincount(cluster_R, weights=difference_R), np.float64), seed),
            "p_sign": float(binomtest(better, better + worse).pvalue) if better + worse else 1.0,
        },
        "worse": _most(a.records, measured_a, measured_b, difference_R, changed),
        "better": _most(a.records, measured_a, measured_b, -difference_R, changed),
        "conventions": {
            "difference": "B - A",
            "interval": bootstrap.conventions(resamples, seed, level) + "; both runs see the same draws",
            "p_sign_flip": "two-sided permutation test: signs of the images' summed IoU differences are flipped, "
            f"{FLIPS} times at random or in all ways up to {_EXACT_CLUSTERS} images",
            "p_sign": "two-sided sign test (binomial) over the instructions whose IoU changed",
            "score_threshold": a.score_threshold,
            "min_area": a.min_area,
        },
    }


def sign_flip_p(difference_C: NDArray[np.float64], seed: int = 0, flips: int = FLIPS) -> float:
    """Two-sided p-value of paired differences under random signs; exact for few, with +1 in both counts otherwise."""
    difference_C = difference_C[difference_C != 0]
    if not len(difference_C):
        return 1.0
    # Sums that are equal but for rounding count as reached.
    least = abs(difference_C.sum()) * (1 - 1e-9) - 1e-12
    if len(difference_C) <= _EXACT_CLUSTERS:
        ways = np.arange(2 ** len(difference_C))
        signs = 1.0 - 2.0 * (ways[:, None] >> np.arange(len(difference_C)) & 1)
        return float((np.abs(signs @ difference_C) >= least).mean())
    rng, reached = np.random.default_rng(seed), 0
    for first in range(0, flips, 100):
        size = min(100, flips - first)
        signs = rng.integers(0, 2, (size, len(difference_C)), dtype=np.int8) * 2.0 - 1.0
        reached += int((np.abs(signs @ difference_C) >= least).sum())
    return (1 + reached) / (1 + flips)


def _most(
    records: Sequence[Mapping[str, Any]],
    a: Measurements,
    b: Measurements,
    falling_R: NDArray[np.float64],
    limit: int,
) -> list[dict[str, Any]]:
    """The records with the most negative values, at most ``limit`` of them."""
    order = np.argsort(falling_R, kind="stable")[:limit]
    return [
        {
            "id": records[index]["id"],
            "iou_a": float(a.iou_R[index]),
            "iou_b": float(b.iou_R[index]),
            "change": float(b.iou_R[index] - a.iou_R[index]),
            "instruction": records[index].get("text") or records[index].get("instruction") or "",
        }
        for index in order.tolist()
        if falling_R[index] < 0
    ]


# ---- what may be compared ---------------------------------------------------------------------------------------


def check_rules(a: Run, b: Run) -> None:
    """ValueError, naming what differs, for runs evaluated by different rules."""
    differing = [
        f"{rule} {a.benchmark[rule]!r} and {b.benchmark[rule]!r}"
        for rule in RULES
        if rule in a.benchmark and rule in b.benchmark and a.benchmark[rule] != b.benchmark[rule]
    ]
    if a.score_threshold != b.score_threshold:
        differing.append(f"score_threshold {a.score_threshold} and {b.score_threshold}")
    if a.min_area != b.min_area:
        differing.append(f"min_area {a.min_area} and {b.min_area}")
    if differing:
        raise ValueError(f"{a.path} and {b.path} were evaluated by different rules: {', '.join(differing)}")


def aligned_records(a: Run, b: Run) -> list[dict[str, Any]]:
    """B's records in A's order (which decides between equal scores), if they are about the same instructions."""
    ids_a, by_id = [record.get("id") for record in a.records], {record.get("id"): record for record in b.records}
    if len(by_id) < len(b.records) or len(set(ids_a)) < len(ids_a):
        double = a if len(set(ids_a)) < len(ids_a) else b
        measure(double.records)  # names the id
    missing = {b.path: [own for own in ids_a if own not in by_id], a.path: [o for o in by_id if o not in set(ids_a)]}
    if found := [f"{path} lacks {_listed(ids)}" for path, ids in missing.items() if ids]:
        raise ValueError(f"the runs are not on the same instructions: {'; '.join(found)}")
    for record in a.records:
        other = by_id[record["id"]]
        for key in ("height", "width", "gt_rles", "ignore_rle"):
            if record.get(key) != other.get(key):
                raise ValueError(f"record {record['id']!r}: {key} differs between {a.path} and {b.path}")
    return [by_id[own] for own in ids_a]


def _listed(ids: Sequence[Any]) -> str:
    rest = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(repr(own) for own in ids[:_NAMED]) + rest
