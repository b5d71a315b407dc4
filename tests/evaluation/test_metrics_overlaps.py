"""The sweep over run ends against arrays of pixels and against pycocotools, and the columns made of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import EMPTY, HEIGHT, WIDTH, overall, record, strip

from instructsam import masks
from instructsam.evaluation import measure as measure_module
from instructsam.evaluation import overlaps as overlaps_module
from instructsam.evaluation.measure import measure
from instructsam.evaluation.metrics import evaluate_records, summarise


def noisy_records(seed: int, size: int = 12, most: int = 5) -> list[dict]:
    """Records of all shapes: sizes, numbers, ignored pixels, empty and full masks, phrases, equal scores."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(size):
        height, width = rng.integers(1, 14, 2)

        def some(count, shape=(height, width)):
            stack = rng.random((count, *shape)) < rng.choice(
                [0.0, 0.3, 0.7, 1.0], (count, 1, 1), p=[0.1, 0.4, 0.4, 0.1]
            )
            return stack, masks.encode_batch(stack)

        truth, truths = some(rng.integers(0, most))
        prediction, predictions = some(rng.integers(0, most))
        ignored, codes = some(int(rng.random() < 0.4))
        records.append(
            {
                "id": f"n{seed}-{index}",
                "height": int(height),
                "width": int(width),
                "gt_rles": truths,
                "pred_rles": predictions,
                "pred_scores": (rng.integers(0, 4, len(predictions)) / 4).tolist(),
                "pred_phrase_ids": rng.integers(0, 2, len(predictions)).tolist(),
                "ignore_rle": codes[0] if codes else None,
                "arrays": (truth, prediction, ignored),
            }
        )
    return records


def from_pixels(one: dict, threshold: float | None) -> tuple[int, int, int, bool]:
    """Intersection, union, duplicates and emptiness straight from boolean arrays."""
    truth, prediction, ignored = one["arrays"]
    scores = one["pred_scores"]
    kept = [k for k in range(len(scores)) if threshold is None or scores[k] > threshold]
    valid = ~ignored.any(axis=0)
    truths, predictions = truth.any(axis=0) & valid, prediction[kept].any(axis=0) & valid
    ranked = sorted(kept, key=lambda k: -scores[k])
    duplicates = 0
    for at, k in enumerate(ranked):
        for other in ranked[:at]:
            both, either = (prediction[k] & prediction[other]).sum(), (prediction[k] | prediction[other]).sum()
            if one["pred_phrase_ids"][k] == one["pred_phrase_ids"][other] and either and both / either > 0.7:
                duplicates += 1
                break
    is_empty = not predictions.any()
    return int((truths & predictions).sum()), int((truths | predictions).sum()), duplicates, is_empty


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0.0, 0.25, 0.5]), st.sampled_from([0, 3, 10]))
def test_measures_equal_those_of_pixels(seed, threshold, combined):
    """Also where records are measured mask by mask, since they have more masks than are combined."""
    records = noisy_records(seed)
    before = overlaps_module.MAX_COMBINED
    overlaps_module.MAX_COMBINED = combined
    try:
        measured = measure(records, threshold)
    finally:
        overlaps_module.MAX_COMBINED = before
    assert len(measured) == len(records)
    for one, found in zip(records, measured, strict=True):
        expected = from_pixels(one, threshold)
        assert (found.intersection, found.union, found.num_duplicates, found.is_empty) == expected


def test_many_masks_are_measured_alike(monkeypatch):
    records = noisy_records(5, 40, most=9)
    assert sum(len(one["gt_rles"]) + len(one["pred_rles"]) > overlaps_module.MAX_COMBINED for one in records) > 3
    expected = evaluate_records(records, score_threshold=0.25)
    for combined in (0, 14):
        monkeypatch.setattr(overlaps_module, "MAX_COMBINED", combined)
        assert evaluate_records(records, score_threshold=0.25) == expected


@pytest.mark.parametrize("masks_at_once", [1, 7, 100])
def test_chunks_do_not_matter(monkeypatch, masks_at_once):
    records = noisy_records(6, 30)
    expected = evaluate_records(records)
    monkeypatch.setattr(measure_module, "_CHUNK_MASKS", masks_at_once)
    assert evaluate_records(records) == expected


def test_images_too_large_for_32_bits():
    """60 million pixels in two records: events are counted in 64 bits."""
    height, width = 7000, 9000
    left, right = (masks.box_to_rle(box, height, width) for box in ([0, 0, 6000, 7000], [3000, 0, 9000, 7000]))
    ones = [record([left], [right, left, right, left, right], height=height, width=width) for _ in range(40)]
    figures = overall(*ones)
    assert figures["union"] == 40 * height * width and figures["intersection"] == 40 * height * 6000
    assert figures["duplicate_rate"] == pytest.approx(3 / 5)


