"""Reports: the right number in the right cell, "–" where there is none, files that can be read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructsam import masks
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.report import compare_reliance, print_table, write_report


def strip(start: int, stop: int) -> masks.RLE:
    mask = np.zeros((4, 20), bool)
    mask[1, start:stop] = True
    return masks.encode(mask)


def metrics_of(*predicted: tuple[int, int] | None) -> dict[str, Any]:
    """Metrics over one no-target, one colour and one spatial instruction (target: columns 0...10)."""
    kinds = ("no-target", "colour", "spatial")
    records = []
    for kind, columns in zip(kinds, predicted, strict=True):
        found = [] if columns is None else [strip(*columns)]
        truths = [] if kind == "no-target" else [strip(0, 10)]
        records.append({"id": kind, "height": 4, "width": 20, "kind": kind, "gt_rles": truths, "pred_rles": found})
        records[-1] |= {"pred_scores": [0.5] * len(found)}
    return evaluate_records(records)


TRAINED = metrics_of(None, (0, 10), (0, 6))
UNTRAINED = metrics_of((0, 5), (15, 20), (0, 6))


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text as rows of cells, without the rule under the header."""
    found: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    for table in found:
        if table:
            del table[1]
    return [table for table in found if table]


def cells(table: list[list[str]], row: str) -> dict[str, str]:
    line = next(line for line in table if line[0] == row)
    assert len(line) == len(table[0])
    return dict(zip(table[0], line, strict=True))


def test_metrics_json_holds_everything(tmp_path):
    settings = {"checkpoint": Path("some/where"), "threshold": 0.3}
    folder = tmp_path / "new" / "run"
    written, report = write_report(folder, TRAINED, settings=settings, baseline=UNTRAINED)
    assert (written, report) == (folder / "metrics.json", folder / "report.md")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "report.md"]
    stored = json.loads(written.read_text())
    for key in ("overall", "by_kind", "by_count", "conventions"):
        assert stored[key] == json.loads(json.dumps(TRAINED[key]))
    assert stored["settings"] == {"checkpoint": "some/where", "threshold": 0.3}
    assert stored["baseline"]["overall"] == UNTRAINED["overall"]
    assert "query_reliance" not in stored and "published" not in stored


def test_trained_beside_untrained(tmp_path):
    text = write_report(tmp_path, TRAINED, baseline=UNTRAINED)[1].read_text()
    figures, by_kind, by_count, by_area = tables(text)
    # Equal scores throughout: trained hit, hit (two of two at IoU 0.5); untrained false positive, false positive, hit.
    assert cells(figures, "AP50") == {"figure": "AP50", "this run": "1.000", "untrained": "0.167", "change": "+0.833"}
    assert cells(figures, "mAP")["this run"] == "0.650"
    assert cells(figures, "no-target accuracy (N-acc)")["change"] == "+1.000"
    assert cells(figures, "count error")["untrained"] == "0.333"
    assert cells(figures, "instructions") == {
        "figure": "instructions",
        "this run": "3",
        "untrained": "3",
        "change": "–",
    }
    assert cells(figures, "exact phrases")["this run"] == "–"
    assert [row[0] for row in by_kind[1:]] == ["colour", "no-target", "spatial"]
    assert cells(by_kind, "spatial")["AP50 untr."] == "1.000" and cells(by_kind, "spatial")["gIoU"] == "0.600"
    assert [row[0] for row in by_count[1:]] == ["0", "1"]
    assert [row[:2] for row in by_area[1:]] == [["none", "1"], ["large", "2"]]


def test_cells_without_a_measurement_are_dashes(tmp_path):
    _, by_kind, by_count, by_area = tables(write_report(tmp_path, TRAINED, baseline=UNTRAINED)[1].read_text())
    for row in (cells(by_kind, "no-target"), cells(by_count, "0"), cells(by_area, "none")):
        assert [row[name] for name in ("mAP", "AP50", "AP75", "cIoU", "T-acc", "AP50 untr.")] == ["–"] * 6
        assert row["gIoU"] == row["N-acc"] == "1.000" and row["dupl."] == "–"
    assert cells(by_kind, "colour")["N-acc"] == "–" and cells(by_kind, "colour")["T-acc"] == "1.000"
    # A prediction there has pixels, so that its cIoU of 0 is measured.
    by_kind = tables(write_report(tmp_path, UNTRAINED)[1].read_text())[1]
    assert cells(by_kind, "no-target")["cIoU"] == "0.000"
    assert "AP50 untr." not in by_kind[0]


