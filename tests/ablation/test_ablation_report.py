"""Reports of cells whose records are written by hand: every number is known."""

from __future__ import annotations

import csv
import json
import math
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from instructsam import masks
from instructsam.ablation import statistics
from instructsam.ablation.cells import parse
from instructsam.ablation.report import latex, write_report
from instructsam.ablation.state import Place
from instructsam.evaluation.measure import measure

SIZE = 8
VALUES = {
    "name": "toy_&_co",
    "stages": {"bridge": []},
    "cells": {"plain": {"x": 2}, "more_50%": {"x": 1}, "gone": {"x": 3}, "broken": {"x": 4}},
    "default": "plain",
    "seeds": [0, 1],
    "figures": ["giou", "AP50", "duplicate_rate"],
    "x_name": "N",
}
# How many of the four instructions each run answers exactly; of the others nothing is found.
FOUND = {"plain": {0: 2, 1: 1}, "more": {0: 3, 1: 4}}


def record(number: int, found: bool) -> dict:
    """An instruction about an image of its own, with one instance, or two for the last."""
    boxes = [[0, 0, 3, 3], [4, 4, 8, 8]][: 2 if number == 3 else 1]
    rles = [masks.box_to_rle(box, SIZE, SIZE) for box in boxes]
    kept = rles if found else []
    return {"id": f"i{number}", "image": f"{number}.png", "instruction": "x",
            "kind": "pair" if number == 3 else "single", "height": SIZE, "width": SIZE,
            "gt_rles": rles, "pred_rles": kept, "pred_scores": [0.9] * len(kept)}  # fmt: skip


