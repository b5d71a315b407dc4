"""Intervals: what a resample gives is what evaluating the drawn records gives, and intervals cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from test_coco_ap import random_records
from test_metrics import record, strip

from instructsam.evaluation import bootstrap
from instructsam.evaluation.bootstrap import _Resampled, clusters_of, intervals, resample
from instructsam.evaluation.measure import measure
from instructsam.evaluation.metrics import evaluate_records, summarise

FIGURES = ("mAP", "AP50", "AP@0.90", "giou", "ciou", "P@0.7", "n_acc", "t_acc", "duplicate_rate", "count_error")
FIGURES += ("phrase_accuracy", "cgf1", "pmf1", "il_mcc", "no_target_accuracy", "AP75")


def sample(seed: int = 0, size: int = 60) -> list[dict]:
    """Scores without ties, since copies of a record rank side by side in a resample."""
    rng = np.random.default_rng(seed)
    records = random_records(seed, size)
    for index, one in enumerate(records):
        one["pred_scores"] = rng.random(len(one["pred_rles"])).tolist()
        one |= {"image": f"{index // 3}.jpg", "gt_phrases": ["a"], "pred_phrases": ["a"] * (1 + index % 2)}
    return records


@pytest.mark.parametrize("by_image", [True, False])
def test_a_resample_is_an_evaluation_of_the_drawn_records(by_image):
    records = sample()
    measured = measure(records, 0.4)
    cluster_R = clusters_of(measured, by_image)
    num_clusters = 20 if by_image else 60
    assert cluster_R.max() + 1 == num_clusters
    computer = _Resampled(measured, FIGURES, cluster_R, num_clusters)
    rng = np.random.default_rng(1)
    weight_BC = np.stack([rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters)) for _ in range(5)])
    weight_BC = np.concatenate([np.ones((1, num_clusters), np.int64), weight_BC])
    resampled = computer.figures(weight_BC)
    for row, weight_C in enumerate(weight_BC):
        drawn = [
            {**one, "id": f"{one['id']}/{copy}"}
            for one, cluster in zip(records, cluster_R, strict=True)
            for copy in range(weight_C[cluster])
        ]
        expected = evaluate_records(drawn, score_threshold=0.4)["overall"]
        for figure in FIGURES:
            assert resampled[figure][row] == pytest.approx(expected[figure], abs=1e-12), figure


def test_seed_decides_and_runs_share_draws():
    measured = measure(sample())
    first, again = (resample([measured], FIGURES, resamples=70, seed=3)[0] for _ in range(2))
    other = resample([measured], FIGURES, resamples=70, seed=4)[0]
    assert all((first[figure] == again[figure]).all() and len(first[figure]) == 70 for figure in FIGURES)
    assert (first["giou"] != other["giou"]).any()
    both = resample([measured, measured.at(0.5)], ["giou"], resamples=70, seed=3)
    assert (both[0]["giou"] == first["giou"]).all() and (both[1]["giou"] != first["giou"]).any()


def test_intervals_hold_the_figure_and_grow_with_the_level():
    records = sample(2, 90)
    figures = summarise(measure(records))
    narrow, wide = (intervals(records, FIGURES, resamples=400, level=level) for level in (0.5, 0.95))
    for figure in FIGURES:
        low, high = wide[figure]
        assert low <= figures[figure] <= high, figure
        assert low <= narrow[figure][0] <= narrow[figure][1] <= high
    assert wide["giou"][0] < narrow["giou"][0] < narrow["giou"][1] < wide["giou"][1]


def test_interval_of_a_share_is_that_of_the_binomial():
    """80 of 200 rightly empty: 0.4 ± 1.96 * sqrt(0.4 * 0.6 / 200)."""
    records = [record([], [] if index < 80 else [strip(0, 5)]) for index in range(200)]
    low, high = intervals(records, ["n_acc"], resamples=4000)["n_acc"]
    assert (low, high) == pytest.approx((0.332, 0.468), abs=0.012)


def test_instructions_about_one_image_come_together():
    """100 instructions about 10 images that are right or wrong as a whole: the interval is that of 10 draws."""
    records = [
        record([], [] if index < 50 else [strip(0, 5)], image=f"{index // 10}.jpg", id=index) for index in range(100)
    ]
    together = intervals(records, ["n_acc"])["n_acc"]
    apart = intervals(records, ["n_acc"], by_image=False)["n_acc"]
    assert together[1] - together[0] > 2.5 * (apart[1] - apart[0])
    assert "images" in bootstrap.conventions() and "images" not in bootstrap.conventions(by_image=False)
    nameless = [{key: value for key, value in one.items() if key != "image"} for one in records]
    assert intervals(nameless, ["n_acc"])["n_acc"] == apart


def test_nothing_to_measure_and_bad_settings():
    records = [record([strip(0, 5)], [strip(0, 5)])]
    assert intervals(records, ["n_acc", "il_mcc", "giou"]) == {"n_acc": None, "il_mcc": None, "giou": (1.0, 1.0)}
    assert intervals([record([])], ["AP50", "ciou"]) == {"AP50": None, "ciou": None}
    with pytest.raises(ValueError, match="no figure to resample is called 'gIoU'"):
        intervals(records, ["gIoU"])
    with pytest.raises(ValueError, match="at least one resample"):
        intervals(records, resamples=0)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        intervals(records, level=95)


def test_a_share_that_is_missing_from_some_resamples():
    """One no-target instruction of four: a third of the resamples lack it, the others say 1."""
    records = [record([]), *(record([strip(0, 5)], [strip(0, 5)]) for _ in range(3))]
    assert intervals(records, ["n_acc"], resamples=50)["n_acc"] == (1.0, 1.0)


def test_records_without_phrases_have_no_share_in_their_accuracy():
    records = [record([strip(0, 4)], [strip(0, 4)], id=f"r{number}") for number in range(6)]
    for one in records[::2]:
        one |= {"gt_phrases": ["a"], "pred_phrases": ["a"]}
    assert intervals(records, ["phrase_accuracy"], resamples=20) == {"phrase_accuracy": (1.0, 1.0)}


def test_a_record_that_is_called_like_the_image_of_another_is_drawn_by_itself():
    records = [record([], [], id="a.jpg"), record([], [], id="r", image="a.jpg"), record([], [], id="s", image="a.jpg")]
    assert clusters_of(measure(records)).tolist() == [0, 1, 1]
