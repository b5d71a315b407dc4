"""Figures over thresholds, and the choice of one."""

from __future__ import annotations

import pytest
from test_coco_ap import random_records
from test_metrics import overall, record, strip

from instructsam.evaluation.sweep import best_threshold, sweep


def test_a_sweep_is_an_evaluation_at_each_threshold():
    records = random_records(0, 40)
    thresholds = [0.0, 0.25, 0.5, 0.975]
    rows = sweep(records, thresholds, min_area=50)
    assert len({row["giou"] for row in rows}) == 4
    for row, threshold in zip(rows, thresholds, strict=True):
        expected = overall(*records, score_threshold=threshold, min_area=50)
        assert row == {"threshold": threshold, **expected}


def validation(split: str | None = "val") -> list[dict]:
    """Right at 0.6, wrong at 0.4: thresholds from 0.4 to below 0.6 are best."""
    records = [
        record([strip(0, 5)], [strip(0, 5), strip(8, 12)], [0.6, 0.4]),
        record([], [strip(0, 5)], [0.4]),
    ]
    return [{**one, "split": split} for one in records] if split else records


def test_best_threshold():
    assert best_threshold(validation(), "giou") == (0.4, 1.0)
    assert best_threshold(validation("validation"), "giou", [0.7, 0.5, 0.1]) == (0.5, 1.0)
    assert best_threshold(validation(), "count_error") == (0.4, 0.0)  # the least is best
    assert best_threshold(validation(), "P@0.9", [0.1, 0.7])[0] == 0.7


@pytest.mark.parametrize("split", ["test", "testA", "train", "val2", "", None])
def test_a_threshold_is_chosen_on_validation_data_only(split):
    records = validation(split)
    with pytest.raises(ValueError, match="chosen on val or validation only"):
        best_threshold(records, "giou")
    assert best_threshold(records, "giou", any_split=True) == (0.4, 1.0)


def test_one_record_of_another_split_is_enough():
    records = [*validation(), *validation("test")]
    with pytest.raises(ValueError, match=f"record '{records[2]['id']}' is of split 'test'"):
        best_threshold(records, "giou")


def test_what_cannot_be_swept():
    for figure in ("mAP", "phrase_accuracy"):
        with pytest.raises(ValueError, match=f"'{figure}' is no figure that depends on the threshold"):
            best_threshold(validation(), figure)
    with pytest.raises(ValueError, match="'n_acc' has nothing to measure"):
        best_threshold(validation()[:1], "n_acc")
    with pytest.raises(ValueError, match="thresholds must be finite"):
        sweep(validation(), [])
    with pytest.raises(ValueError, match="thresholds must be finite"):
        sweep(validation(), [0.5, float("nan")])