def write_cell(ablation, output: Path, name: str, seed: int, records: list[dict], threshold: float = 0.3) -> Place:
    place = Place.of(output, ablation.cells[name], seed)
    place.eval.mkdir(parents=True)
    (place.eval / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    metrics = {"benchmark": {"name": "toy", "split": "val", "threshold": threshold}, "conventions": {"min_area": 0}}
    (place.eval / "metrics.json").write_text(json.dumps(metrics))
    folder = place.train / "bridge"
    (folder / "checkpoint").mkdir(parents=True)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                         "__metadata__": {"format": "pt"}}).encode()  # fmt: skip
    (folder / "checkpoint/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    speed = [{"seconds_per_step": s, "tokens_per_second": 100.0, "samples_per_second": 4.0} for s in (9.0, 0.2, 0.3)]
    if name == "more":
        speed[-1]["seconds_per_step"] = 0.4
    rows = [{"step": 0, "event": "start"}, *speed]
    (folder / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "sec')
    for step in ("bridge", "evaluate"):
        place.write(step, {"status": "complete", "settings": {}})
    return place


@pytest.fixture
def ablation():
    values = {**VALUES, "name": "toy", "title": VALUES["name"]}
    values["cells"] = {name.removesuffix("_50%"): cell for name, cell in VALUES["cells"].items()}
    return parse(values)


@pytest.fixture
def output(ablation, tmp_path) -> Path:
    for name, seeds in FOUND.items():
        for seed, found in seeds.items():
            records = [record(number, number < found) for number in range(4)]
            # Files may list the same instructions in another order.
            write_cell(ablation, tmp_path, name, seed, records[::-1] if seed else records)
    reason = "exit code 1: error: 50% of a_b | is & gone"
    Place.of(tmp_path, ablation.cells["broken"], 0).write("bridge", {"status": "failed", "reason": reason})
    return tmp_path


@pytest.mark.slow
def test_numbers(ablation, output):
    found = write_report(ablation, output, resamples=400)
    assert found == json.loads((output / "figures.json").read_text())
    plain, more = found["cells"]["plain"], found["cells"]["more"]
    assert plain["seeds"]["0"]["figures"]["giou"] == 0.5 and plain["seeds"]["1"]["figures"]["giou"] == 0.25
    assert plain["figures"]["giou"]["mean"] == 0.375 and plain["figures"]["giou"]["n"] == 2
    assert plain["figures"]["giou"]["deviation"] == pytest.approx(0.25 / math.sqrt(2))
    # 1 + 1 + 1 + 2 instances: seed 1 finds all five, seed 0 those of the first three instructions.
    assert more["figures"]["AP50"]["mean"] == pytest.approx((3 / 5 + 1) / 2)
    found_AP = more["by_instances"]["AP50"]
    assert found_AP["1"]["mean"] == 1.0 and found_AP["2"]["mean"] == 0.5
    assert found_AP["3-4"] == {"mean": None, "deviation": None, "n": 0}
    assert more["by_kind"]["pair"]["mean"] == 0.5 and "" not in more["by_kind"]
    # With seed 0 the instruction with two instances finds none of them.
    assert more["by_instances"]["count_error"]["2"]["mean"] == (2 + 0) / 2
    assert plain["cost"]["seconds_per_step"]["mean"] == 0.3 and plain["cost"]["tokens_per_sample"]["mean"] == 25
    assert plain["cost"]["parameters"]["mean"] == 6
    row = more["against_default"]["giou"]
    assert row["values"] == [0.25, 0.75] and row["difference"] == 0.5 and row["n"] == 2
    # t = 0.5 / (0.3536 / sqrt 2) = 2 with one degree of freedom: p = 1 - 2/pi atan 2
    assert row["p_t_test"] == pytest.approx(1 - 2 / math.pi * math.atan(2.0))
    assert 0 <= row["low"] < 0.5 < row["high"] <= 1 and 0 < row["p"] < 0.2
    assert "against_default" not in plain
    gone = found["cells"]["gone"]
    assert gone["seeds"]["0"] == {"status": "missing", "reason": "not run yet"}
    assert gone["figures"]["giou"]["mean"] is None and gone["against_default"]["giou"]["n"] == 0


@pytest.mark.slow
def test_resampling_sees_images_and_seeds(ablation, output):
    """Of four images one differs with seed 0 and three with seed 1: the sixteen draws of seeds and the binomial draws
    of images give the exact distribution of the difference."""
    row = write_report(ablation, output, resamples=4000)["cells"]["more"]["against_default"]["giou"]
    counts = np.random.default_rng(7).multinomial(4, [0.25] * 4, 40_000)
    # seed 0: image 2 is gained; seed 1: images 1, 2 and 3
    by_seed = np.stack([counts[:, 2], counts[:, 1:].sum(1)]) / 4
    drawn = np.random.default_rng(8).integers(0, 2, (2, 40_000))
    expected = np.take_along_axis(by_seed, drawn, axis=0).mean(0)
    low, high = np.quantile(expected, [0.025, 0.975])
    assert row["low"] == pytest.approx(low, abs=0.13) and row["high"] == pytest.approx(high, abs=0.13)
    assert row["p"] == pytest.approx(2 * (expected <= 0).mean(), abs=0.04)


def test_p_values_and_spreads_by_hand():
    assert statistics.bootstrap_p(np.array([0.1, 0.2, -0.1, 0.3, np.nan])) == pytest.approx(2 * (1 + 1) / 5)
    assert statistics.bootstrap_p(np.zeros(9)) == 1.0
    assert statistics.bootstrap_p(np.full(999, 0.1)) == pytest.approx(0.002)
    assert statistics.bootstrap_p(np.array([np.nan])) is None
    spread = statistics.spread_of([0.2, 0.4, None, 0.6])
    assert spread == {"mean": pytest.approx(0.4), "deviation": pytest.approx(0.2), "n": 3}
    assert statistics.spread_of([0.2]) == {"mean": 0.2, "deviation": None, "n": 1}


def counted(number: int, instances: int, kind: str = "") -> dict:
    """An instruction for so many pixels, of which the first is found."""
    rles = [masks.box_to_rle([k, 0, k + 1, 1], SIZE, SIZE) for k in range(instances)]
    return {
        **record(number, False),
        "kind": kind,
        "gt_rles": rles,
        "pred_rles": rles[:1],
        "pred_scores": [0.9][:instances],
    }


def test_instructions_are_told_apart_by_their_instances():
    measured = measure([counted(number, number) for number in range(7)])
    found = statistics.by_instances(measured, ["count_error"])["count_error"]
    assert found == {"1": 0, "2": 1, "3-4": (2 + 3) / 2, ">=5": (4 + 5) / 2}


def test_kinds_without_a_target_are_none_of_those_compared():
    measured = measure([counted(0, 1, "one"), counted(1, 0, "nothing"), counted(2, 2, "two"), counted(3, 1)])
    assert statistics.by_kind(measured, "count_error") == {"one": 0, "two": 1}


def test_rounding_is_no_spread_for_the_t_test():
    row = statistics._row([(0.3, 0.2), (0.1, 0.0)], np.full(9, 0.1))
    assert row["values"][0] != row["values"][1] and row["p_t_test"] is None


@pytest.mark.slow
def test_files(ablation, output):
    write_report(ablation, output, resamples=50)
    text = (output / "report.md").read_text()
    assert "| plain (default) | 2/2 | 0.375 ± 0.177 |" in text and "| gone | 0/2 | – |" in text
    assert "| broken | 0 | failed | bridge: exit code 1: error: 50% of a_b \\| is & gone |" in text
    assert "| broken | 1 | missing | not run yet |" in text
    assert "| more | gIoU | 2 | +0.500 |" in text
    tex = (output / "tables.tex").read_text()
    assert r"plain (default) & 2/2 & 0.375 $\pm$ 0.177 &" in tex
    assert r"error: 50\% of a\_b | is \& gone \\" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{table}") == 8
    rows = list(csv.DictReader((output / "summary.csv").open()))
    assert [row["cell"] for row in rows] == ["plain", "more", "gone", "broken"]
    assert float(rows[1]["giou mean"]) == 0.875 and float(rows[1]["giou difference"]) == 0.5
    assert rows[0]["giou difference"] == "" and rows[2]["giou mean"] == ""
    cells = list(csv.DictReader((output / "cells.csv").open()))
    assert len(cells) == 8 and cells[6]["status"] == "failed" and "50% of a_b" in cells[6]["reason"]
    assert float(cells[3]["giou"]) == 1.0 and cells[3]["parameters"] == "6"


@pytest.mark.slow
def test_plots(ablation, output):
    write_report(ablation, output, resamples=50)
    plots = {path.stem: ElementTree.parse(path).getroot() for path in (output / "plots").glob("*.svg")}
    assert set(plots) == {
        *(f"{figure}_by_instances" for figure in ("AP50", "count_error", "duplicate_rate")),
        *("duplicates", "cost_time"),
    }, "all cells have equally many parameters: nothing to draw"
    svg = "{http://www.w3.org/2000/svg}"
    assert all(root.tag == f"{svg}svg" for root in plots.values())
    texts = [node.text for node in plots["AP50_by_instances"].iter(f"{svg}text")]
    assert texts[:3] == ["1", "2", "N"], "cells lie in the order of x; those without results are out"
    assert texts[-3:] == ["true instances", "1", "2"], "the legend has the numbers of instances that there are"
    assert {"plain", "more"} <= {node.text for node in plots["cost_time"].iter(f"{svg}text")}
    again = {path: path.read_bytes() for path in (output / "plots").glob("*.svg")}
    write_report(ablation, output, resamples=50)
    assert again == {path: path.read_bytes() for path in (output / "plots").glob("*.svg")}


def test_figures_follow_from_the_raw_records(ablation, output):
    found = write_report(ablation, output, resamples=20)
    rows = pq.read_table(output / "records.parquet").to_pylist()
    assert len(rows) == 4 * 4 and {row["cell"] for row in rows} == {"plain", "more"}
    for cell, seed in (("plain", 0), ("more", 1)):
        own = [row for row in rows if (row["cell"], row["seed"]) == (cell, seed)]
        figures = found["cells"][cell]["seeds"][str(seed)]["figures"]
        assert figures["giou"] == pytest.approx(np.mean([row["iou"] for row in own]))
        hits = sum(count > 0 for row in own for count in row["hits"])
        assert figures["AP50"] == pytest.approx(hits / sum(row["truths"] for row in own)), "every prediction is a hit"
        assert all(len(row["scores"]) == len(row["hits"]) == row["kept"] for row in own)


def test_without_matplotlib_there_is_a_report_without_plots(ablation, output, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_report(ablation, output, resamples=20)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "## Plots" not in (output / "report.md").read_text() and not (output / "plots").exists()


def test_nothing_there_yet(ablation, tmp_path):
    found = write_report(ablation, tmp_path, resamples=10)
    assert all(entry["status"] == "missing" for cell in found["cells"].values() for entry in cell["seeds"].values())
    assert "| plain | 0 | missing | not run yet |" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("plots/*"))


def test_what_cannot_be_compared_is_an_error(ablation, output):
    place = Place.of(output, ablation.cells["more"], 0)
    metrics = json.loads((place.eval / "metrics.json").read_text())
    metrics["benchmark"]["threshold"] = 0.5
    (place.eval / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="different rules: threshold 0.3 and 0.5"):
        write_report(ablation, output)
    (place.eval / "predictions.jsonl").write_text(json.dumps(record(0, True)) + "\n")
    metrics["benchmark"]["threshold"] = 0.3
    (place.eval / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="not on the same instructions"):
        write_report(ablation, output)
    with pytest.raises(ValueError, match="'nonsense' is no figure"):
        write_report(parse({**VALUES, "name": "t", "cells": {"plain": {"x": 1}}, "figures": ["nonsense"]}), output)


def test_latex_escapes():
    assert r"a\_b \& 5\% \textbackslash{} \#1 \{x\} $>$=2 -- $\pm$" in latex([["a_b & 5% \\ #1 {x} >=2 – ±"]], "c")