def test_uncompressed_codes_and_runs_without_pixels():
    full = {"size": [HEIGHT, WIDTH], "counts": [0, 50, 0, 0, 0, 150]}
    figures = overall(record([full], [{"size": [HEIGHT, WIDTH], "counts": [0, 100, 100]}], [0.5]))
    assert (figures["intersection"], figures["union"]) == (100, 200)
    assert overall(record([EMPTY], [EMPTY]))["AP50"] == 0  # an instance without pixels matches nothing


def test_what_is_kept_can_be_changed_afterwards():
    records = noisy_records(7, 40)
    measured = measure(records)
    for threshold, min_area in ((None, 0), (0.25, 0), (0.5, 20)):
        assert summarise(measured.at(threshold, min_area)) == summarise(measure(records, threshold, min_area))
    assert summarise(measured.at(0.5, 20).at(None)) == summarise(measured)


def test_selected_records_are_those_alone():
    records = noisy_records(8, 30)
    measured = measure(records, 0.25)
    chosen = np.array([4, 29, 3, 3])
    assert summarise(measured.select(chosen[:3])) == summarise(measure([records[k] for k in chosen[:3]], 0.25))
    assert measured.select(chosen).ids.tolist() == [records[k]["id"] for k in chosen]
    assert [one.scores_P.tolist() for one in measured[3:5]] == [one.scores_P.tolist() for one in [*measured][3:5]]
    with pytest.raises(IndexError):
        measured[30]


# ---- groups by area and by words --------------------------------------------------------------------------------


def test_groups_by_area_of_the_truths():
    """200 pixels: 1 % are 2, 10 % are 20."""
    blocks = {1: "small", 2: "medium", 20: "medium", 21: "large"}
    full = np.zeros((len(blocks), HEIGHT * WIDTH), bool)
    for row, area in enumerate(blocks):
        full[row, :area] = True
    codes = masks.encode_batch(full.reshape(-1, HEIGHT, WIDTH))
    records = [record([code], [strip(0, 1)]) for code in codes] + [record([])]
    records.append(record([codes[0], codes[2]], []))  # 10.5 pixels on average
    by_area = evaluate_records(records)["by_area"]
    assert list(by_area) == ["none", "small", "medium", "large"]
    assert [by_area[group]["num_samples"] for group in by_area] == [1, 1, 3, 1]
    assert by_area["large"] == overall(records[3])


def test_groups_by_words():
    texts = ["dog", "red dog", "a red dog", "a b c d e", "a b c d e f", " ".join("abcdefghij"), " ".join("abcdefghijk")]
    records = [record([], text=text, instruction="Please segment " + text) for text in texts]
    groups = evaluate_records([*records, record([])])["by_phrase_length"]
    assert {group: figures["num_samples"] for group, figures in groups.items()} == {
        "1-2": 2,
        "3-5": 2,
        "6-10": 2,
        ">10": 1,
    }
    assert list(evaluate_records([record([], instruction="the red dog")])["by_phrase_length"]) == ["3-5"]
    assert evaluate_records([record([])])["by_phrase_length"] == {}
    with pytest.raises(ValueError, match="text must be a string, got 3"):
        evaluate_records([record([], text=3)])


def test_no_target_accuracy_is_n_acc():
    figures = overall(record([]), record([], [strip(0, 3)]))
    assert figures["no_target_accuracy"] == figures["n_acc"] == 0.5


def test_fifty_pixels_are_not_small():
    """gRefCOCO's optional rule: fewer than 50 pixels are none."""
    block = np.zeros((2, HEIGHT, WIDTH), bool)
    block[0, :7, :7], block[1, :5, :10] = True, True
    below, at = masks.encode_batch(block)
    assert overall(record([], [below]), min_area=50)["n_acc"] == 1
    assert overall(record([], [at]), min_area=50)["n_acc"] == 0
    assert overall(record([], [below]))["n_acc"] == 0


def test_new_figures_can_be_written_as_json():
    metrics = evaluate_records(noisy_records(9))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert {"cgf1", "pmf1", "il_mcc", "cgf1@0.95", "pmf1@0.50"} <= set(metrics["overall"])
    for name in ("cgf1", "pmf1", "il_mcc", "by_area", "by_phrase_length", "AP of COCO"):
        assert metrics["conventions"][name]


def test_records_of_more_pixels_than_32_bits_can_count_are_measured_together():
    """9 masks take 4 bits beside the pixel: numbers up to 5.1e9."""
    side, records = 4000, []
    for number in range(20):
        boxes = [[k, side - 9, k + 4 + number, side] for k in range(0, 90, 10)]
        truth, *predictions = (masks.box_to_rle(box, side, side) for box in boxes)
        scores = [0.9 - k / 100 for k in range(len(predictions))]
        one = {"id": str(number), "height": side, "width": side, "gt_rles": [truth]}
        records.append({**one, "pred_rles": predictions, "pred_scores": scores})
    together, alone = measure(records), [measure([one]) for one in records]
    for column in ("intersection_R", "union_R", "num_duplicates_R", "hits_TP"):
        parts = [getattr(one, column) for one in alone]
        assert np.array_equal(getattr(together, column), np.concatenate(parts, axis=-1)), column
    assert together.union_R[0] == 9 * 4 * 9
