"""Our matching and ranking under COCO's interpolation against pycocotools' COCOeval."""

from __future__ import annotations

import numpy as np
import pytest
from test_metrics import EMPTY, HEIGHT, WIDTH, overall, record, strip

from instructsam import masks
from instructsam.evaluation.average_precision import average_precision_101
from instructsam.evaluation.coco_ap import coco_ap
from instructsam.evaluation.measure import measure


def random_records(seed: int, size: int = 120) -> list[dict]:
    """Boxes of a continuous range of IoUs, scores with ties, no-target instructions, more than ten predictions."""
    rng = np.random.default_rng(seed)

    def box(low, high):
        high = np.maximum(high, low + 1)
        return masks.box_to_rle([low[0], low[1], high[0], high[1]], 97, 113)

    records = []
    for index in range(size):
        lows = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        highs = lows + rng.uniform(5, 36, lows.shape)
        predictions = [
            box(np.maximum(low + rng.normal(0, 2, 2), 0), high + rng.normal(0, 2, 2))
            for low, high in zip(lows, highs, strict=True)
            for _ in range(rng.integers(0, 4))
        ]
        predictions += [box(low, low + rng.uniform(5, 30, 2)) for low in rng.uniform(0, 60, (rng.integers(0, 3), 2))]
        scores = rng.integers(0, 40, len(predictions)) / 40
        records.append(
            {
                "id": f"c{index}",
                "height": 97,
                "width": 113,
                "gt_rles": [box(*pair) for pair in zip(lows, highs, strict=True)],
                "pred_rles": predictions,
                "pred_scores": scores.tolist(),
            }
        )
    return records


@pytest.mark.parametrize("seed", range(5))
def test_equals_cocoeval(seed):
    records = random_records(seed)
    measured = measure(records)
    ap_T = average_precision_101(measured.hits_TP, measured.scores_P, int(measured.num_truths_R.sum()))
    theirs = coco_ap(records)
    assert 0.05 < theirs["AP"] < 0.95
    assert theirs["AP"] == pytest.approx(ap_T.mean(), abs=1e-9)
    assert theirs["AP50"] == pytest.approx(ap_T[0], abs=1e-9)
    assert theirs["AP75"] == pytest.approx(ap_T[5], abs=1e-9)


def test_where_the_interpolations_differ():
    """One truth of three found: all-point counts one third of the curve, 101 points 34 of the recalls 0 ... 1."""
    one = record([strip(0, 5), strip(8, 12), strip(15, 19)], [strip(0, 5)])
    assert overall(one)["AP50"] == pytest.approx(1 / 3)
    assert coco_ap([one])["AP50"] == pytest.approx(34 / 101)


def test_only_the_hundred_best_count():
    truth, wrong = strip(0, 5), strip(10, 12)
    one = record([truth], [wrong] * 100 + [truth], [0.9] * 100 + [0.1])
    assert coco_ap([one])["AP50"] == 0
    assert overall(one)["AP50"] == pytest.approx(1 / 101)
    one["pred_rles"], one["pred_scores"] = one["pred_rles"][1:], one["pred_scores"][1:]
    assert coco_ap([one])["AP50"] == pytest.approx(1 / 100)


def test_nothing_to_find_and_nothing_found():
    assert coco_ap([record([], [strip(0, 5)])]) == {"AP": None, "AP50": None, "AP75": None}
    assert coco_ap([record([strip(0, 5)])]) == {"AP": 0, "AP50": 0, "AP75": 0}
    assert coco_ap([record([strip(0, 5)], [EMPTY, strip(0, 5)], [0.9, 0.8])])["AP50"] == pytest.approx(0.5)


def test_bad_records_are_named(capsys):
    with pytest.raises(ValueError, match=r"^record 'x': pred_rles\[1\]: size"):
        coco_ap([record([], [EMPTY, masks.empty_rle(WIDTH, HEIGHT)], id="x")])
    with pytest.raises(ValueError, match="no records"):
        coco_ap([])
    coco_ap([record([strip(0, 5)], [strip(0, 5)])])
    assert capsys.readouterr().out == ""
