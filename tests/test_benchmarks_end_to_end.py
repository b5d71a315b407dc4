"""Every benchmark from its published shape to its figures, with the tiny model and the real command's code."""

from __future__ import annotations

import json

import pytest
from benchmark_fixtures import WRITERS, write_benchmark
from tiny_fixtures import settings_of

from instructsam.evaluate import evaluate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_from_files_to_figures(name, checkpoint, tmp_path, capsys):
    asked = write_benchmark(name, tmp_path / "data")
    output = tmp_path / "output"
    options = ["max_new_tokens=6", "query_reliance=false", "bootstrap=20", "gallery_rows=1", "batch_size=16"]
    found = evaluate(settings_of("eval", *asked, f"checkpoint={checkpoint}", f"output_dir={output}", *options))
    ((key, metrics),) = found.items()
    assert key.startswith(name.split("_release")[0])
    written = json.loads((output / "metrics.json").read_text())
    described = written["benchmark"]
    assert described["conventions"] and described["headline"] and described["threshold"] is not None
    assert written["checkpoint"]["sha256"] and written["settings"]["cut_off_answers"] >= 0
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records) == metrics["overall"]["num_samples"] > 0
    said = capsys.readouterr().out
    assert f"written to {output}" in said
    assert all(f"{topic}: {rule}" in said for topic, rule in described["conventions"].items())
    report = (output / "report.md").read_text()
    assert all(text in report for text in described["conventions"]), "the conventions are part of the report"
    assert (output / "report.html").stat().st_size > 10_000
