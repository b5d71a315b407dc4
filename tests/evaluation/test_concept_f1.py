"""cgF1, pmF1 and IL_MCC on cases computed by hand, and the assignment against one that tries everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import overall, record, strip

from instructsam.evaluation.average_precision import IOU_THRESHOLDS
from instructsam.evaluation.concept_f1 import assigned_hits

EPS = 1e-4


def f1(tp: float, kept: float, truths: float) -> float:
    precision, recall = tp / (kept + EPS), tp / (truths + EPS)
    return 2 * precision * recall / (precision + recall + EPS)


def test_one_unit_right_one_rightly_empty():
    """IoU 8 / 10: a true positive up to 0.80."""
    figures = overall(record([strip(0, 10)], [strip(0, 8)], [0.9]), record([]))
    assert figures["il_mcc"] == 1
    for threshold in IOU_THRESHOLDS:
        expected = f1(float(threshold <= 0.8), 1, 1)
        assert figures[f"pmf1@{threshold:.2f}"] == pytest.approx(expected, abs=1e-12)
        assert figures[f"cgf1@{threshold:.2f}"] == pytest.approx(expected, abs=1e-12)
    assert figures["pmf1"] == figures["cgf1"] == pytest.approx(0.7 * f1(1, 1, 1), abs=1e-12)
    assert figures["pmf1@0.50"] < 1  # epsilon


def test_a_score_of_one_half_is_kept_whatever_the_threshold_of_the_rest():
    at, below = record([strip(0, 5)], [strip(0, 5)], [0.5]), record([strip(0, 5)], [strip(0, 5)], [0.4999])
    assert overall(at, record([]))["pmf1@0.50"] == pytest.approx(f1(1, 1, 1), abs=1e-12)
    assert overall(at, record([]), score_threshold=0.5)["num_kept_instances"] == 0
    assert overall(at, record([]), score_threshold=0.5)["il_mcc"] == 1
    figures = overall(below, record([]))
    assert figures["pmf1@0.50"] == 0 and figures["il_mcc"] == 0


def test_false_positives_come_from_units_with_both_and_misses_from_all():
    units = [
        record([strip(0, 5)], [strip(0, 5), strip(8, 12)], [0.9, 0.8]),  # 1 hit, 1 false positive
        record([], [strip(0, 5), strip(8, 12)], [0.9, 0.8]),  # counts for IL_MCC only
        record([strip(0, 5), strip(8, 12)]),  # 2 misses
        record([]),
    ]
    figures = overall(*units)
    assert figures["pmf1@0.50"] == pytest.approx(f1(1, 2, 3), abs=1e-12)
    assert figures["il_mcc"] == 0  # one unit of each of the four sorts
    figures = overall(*units[:1], *units[1:3], record([]), record([]))
    # 1 rightly found, 1 wrongly, 1 missed, 2 rightly empty: (1*2 - 1*1) / sqrt(2 * 2 * 3 * 3)
    assert figures["il_mcc"] == pytest.approx(1 / 6, abs=1e-12)
    assert figures["cgf1@0.50"] == pytest.approx(f1(1, 2, 3) / 6, abs=1e-12)


def test_where_nothing_can_be_measured():
    only_targets = overall(record([strip(0, 5)], [strip(0, 5)]))
    assert only_targets["il_mcc"] is None and only_targets["cgf1"] is None and only_targets["pmf1"] > 0.99
    no_targets = overall(record([]), record([], [strip(0, 5)]))
    assert no_targets["pmf1"] is None and no_targets["il_mcc"] is None
    constant = overall(record([strip(0, 5)], [strip(0, 5)]), record([], [strip(0, 5)]))
    assert constant["il_mcc"] == 0 and constant["cgf1"] == 0


def test_assignment_is_of_all_at_once():
    """One after another, the first would take the truth that only the second could have had."""
    truths, predictions = [strip(0, 10), strip(10, 20)], [strip(3, 13), strip(0, 9)]
    # IoU of the first: 7/13 and 3/17; of the second: 9/10 and 0.
    figures = overall(record(truths, predictions, [0.9, 0.8]), record([]))
    assert figures["AP50"] == pytest.approx(0.5)  # the first takes truth 0, the second has nothing left
    assert figures["pmf1@0.50"] == pytest.approx(f1(1, 2, 2), abs=1e-12)
    assert figures["pmf1@0.90"] == pytest.approx(f1(1, 2, 2), abs=1e-12)  # truth 0 goes to the second


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 4), st.integers(0, 4), st.data())
def test_assignment_equals_the_best_of_all(num_predictions, num_truths, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    ious = rng.random((3, num_predictions, num_truths)) * (rng.random((3, num_predictions, num_truths)) < 0.6)
    kept = rng.integers(0, num_predictions + 1, 3)
    hits = assigned_hits(ious, kept)
    for unit in range(3):
        k, pairs = min(int(kept[unit]), num_truths), []
        for rows in itertools.permutations(range(int(kept[unit])), k):
            pairs += [list(zip(rows, columns, strict=True)) for columns in itertools.combinations(range(num_truths), k)]
        best = max(pairs, key=lambda pair: math.fsum(ious[unit][p, g] for p, g in pair), default=[])
        found = np.array([ious[unit][p, g] for p, g in best])
        assert hits[unit].tolist() == [int((found >= threshold).sum()) for threshold in IOU_THRESHOLDS]
