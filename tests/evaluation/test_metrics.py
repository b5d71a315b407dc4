"""Figures on records: agreement with the golden records, and every convention on a case computed by hand."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam import masks
from instructsam.evaluation.average_precision import IOU_THRESHOLDS, average_precision, match_predictions
from instructsam.evaluation.metrics import CONVENTIONS, evaluate_records, measure

HEIGHT, WIDTH = 10, 20


def strip(start: int, stop: int) -> masks.RLE:
    """Columns start...stop of one row: areas and overlaps can be read off the numbers."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4, start:stop] = True
    return masks.encode(mask)


EMPTY = masks.empty_rle(HEIGHT, WIDTH)


_numbers = itertools.count()


def record(truths: list, predictions: Sequence = (), scores: list | None = None, **rest: Any) -> dict[str, Any]:
    scores = [0.9 - 0.1 * index for index in range(len(predictions))] if scores is None else scores
    return {
        "id": f"r{next(_numbers)}",
        "height": HEIGHT,
        "width": WIDTH,
        "gt_rles": list(truths),
        "pred_rles": list(predictions),
        "pred_scores": scores,
        **rest,
    }


def overall(*records: dict[str, Any], **settings_: Any) -> dict[str, Any]:
    return evaluate_records(records, **settings_)["overall"]


# ---- the golden records -----------------------------------------------------------------------------------------


def test_golden_figures(golden):
    stored = json.loads((golden / "metrics.json").read_text())
    metrics = evaluate_records([{**one, "id": one["query_id"]} for one in stored["records"]])
    expected = dict(stored["expected"])
    by_count = expected.pop("by_num_objects")
    assert expected and by_count
    for key, value in expected.items():
        assert metrics["overall"][key] == pytest.approx(value, abs=1e-9), key
    for group, figures in by_count.items():
        for key, value in figures.items():
            assert metrics["by_count"][group][key] == pytest.approx(value, abs=1e-9), (group, key)


def test_golden_unions(golden):
    stored = json.loads((golden / "metrics.json").read_text())
    for one in stored["records"]:
        figures = overall({**one, "id": one["query_id"]})
        assert (figures["intersection"], figures["union"]) == (one["inter"], one["union"])
        assert figures["giou"] == pytest.approx(one["iou"], abs=1e-9)


# ---- IoU of unions ----------------------------------------------------------------------------------------------


def test_union_against_union():
    """Two overlapping predictions cover 0...8, the truths 2...10: 6 / 10."""
    figures = overall(record([strip(2, 6), strip(6, 10)], [strip(0, 5), strip(3, 8)]))
    assert (figures["intersection"], figures["union"]) == (6, 10)
    assert figures["giou"] == pytest.approx(0.6, abs=1e-7) and figures["ciou"] == 0.6


def test_empty_on_both_sides_is_right_and_adds_nothing():
    figures = overall(record([]))
    assert figures["giou"] == 1 and figures["ciou"] == 0 and (figures["intersection"], figures["union"]) == (0, 0)
    assert figures["n_acc"] == 1 and figures["t_acc"] is None
    with_target = overall(record([]), record([strip(0, 4)], [strip(0, 2)]))
    assert with_target["ciou"] == 0.5 and with_target["giou"] == 0.75


def test_prediction_on_no_target_adds_its_area_to_the_unions():
    figures = overall(record([], [strip(0, 3), strip(2, 5)]), record([strip(0, 5)], [strip(0, 5)]))
    assert figures["giou"] == 0.5 and figures["ciou"] == 0.5 and figures["union"] == 10
    assert figures["n_acc"] == 0 and figures["t_acc"] == 1


def test_no_prediction_on_a_target_adds_the_target_to_the_unions():
    figures = overall(record([strip(0, 5)]), record([strip(0, 5)], [strip(0, 5)]))
    assert figures["giou"] == 0.5 and figures["ciou"] == 0.5
    assert figures["n_acc"] is None and figures["t_acc"] == 0.5


def test_a_mask_without_pixels_is_an_empty_prediction():
    figures = overall(record([], [EMPTY]))
    assert figures["giou"] == 1 and figures["n_acc"] == 1 and figures["num_kept_instances"] == 1
    assert overall(record([strip(0, 2)], [EMPTY]))["t_acc"] == 0


