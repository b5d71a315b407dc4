"""`python -m instructsam.compare`: differences in pairs, what changed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from instructsam import masks
from instructsam.compare import compare, main
from instructsam.evaluation.comparison import sign_flip_p
from instructsam.evaluation.metrics import evaluate_records

HEIGHT, WIDTH = 10, 20


def strip(start: int, stop: int) -> masks.RLE:
    """Columns start...stop of one row."""
    return masks.box_to_rle([start, 4, stop, 5], HEIGHT, WIDTH)


def write(folder: Path, records: list[dict], benchmark: dict | None = None, threshold: float | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    metrics = evaluate_records(records, score_threshold=threshold)
    (folder / "metrics.json").write_text(json.dumps({"benchmark": benchmark or {}, **metrics}))
    return folder / "metrics.json"


def run_of(widths: list[int]) -> list[dict]:
    """Two instructions an image, with a truth of ten pixels of which the prediction covers ``width``."""
    return [
        {
            "id": f"q{index}",
            "image": f"{index // 2}.jpg",
            "instruction": f"instruction {index}",
            "height": HEIGHT,
            "width": WIDTH,
            "gt_rles": [strip(0, 10)],
            "pred_rles": [strip(0, width)] if width else [],
            "pred_scores": [0.9] if width else [],
        }
        for index, width in enumerate(widths)
    ]


def test_differences_and_what_changed(tmp_path, capsys):
    widths = [5] * 30
    a = write(tmp_path / "a", run_of(widths))
    b = write(tmp_path / "b", run_of([0, 10, *[6] * 28])[::-1])  # another order
    compared = compare(a, b, figures=("giou", "ciou", "P@0.6", "n_acc"), resamples=500)
    giou = compared["figures"]["giou"]
    assert giou["a"] == 0.5 and giou["b"] == pytest.approx((10 + 6 * 28) / 300, abs=1e-6)
    assert giou["difference"] == pytest.approx(giou["b"] - giou["a"])
    assert 0 < giou["low"] < giou["difference"] + 0.001 and giou["high"] >= giou["difference"] - 1e-9
    assert compared["figures"]["n_acc"] == dict.fromkeys(("a", "b", "difference", "low", "high"))
    assert (compared["num_samples"], compared["num_images"]) == (30, 15)
    iou = compared["iou"]
    assert (iou["better"], iou["worse"], iou["equal"]) == (29, 1, 0)
    assert iou["p_sign"] == pytest.approx(2 * 31 / 2**30)
    assert [(one["id"], one["iou_a"], one["iou_b"]) for one in compared["worse"]] == [("q0", 0.5, 0.0)]
    assert compared["better"][0] == {
        "id": "q1",
        "iou_a": 0.5,
        "iou_b": 1.0,
        "change": 0.5,
        "instruction": "instruction 1",
    }
    assert len(compared["better"]) == 10

    main([str(a), str(b), "--changed", "3", "--resamples", "50", "--json", str(tmp_path / "new" / "c.json")])
    printed = capsys.readouterr().out
    assert "better 29, worse 1, equal 0" in printed and "q0  instruction 0" in printed and "giou" in printed
    stored = json.loads((tmp_path / "new" / "c.json").read_text())
    assert len(stored["better"]) == 3 and set(stored["figures"]) >= {"mAP", "giou", "ciou"}
    assert stored["conventions"]["difference"] == "B - A"


def test_pairing_is_what_makes_a_small_difference_visible(tmp_path):
    """IoUs differ widely between images, but B is always a pixel better: apart, the intervals would overlap."""
    widths = [1 + (3 * index) % 8 for index in range(40)]
    a, b = write(tmp_path / "a", run_of(widths)), write(tmp_path / "b", run_of([width + 1 for width in widths]))
    row = compare(a, b, figures=["giou"])["figures"]["giou"]
    assert (row["low"], row["high"]) == pytest.approx((0.1, 0.1), abs=1e-6)


def test_a_run_against_itself(tmp_path):
    a = write(tmp_path / "a", run_of([3, 5, 10]))
    compared = compare(a, tmp_path / "a" / "predictions.jsonl", resamples=20)
    assert {(row["difference"] or 0, row["low"] or 0, row["high"] or 0) for row in compared["figures"].values()} == {
        (0, 0, 0)
    }
    assert compared["iou"]["p_sign_flip"] == 1 == compared["iou"]["p_sign"]
    assert compared["worse"] == compared["better"] == []


def test_headline_figures_of_the_benchmark(tmp_path):
    rules = {"name": "refcoco", "split": "val", "threshold": 0.3, "headline": ["ciou", "P@0.9", "by class"]}
    a, b = (write(tmp_path / name, run_of([5, 6]), rules) for name in "ab")
    assert list(compare(a, b, resamples=10)["figures"]) == ["ciou", "P@0.9"]


def test_what_cannot_be_compared(tmp_path, capsys):
    rules = {"name": "refcoco", "split": "val", "threshold": 0.3, "inclusive": False}
    a = write(tmp_path / "a", run_of([5] * 12), rules)

    def message(records, benchmark=None, threshold=None, name="b"):
        with pytest.raises(ValueError) as error:
            compare(a, write(tmp_path / name, records, benchmark or rules, threshold))
        return str(error.value)

    text = message([*run_of([5] * 3), *run_of([5] * 14)[13:]])
    assert "a/metrics.json lacks 'q13'" in text
    assert "b/metrics.json lacks 'q3', 'q4', 'q5', 'q6', 'q7' and 4 more" in text
    assert "threshold 0.3 and 0.5" in message(run_of([5] * 12), {**rules, "threshold": 0.5})
    assert "inclusive False and True" in message(run_of([5] * 12), {**rules, "inclusive": True})
    assert "split 'val' and 'testA'" in message(run_of([5] * 12), {**rules, "split": "testA"})
    assert "name 'refcoco' and 'grefcoco'" in message(run_of([5] * 12), {**rules, "name": "grefcoco"})
    assert "score_threshold None and 0.5" in message(run_of([5] * 12), threshold=0.5)
    others = run_of([5] * 12)
    others[4]["gt_rles"] = [strip(0, 9)]
    assert "record 'q4': gt_rles differs" in message(others)

    (tmp_path / "a" / "predictions.jsonl").write_text("{]\n")
    with pytest.raises(SystemExit, match="error: .*predictions.jsonl:1"):
        main([str(a), str(a)])
    (tmp_path / "a" / "predictions.jsonl").unlink()
    with pytest.raises(ValueError, match="no predictions.jsonl beside it"):
        compare(a, a)
    with pytest.raises(ValueError, match="no such file"):
        compare(tmp_path / "nothing.json", a)


def test_other_ignored_pixels_and_another_least_area_cannot_be_compared(tmp_path):
    plain = run_of([5] * 2)
    a = write(tmp_path / "a", plain)
    ignoring = write(tmp_path / "ignoring", [{**one, "ignore_rle": strip(12, 14)} for one in plain])
    with pytest.raises(ValueError, match="record 'q0': ignore_rle differs"):
        compare(a, ignoring)
    other = write(tmp_path / "other", plain)
    metrics = json.loads(other.read_text())
    metrics["conventions"]["min_area"] = 50
    other.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="min_area 0 and 50"):
        compare(a, other)


def test_an_id_that_is_there_twice_is_named(tmp_path):
    a = write(tmp_path / "a", run_of([5, 6]))
    twice = [*run_of([5, 6]), *run_of([5])]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(one) + "\n" for one in twice))
    with pytest.raises(ValueError, match="record 'q0': occurs twice"):
        compare(a, tmp_path / "twice.jsonl")


def test_sign_flips():
    assert sign_flip_p(np.zeros(5)) == 1
    assert sign_flip_p(np.array([0.1, 0.2, 0.3])) == 2 / 8  # only all + and all - reach it
    assert sign_flip_p(np.array([0.2, -0.1])) == 1.0
    assert sign_flip_p(np.full(40, 0.1)) == pytest.approx(1 / 10001)
    rng = np.random.default_rng(0)
    uniform = [sign_flip_p(rng.normal(size=30), seed, 400) for seed in range(200)]
    assert 0.35 < np.mean(uniform) < 0.65 and np.mean(np.array(uniform) < 0.1) < 0.2


def test_images_without_a_difference_leave_the_test_exact():
    assert sign_flip_p(np.array([0.1, 0.2, 0.3] + [0.0] * 30)) == 2 / 8