def test_a_group_that_the_baseline_lacks(tmp_path):
    baseline = {**UNTRAINED, "by_kind": {}, "by_count": {}}
    by_kind = tables(write_report(tmp_path, TRAINED, baseline=baseline)[1].read_text())[1]
    assert cells(by_kind, "colour")["AP50 untr."] == "–"


def test_published_figures_stand_beside_ours(tmp_path):
    published = {"Paper": {"mAP": 0.315}}
    written, report = write_report(tmp_path, TRAINED, published=published)
    figures = tables(report.read_text())[0]
    assert cells(figures, "mAP") == {"figure": "mAP", "this run": "0.650", "Paper": "0.315"}
    assert cells(figures, "gIoU")["Paper"] == "–"
    assert json.loads(written.read_text())["published"] == published


BENCHMARK = {
    "name": "toy",
    "title": "Toy benchmark",
    "split": "val",
    "threshold": 0.5,
    "inclusive": True,
    "min_area": 50,
    "headline": ["giou", "cgf1", "n_acc"],
    "conventions": {"prompt": "as it stands", "giou": "of the toy"},
    "published": [
        {"system": "Paper", "figure": "giou", "value": 0.625},
        {"system": "Paper", "figure": "giou", "kind": "spatial", "value": 0.894},
        {"system": "Rival", "figure": "cgf1", "value": 0.5},
    ],
}
CHECKPOINT = {"path": "some/where", "sha256": "c0ffee", "layout": "released"}


def test_benchmark_checkpoint_and_intervals(tmp_path):
    intervals = {"giou": [0.25, 0.75], "cgf1": None, "mAP": [None, None]}
    metrics = {**TRAINED, "benchmark": BENCHMARK, "checkpoint": CHECKPOINT, "intervals": intervals}
    written, report = write_report(tmp_path, metrics, baseline=UNTRAINED, published={"Other": {"giou": 0.1}})
    stored = json.loads(written.read_text())
    assert stored["benchmark"] == BENCHMARK and stored["checkpoint"] == CHECKPOINT and stored["intervals"] == intervals
    text = report.read_text()
    about = ("benchmark: Toy benchmark", "split: val", "score threshold: 0.5, inclusive", "checkpoint: some/where")
    for line in (*about, "smallest area that counts, in pixels: 50", "sha256 of the weights: c0ffee"):
        assert f"- {line}\n" in text
    figures, by_kind = tables(text)[:2]
    assert figures[0] == ["figure", "this run", "interval", "untrained", "change", "Paper", "Rival", "Other"]
    assert [row[0] for row in figures[4:7]] == ["gIoU", "cgF1", "no-target accuracy (N-acc)"]  # the headline first
    assert cells(figures, "gIoU")["interval"] == "0.250…0.750" and cells(figures, "mAP")["interval"] == "–"
    assert [cells(figures, "gIoU")[name] for name in ("Paper", "Rival", "Other")] == ["0.625", "–", "0.100"]
    assert cells(figures, "cgF1")["Rival"] == "0.500"
    of_kind = cells(figures, "gIoU (spatial)")
    assert of_kind["this run"] == "0.600" and of_kind["Paper"] == "0.894" and of_kind["change"] == "–"
    assert len([row for row in figures if row[0] == "gIoU"]) == 1
    assert by_kind[0][:6] == ["kind", "n", "gIoU", "cgF1", "N-acc", "mAP"]
    # Both rules of a figure stand, the benchmark's and the general one.
    assert "- **giou (benchmark)**: of the toy\n" in text and "- **giou**: mean IoU" in text


def test_terminal_shows_published_figures_and_the_headline(capsys):
    print_table({**TRAINED, "benchmark": BENCHMARK, "intervals": {"giou": (0.25, 0.75)}}, UNTRAINED)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["figure", "this", "run", "interval", "untrained", "change"]
    start = next(i for i, line in enumerate(lines) if line.startswith("published"))
    assert lines[start].split()[-1] == "cgF1" and "gIoU (spatial)" in lines[start]
    assert lines[start + 2].split() == ["Paper", "0.625", "0.894", "–"]
    assert lines[start + 3].split() == ["Rival", "–", "–", "0.500"]
    assert next(line for line in lines if line.startswith("kind")).split()[1:5] == ["n", "gIoU", "cgF1", "N-acc"]


