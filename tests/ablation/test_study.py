"""The study in docs/: its tables follow from its raw records, and docs/ABLATIONS.md quotes nothing else."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from instructsam.configs_path import CONFIGS
from instructsam.evaluation.average_precision import average_precision

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = ("attention", "queries")


def cells_of(name: str) -> list[dict[str, str]]:
    with (DOCS / "ablations" / name / "cells.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_is_there_with_three_seeds(name):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("ablate", [f"experiment=ablation/{name}"])
    runs = [(row["cell"], int(row["seed"])) for row in cells_of(name)]
    assert runs == [(cell, seed) for cell in config.ablation.cells for seed in config.ablation.seeds]
    assert {row["status"] for row in cells_of(name)} == {"complete"} and len(config.ablation.seeds) == 3


@pytest.mark.parametrize("name", STUDIES)
def test_figures_follow_from_the_raw_records(name):
    table = pq.read_table(DOCS / "ablations" / name / "records.parquet")
    for row in cells_of(name):
        own = table.filter((pc.field("cell") == row["cell"]) & (pc.field("seed") == int(row["seed"])))
        truths, kept, duplicates = (own[key].to_numpy().astype(int) for key in ("truths", "kept", "duplicates"))
        scores, hits = (pc.list_flatten(own[key]).to_numpy() for key in ("scores", "hits"))
        found = {
            "AP50": average_precision(hits[None] >= 1, scores, truths.sum())[0],
            "duplicate_rate": duplicates.sum() / kept.sum(),
            "count_error": np.abs(kept - truths).mean(),
            "n_acc": own["iou"].to_numpy()[truths == 0].mean(),
            "giou": own["iou"].to_numpy().mean(),
        }
        for figure, value in found.items():
            assert value == pytest.approx(float(row[figure]), abs=1e-4), (row["cell"], row["seed"], figure)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", text))


def test_the_page_quotes_its_reports():
    page = (DOCS / "ABLATIONS.md").read_text()
    reports = "".join((DOCS / "ablations" / name / "report.md").read_text() for name in STUDIES)
    quoted = numbers(page)
    assert len(quoted) > 20 and quoted <= numbers(reports)
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (DOCS / link).exists(), link


@pytest.mark.parametrize("name", STUDIES)
def test_nothing_of_the_machine_is_in_it(name):
    for path in (DOCS / "ablations" / name).rglob("*"):
        assert path.is_dir() or not re.search(rb"/(tmp|home|root|work)/", path.read_bytes()), path


@pytest.mark.parametrize("name", STUDIES)
def test_the_report_is_what_the_figures_say(name):
    """report.md was not touched after it was written: each mean in figures.json stands in it."""
    figures: dict[str, Any] = json.loads((DOCS / "ablations" / name / "figures.json").read_text())
    report = (DOCS / "ablations" / name / "report.md").read_text()
    for cell in figures["cells"].values():
        for spread in cell["figures"].values():
            assert f"{spread['mean']:.3f} ± {spread['deviation']:.3f}" in report