def test_giou_weighs_instructions_and_ciou_pixels():
    figures = overall(record([strip(0, 20)], [strip(0, 10)]), record([strip(0, 1)], [strip(0, 1)]))
    assert figures["giou"] == 0.75 and figures["ciou"] == pytest.approx(11 / 21)


def test_precision_at_thresholds_includes_the_threshold():
    """IoU 7 / 10, which single precision would round below 0.7."""
    figures = overall(record([strip(0, 10)], [strip(0, 7)]), record([strip(0, 10)], [strip(0, 9)]))
    assert [figures[f"P@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [1, 1, 1, 0.5, 0.5]


def test_ignored_pixels_count_for_neither_side():
    ignored = strip(8, 12)
    figures = overall(record([strip(4, 10)], [strip(6, 14)], ignore_rle=ignored))
    assert (figures["intersection"], figures["union"]) == (2, 6)  # truth 4...8, prediction 6...8 and 12...14
    figures = overall(record([], [strip(9, 11)], ignore_rle=ignored))
    assert figures["n_acc"] == 1 and figures["giou"] == 1


def test_small_predictions_may_count_as_empty():
    records = [record([], [strip(0, 2)]), record([strip(0, 9)], [strip(0, 3)])]
    plain, ruled = overall(*records), overall(*records, min_area=3)
    assert (plain["n_acc"], plain["t_acc"], plain["union"]) == (0, 1, 11)
    assert (ruled["n_acc"], ruled["t_acc"], ruled["union"]) == (1, 1, 9)
    assert ruled["AP50"] == plain["AP50"] and ruled["giou"] == pytest.approx((1 + 3 / 9) / 2, abs=1e-7)


# ---- average precision ------------------------------------------------------------------------------------------


def test_all_point_interpolation():
    """Ranked hit, miss, hit; two of three truths found: (1 + 2/3) / 3."""
    one = record([strip(0, 5), strip(10, 15), strip(17, 20)], [strip(0, 5), strip(6, 9), strip(10, 15)])
    assert overall(one)["AP50"] == pytest.approx((1 + 2 / 3) / 3)
    # Ranked miss, hit, hit: precision 0, 1/2, 2/3 is raised to 2/3 everywhere.
    one["pred_scores"] = [0.5, 0.9, 0.4]
    assert overall(one)["AP50"] == pytest.approx(2 * (2 / 3) / 3)


def test_a_threshold_is_reached_by_an_iou_that_equals_it():
    """IoU 3 / 5: a hit at 0.50, 0.55 and 0.60."""
    figures = overall(record([strip(0, 5)], [strip(0, 3)]))
    assert [figures[f"AP@{t:.2f}"] for t in IOU_THRESHOLDS] == [1] * 3 + [0] * 7
    assert figures["mAP"] == pytest.approx(0.3) and figures["AP50"] == 1 and figures["AP75"] == 0
    for numerator, threshold in zip(range(10, 20), IOU_THRESHOLDS, strict=True):
        assert match_predictions(np.array([[numerator / 20]]), [1.0])[threshold == IOU_THRESHOLDS].all()


def test_two_predictions_for_one_truth():
    """The second is a false positive even if it fits better."""
    figures = overall(record([strip(0, 10), strip(15, 20)], [strip(0, 8), strip(0, 10)]))
    assert figures["AP50"] == 0.5 and figures["AP@0.85"] == pytest.approx(0.25)


def test_a_prediction_takes_the_best_unused_truth():
    """Both overlap the first truth most; the second prediction falls back on the other."""
    ious = np.array([[0.9, 0.6], [0.8, 0.7]])
    hits = match_predictions(ious, [0.9, 0.8])
    assert hits[IOU_THRESHOLDS <= 0.7].all()
    assert hits[IOU_THRESHOLDS > 0.7].tolist() == [[True, False]] * 4 + [[False, False]]
    # At 0.75 the first still takes truth 0, at 0.95 it takes nothing and leaves truth 0 free.
    ious = np.array([[0.9, 0.0], [0.96, 0.0]])
    assert match_predictions(ious, [0.9, 0.8])[-1].tolist() == [False, True]


def test_predictions_are_ranked_over_all_instructions():
    """The miss of another instruction is ranked first: precision 0, 1/2."""
    right = record([strip(0, 5)], [strip(0, 5)], [0.6])
    wrong = record([strip(0, 5)], [strip(10, 15)], [0.7])
    assert overall(right, wrong)["AP50"] == 0.25
    wrong["pred_scores"] = [0.5]
    assert overall(right, wrong)["AP50"] == 0.5


def test_a_prediction_hits_its_own_instruction_only():
    assert overall(record([strip(0, 5)]), record([], [strip(0, 5)]))["AP50"] == 0


def test_predictions_on_no_target_instructions_are_false_positives():
    right = record([strip(0, 5)], [strip(0, 5)], [0.6])
    assert overall(right, record([]))["AP50"] == 1
    assert overall(right, record([], [strip(0, 5)], [0.7]))["AP50"] == 0.5


def test_equal_scores_are_ranked_in_the_order_listed():
    right, wrong = record([strip(0, 5)], [strip(0, 5)], [0.6]), record([], [strip(0, 5)], [0.6])
    assert overall(right, wrong)["AP50"] == 1
    assert overall(wrong, right)["AP50"] == 0.5
    # Within an instruction the first listed takes the truth.
    hits = match_predictions(np.array([[0.6], [0.9]]), [0.5, 0.5])
    assert hits[0].tolist() == [True, False] and hits[-2].tolist() == [False, True]


def test_nothing_found_and_nothing_to_find():
    assert overall(record([strip(0, 5)]))["mAP"] == 0
    assert overall(record([], [strip(0, 5)]))["mAP"] == 0
    assert average_precision(np.zeros((10, 0), bool), [], 3).tolist() == [0] * 10


def naive_average_precision(pool: list[tuple[float, int, int]], ious: list[np.ndarray], threshold: float) -> float:
    """Straight from the words: one pooled list, ranked, matched one after another."""
    ranked = sorted(pool, key=lambda entry: -entry[0])
    used: set[tuple[int, int]] = set()
    flags = []
    for _, which, row in ranked:
        free = [g for g in range(ious[which].shape[1]) if (which, g) not in used]
        best = max(free, key=lambda g: ious[which][row, g], default=-1)
        hit = best >= 0 and ious[which][row, best] >= threshold
        if hit:
            used.add((which, best))
        flags.append(hit)
    total = sum(matrix.shape[1] for matrix in ious)
    precisions = [sum(flags[: k + 1]) / (k + 1) for k in range(len(flags))]
    return sum(max(precisions[k:]) for k, flag in enumerate(flags) if flag) / total if total else 0.0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_average_precision_equals_the_naive_one(data):
    level = st.integers(0, 20).map(lambda k: k / 20)  # lies on the thresholds, and ties are frequent
    ious, scores = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        ious.append(np.array(data.draw(st.lists(level, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))))
        ious[-1] = ious[-1].reshape(shape)
        scores.append(data.draw(st.lists(level, min_size=shape[0], max_size=shape[0])))
    hits = np.concatenate([match_predictions(*pair) for pair in zip(ious, scores, strict=True)], axis=1)
    ap = average_precision(hits, np.concatenate(scores), sum(matrix.shape[1] for matrix in ious))
    pool = [(score, which, row) for which, listed in enumerate(scores) for row, score in enumerate(listed)]
    assert ap == pytest.approx([naive_average_precision(pool, ious, t) for t in IOU_THRESHOLDS], abs=1e-12)


# ---- duplicates, counts, phrases --------------------------------------------------------------------------------


def test_duplicates_are_the_lower_of_overlapping_predictions():
    """IoU 8/10 with the first: a duplicate; 7/10 is not more than 0.7."""
    truth = [strip(0, 10)]
    assert overall(record(truth, [strip(0, 10), strip(0, 8)]))["duplicate_rate"] == 0.5
    assert overall(record(truth, [strip(0, 10), strip(0, 7)]))["duplicate_rate"] == 0
    assert overall(record(truth, [strip(0, 10)] * 3, [0.5, 0.5, 0.5]))["duplicate_rate"] == pytest.approx(2 / 3)
    assert overall(record(truth))["duplicate_rate"] is None


def test_a_duplicate_of_a_duplicate_counts():
    """The third overlaps the second (9/11) but hardly the first (8/12)."""
    chain = [strip(0, 10), strip(1, 11), strip(2, 12)]
    assert overall(record([strip(0, 10)], chain, [0.9, 0.8, 0.7]))["duplicate_rate"] == pytest.approx(2 / 3)
    assert overall(record([strip(0, 10)], chain, [0.7, 0.9, 0.8]))["duplicate_rate"] == pytest.approx(2 / 3)
    assert overall(record([strip(0, 10)], chain[::2]))["duplicate_rate"] == 0


def test_duplicates_are_of_one_phrase():
    one = record([strip(0, 10)], [strip(0, 10)] * 3, pred_phrase_ids=[0, 1, 0])
    assert overall(one)["duplicate_rate"] == pytest.approx(1 / 3)


def test_rates_are_over_predictions_and_errors_over_instructions():
    two = record([strip(0, 5)], [strip(0, 5), strip(0, 5), strip(8, 9)])
    none = record([strip(0, 5), strip(6, 8), strip(9, 11)])
    figures = overall(two, none, record([]))
    assert figures["duplicate_rate"] == pytest.approx(1 / 3)
    assert figures["count_error"] == pytest.approx((2 + 3 + 0) / 3)
    assert (figures["num_samples"], figures["num_gt_instances"], figures["num_pred_instances"]) == (3, 4, 3)


def test_exact_phrases():
    def with_phrases(written, due):
        return record([], pred_phrases=written, gt_phrases=due)

    figures = overall(
        with_phrases(["a", "b"], ["a", "b"]),
        with_phrases(["b", "a"], ["a", "b"]),
        with_phrases([], []),
        with_phrases(["a"], []),
        record([]),
    )
    assert figures["phrase_accuracy"] == 0.5
    assert overall(record([]))["phrase_accuracy"] is None


def test_the_threshold_leaves_average_precision_alone():
    """Kept: score > threshold, the threshold itself is not."""
    one = record([strip(0, 5), strip(10, 15)], [strip(0, 5), strip(10, 15), strip(0, 5)], [0.9, 0.3, 0.1])
    figures = overall(one, score_threshold=0.3)
    assert figures["AP50"] == 1 == overall(one)["AP50"]
    assert figures["num_pred_instances"] == 3 and figures["num_kept_instances"] == 1
    assert figures["ciou"] == 0.5 and figures["count_error"] == 1 and figures["duplicate_rate"] == 0
    assert overall(one)["duplicate_rate"] == pytest.approx(1 / 3)
    assert overall(one, score_threshold=0.2)["duplicate_rate"] == 0  # the duplicate itself is not kept


# ---- groups -----------------------------------------------------------------------------------------------------


def test_measured_records_bring_their_rules():
    records = [record([strip(0, 10)], [strip(0, 10), strip(5, 9)], [0.9, 0.4]), record([], [strip(0, 4)], [0.7])]
    measured = measure(records, score_threshold=0.5, min_area=5)
    figures = evaluate_records(measured)
    assert figures == evaluate_records(records, score_threshold=0.5, min_area=5)
    rules = figures["conventions"]
    assert (rules["score_threshold"], rules["min_area"]) == (0.5, 5)
    assert figures["overall"]["n_acc"] == 1 != evaluate_records(measured.at(0.5))["overall"]["n_acc"]
    assert measured[:1].score_threshold == 0.5 and measured.at(None).score_threshold is None


def test_groups_hold_their_own_records_only():
    records = [
        record([], kind="none"),
        record([strip(0, 5)], [strip(0, 5)], kind="colour"),
        record([strip(0, 5)], [strip(8, 9)], kind="colour"),
        record([strip(0, 5), strip(6, 9)], [strip(0, 5)], kind="count"),
        record([strip(0, 1), strip(6, 9), strip(12, 19)], kind=""),
    ]
    metrics = evaluate_records(records)
    assert list(metrics["by_kind"]) == ["colour", "count", "none"]
    for kind in metrics["by_kind"]:
        assert metrics["by_kind"][kind] == overall(*[one for one in records if one["kind"] == kind])
    assert list(metrics["by_count"]) == ["0", "1", ">=2"]
    for group, members in {"0": records[:1], "1": records[1:3], ">=2": records[3:]}.items():
        assert metrics["by_count"][group] == overall(*members)
    assert list(evaluate_records(records[:1])["by_count"]) == ["0"]


def test_result_names_its_conventions_and_can_be_written_as_json():
    metrics = evaluate_records([record([], kind="none")], score_threshold=0.25, min_area=50)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    conventions = metrics["conventions"]
    assert conventions["score_threshold"] == 0.25 and conventions["min_area"] == 50
    assert set(CONVENTIONS) < set(conventions)
    for figure in ("giou", "ciou", "AP", "mAP", "P@t", "n_acc", "t_acc", "duplicate_rate", "count_error"):
        assert conventions[figure]


# ---- malformed records ------------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    base = {"id": "q7", "height": HEIGHT, "width": WIDTH}
    base |= {"gt_rles": [strip(0, 5)], "pred_rles": [strip(0, 5), EMPTY], "pred_scores": [0.5, 0.4]}
    return {key: value for key, value in (base | changes).items() if value is not changed}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "record at index 1: expected a dict, got NoneType"),
        (changed(id=changed), "record at index 1: has no id"),
        (changed(id=None), "record None: id must be a string"),
        (changed(pred_scores=changed, width=changed), "record 'q7': has no width, pred_scores"),
        (changed(height=0), "record 'q7': height must be a positive integer, got 0"),
        (changed(width=20.0), "record 'q7': width must be a positive integer"),
        (changed(pred_scores=[0.5]), "record 'q7': has 2 pred_rles, but 1 pred_scores"),
        (changed(pred_scores=[0.5, float("nan")]), r"record 'q7': pred_scores\[1\] is nan"),
        (changed(pred_scores=[float("-inf"), 0.5]), r"record 'q7': pred_scores\[0\] is -inf"),
        (changed(pred_scores=["0.5", 0.4]), r"record 'q7': pred_scores\[0\] is '0.5'"),
        (changed(pred_scores=None), "record 'q7': pred_scores must be a list, got NoneType"),
        (changed(pred_rles=strip(0, 5)), "record 'q7': pred_rles must be a list, got dict"),
        (changed(gt_rles=[masks.empty_rle(20, 10)]), r"record 'q7': gt_rles\[0\]: size .*\[20, 10\].*\[10, 20\]"),
        (
            changed(pred_rles=[EMPTY, {"size": [HEIGHT, WIDTH], "counts": [7]}]),
            r"record 'q7': pred_rles\[1\]: .*sum to 7",
        ),
        (changed(ignore_rle={"size": [HEIGHT, WIDTH]}), "record 'q7': ignore_rle: has no counts"),
        (changed(pred_boxes=[[0, 0, 1, 1]]), "record 'q7': has 2 pred_rles, but 1 pred_boxes"),
        (changed(pred_phrase_ids=[0]), "record 'q7': has 2 pred_rles, but 1 pred_phrase_ids"),
        (changed(pred_phrase_ids=[0, 1], pred_phrases=["a"]), r"record 'q7': pred_phrase_ids\[1\] is 1"),
        (changed(pred_phrase_ids=[-1, 0]), r"record 'q7': pred_phrase_ids\[0\] is -1"),
        (changed(pred_phrases=["a", None]), "record 'q7': pred_phrases must be a list of strings"),
        (changed(gt_phrases="ab"), "record 'q7': gt_phrases must be a list, got str"),
        (changed(kind=3), "record 'q7': kind must be a string"),
    ],
)
def test_malformed_records_are_named(bad, reason):
    with pytest.raises(ValueError, match="^" + reason):
        evaluate_records([record([]), bad])


def test_every_instruction_is_scored_once():
    with pytest.raises(ValueError, match="^record 'q7': occurs twice"):
        evaluate_records([changed(), record([]), changed()])
    with pytest.raises(ValueError, match="no records"):
        evaluate_records([])


def test_records_are_left_alone():
    one = changed(pred_phrase_ids=[0, 0], pred_phrases=["a"], gt_phrases=["a"], kind="k")
    before = json.dumps(one)
    evaluate_records(iter([one]))
    assert json.dumps(one) == before


def test_thousands_of_records_take_seconds():
    """A generous bound: about one second of processor time is usual."""
    pair = [strip(0, 5), strip(8, 12)]
    records = [record(pair, [*pair, strip(1, 5)], kind=str(index % 5)) for index in range(3000)]
    start = time.process_time()
    assert evaluate_records(records)["overall"]["num_samples"] == 3000
    assert time.process_time() - start < 10