def test_query_reliance_by_kind(tmp_path):
    reliance = {
        "slot_mean": {"real": TRAINED, "replaced": UNTRAINED},
        "other_image": {"real": TRAINED, "replaced": TRAINED},
    }
    written, report = write_report(tmp_path, TRAINED, reliance=reliance)
    ap50, mean = tables(report.read_text())[-2:]
    assert ap50[0] == ["kind", "slot_mean: n", "real", "replaced", "fall", "other_image: n", "real", "replaced", "fall"]
    assert ap50[1] == ["all", "3", "1.000", "0.167", "+0.833", "3", "1.000", "1.000", "+0.000"]
    assert ap50[2] == ["colour", "1", "1.000", "0.000", "+1.000", "1", "1.000", "1.000", "+0.000"]
    assert ap50[3] == ["no-target", "1", "–", "–", "–", "1", "–", "–", "–"]
    assert mean[1][1:3] == ["3", "0.650"]
    stored = json.loads(written.read_text())["query_reliance"]
    assert stored["slot_mean"]["by_kind"]["colour"]["AP50"] == {"real": 1, "replaced": 0, "fall": 1}
    assert stored["slot_mean"]["overall"]["num_samples"] == 3


def test_query_reliance_with_one_real_side_and_missing_kinds():
    real = {"overall": {"AP50": 0.5, "mAP": 0.3, "num_samples": 9}, "by_kind": {"colour": {"AP50": 0.6, "mAP": 0.4}}}
    flat = compare_reliance({"real": real, "slot_mean": {"overall": {"AP50": 0.1, "mAP": 0.3}}})
    assert list(flat) == ["slot_mean"]
    assert flat["slot_mean"]["overall"]["AP50"] == {"real": 0.5, "replaced": 0.1, "fall": 0.4}
    assert flat["slot_mean"]["by_kind"]["colour"]["mAP"] == {"real": 0.4, "replaced": None, "fall": None}
    with pytest.raises(ValueError, match="'slot_mean': has no real"):
        compare_reliance({"slot_mean": {"replaced": real}})


def test_conventions_and_settings_are_written_out(tmp_path):
    text = write_report(tmp_path, TRAINED, settings={"threshold": 0.3}, title="Tiny world, val")[1].read_text()
    assert text.startswith("# Tiny world, val\n")
    for name, rule in TRAINED["conventions"].items():
        assert f"- **{name}**: {'none' if rule is None else rule}" in text
    assert '"threshold": 0.3' in text
    assert "Query reliance" not in text and "Settings" not in write_report(tmp_path, TRAINED)[1].read_text()


def test_names_cannot_break_a_table(tmp_path):
    metrics = {**TRAINED, "by_kind": {"a|b\nc": TRAINED["by_kind"]["colour"]}}
    text = write_report(tmp_path, metrics)[1].read_text()
    assert "| a\\|b c | 1 |" in text


def test_figures_that_are_not_finite_are_refused_and_leave_old_files(tmp_path):
    write_report(tmp_path, TRAINED)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError):
        write_report(tmp_path, {**TRAINED, "overall": {**TRAINED["overall"], "mAP": float("nan")}})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_terminal_table(capsys):
    print_table(TRAINED, UNTRAINED)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert next(line for line in lines if line.startswith("AP50")).split() == ["AP50", "1.000", "0.167", "+0.833"]
    assert next(line for line in lines if line.startswith("spatial")).split()[1:4] == ["1", "0.300", "1.000"]
    print_table(TRAINED)
    alone = capsys.readouterr().out.splitlines()
    assert next(line for line in alone if line.startswith("AP50")).split() == ["AP50", "1.000"]


def test_terminal_table_keeps_its_width():
    long = {**TRAINED, "by_kind": {"a kind with a name that goes on and on and on": TRAINED["by_kind"]["colour"]}}
    stream = io.StringIO()
    print_table(long, UNTRAINED, file=stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("a kind"))
    assert "…" in row and row.split()[-1] == "–"
