"""Curves: hand-computed precision over recall, calibration and counts; and the area under a curve is the AP."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from instructsam import masks
from instructsam.evaluation.curves import MEAN, calibration, count_table, precision_recall
from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.metrics import evaluate_records

_numbers = itertools.count()


def strip(start: int, stop: int, row: int = 1) -> masks.RLE:
    mask = np.zeros((4, 40), bool)
    mask[row, start:stop] = True
    return masks.encode(mask)


def record(truths: list, predictions: list, scores: list[float]) -> dict[str, Any]:
    size = {"id": f"r{next(_numbers)}", "height": 4, "width": 40}
    return {**size, "gt_rles": truths, "pred_rles": predictions, "pred_scores": scores}


def measured(*records: dict[str, Any]) -> Measurements:
    return measure(list(records))


def test_precision_over_recall_by_hand():
    # By falling score: hit, miss (no target), hit (IoU 0.6), miss; four truths, two of them found at IoU 0.5.
    curves = precision_recall(
        measured(
            record([strip(0, 10), strip(20, 30, 2)], [strip(0, 10), strip(0, 6, 3)], [0.9, 0.3]),
            record([], [strip(0, 5)], [0.8]),
            record([strip(0, 10), strip(20, 30)], [strip(0, 6)], [0.7]),
        ),
        points=5,
    )
    assert [curve.name for curve in curves] == ["IoU 0.50", "IoU 0.75", MEAN]
    for curve in curves:
        assert curve.recall_R.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curves[0].precision_R.tolist() == [1, 1, pytest.approx(2 / 3), 0, 0]
    assert curves[1].precision_R.tolist() == [1, 1, 0, 0, 0]
    # IoU 0.6 counts at 0.50, 0.55 and 0.60: three of ten thresholds.
    assert curves[2].precision_R == pytest.approx([1, 1, 0.2, 0, 0])


def test_precision_at_a_recall_is_the_best_from_there_on():
    # Miss, hit, hit: precision 0, 1/2, 2/3.
    found = [strip(30, 35), strip(0, 10), strip(20, 30, 2)]
    curve = precision_recall(measured(record([strip(0, 10), strip(20, 30, 2)], found, [0.9, 0.8, 0.7])), points=3)[0]
    assert curve.precision_R == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def random_records(seed: int, count: int = 30) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        truths = [strip(10 * k, 10 * k + 10, int(rng.integers(4))) for k in range(rng.integers(0, 4))]
        starts = rng.integers(0, 30, size=rng.integers(0, 6))
        found = [strip(int(start), int(start) + int(rng.integers(5, 11)), int(rng.integers(4))) for start in starts]
        found += [truth for truth in truths if rng.random() < 0.6]
        records.append(record(truths, found, (rng.integers(0, 20, size=len(found)) / 20).tolist()))  # many ties
    return records


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_a_curve_at_every_truth_is_the_average_precision(seed: int):
    records = random_records(seed)
    figures = evaluate_records(records)["overall"]
    curves = precision_recall(measure(records), points=figures["num_gt_instances"] + 1)
    areas = [curve.precision_R[1:].mean() for curve in curves]
    assert figures["AP50"] > 0.1
    assert areas == pytest.approx([figures["AP50"], figures["AP75"], figures["mAP"]], abs=1e-12)
    assert all((np.diff(curve.precision_R) <= 0).all() for curve in curves)


def test_curves_of_nothing():
    assert precision_recall(measured(record([], [strip(0, 5)], [0.5]))) == []
    for curve in precision_recall(measured(record([strip(0, 5)], [], []))):
        assert curve.precision_R.tolist() == [0] * 101


def test_calibration_by_hand():
    bins = calibration(
        measured(
            # A duplicate of a hit truth misses; a score on an edge belongs to the bin above, 1 to the last.
            record([strip(0, 10)], [strip(0, 10), strip(0, 10), strip(0, 5)], [1.0, 0.95, 0.3]),
            record([], [strip(0, 10)], [0.39]),
            record([strip(0, 10)], [strip(0, 5)], [0.31]),  # IoU exactly 0.5 hits
        )
    )
    assert bins is not None
    assert bins.edges[:4].tolist() == [0, 0.1, 0.2, 0.3]
    assert bins.count_B.tolist() == [0, 0, 0, 3, 0, 0, 0, 0, 0, 2]
    assert bins.precision_B[[3, 9]] == pytest.approx([1 / 3, 1 / 2])
    assert bins.score_B[[3, 9]] == pytest.approx([1.0 / 3, 0.975])
    assert np.isnan(bins.precision_B[0])
    assert bins.error == pytest.approx((3 * 0 + 2 * 0.475) / 5)


def test_calibration_without_predictions_or_with_scores_that_are_none():
    assert calibration(measured(record([strip(0, 10)], [], []))) is None
    for score in (1.5, -0.1):
        with pytest.raises(ValueError, match=f"score {score} is outside 0…1"):
            calibration(measured(record([], [strip(0, 10)], [score])))


def test_count_table():
    spots = [strip(0, 4, 0), strip(0, 4, 1), strip(0, 4, 2), strip(0, 4, 3)]
    table = count_table(
        measured(
            record([], [], []),
            record(spots[:1], spots[:2], [0.5, 0.6]),
            record(spots[:1], spots[:2], [0.5, 0.6]),
            record(spots, spots[:3], [0.5, 0.6, 0.7]),
        ),
        max_count=3,
    )
    assert table.tolist() == [[1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_kept_instances_follow_the_threshold():
    one = record([strip(0, 10)], [strip(0, 10), strip(20, 30)], [0.9, 0.3])
    assert count_table(measure([one], 0.3))[1].tolist()[:3] == [0, 1, 0]
    bins = calibration(measure([one], 0.3))
    assert bins is not None and bins.count_B.sum() == 2  # like AP, over all that are listed
