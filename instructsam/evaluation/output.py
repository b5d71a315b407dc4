"""What an evaluation leaves behind: figures with everything that they depend on, reports, pictures.

Without pictures nothing here needs torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructsam.evaluation import bootstrap
from instructsam.evaluation.metrics import Measurements, evaluate_records, measure
from instructsam.evaluation.report import print_table, write_report
from instructsam.evaluation.tables import label, number, value_of

Record = dict[str, Any]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What to work out and to write besides metrics.json and report.md.

    Attributes:
        gallery_rows: instructions in gallery.png; 0 = no such file.
        html: whether to write report.html.
        bootstrap: resamples of the confidence intervals; 0 = none. ``seed`` is theirs.
    """

    gallery_rows: int
    html: bool
    bootstrap: int
    seed: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Wanted:
        """From the settings of the command."""
        return cls(*(settings[key] for key in ("gallery_rows", "html", "bootstrap", "seed")))


def figures_of(records: Sequence[Record], benchmark: Mapping[str, Any], wanted: Wanted) -> tuple[Metrics, Measurements]:
    """All figures of one benchmark's records (kept predictions only), by its rules, and what they come from.

    Args:
        benchmark: name, split, min_area, headline and so on, as stored in metrics.json. ``intervals`` are of its
            headline figures.
    """
    measured = measure(records, min_area=benchmark["min_area"])  # once: masks are what takes time
    metrics = evaluate_records(measured)
    if wanted.bootstrap:
        figures = [key for key in benchmark["headline"] if bootstrap.is_known(key)]
        metrics["intervals"] = bootstrap.intervals(measured, figures, resamples=wanted.bootstrap, seed=wanted.seed)
        metrics["conventions"]["intervals"] = bootstrap.conventions(wanted.bootstrap, wanted.seed)
    return metrics, measured


def write_all(
    folder: Path,
    metrics: Metrics,
    records: Sequence[Record],
    measured: Measurements,
    wanted: Wanted,
    settings: Mapping[str, Any],
    baseline: Metrics | None = None,
    reliance: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write metrics.json, report.md and the files that are wanted, and print the table; returns the files' names.

    Args:
        metrics, measured: what `figures_of` returned for the records.
    """
    benchmark = metrics["benchmark"]
    title = " ".join(part for part in (benchmark.get("title") or benchmark["name"], benchmark.get("split")) if part)
    common: dict[str, Any] = {"settings": settings, "baseline": baseline, "reliance": reliance, "title": title}
    names = [path.name for path in write_report(folder, metrics, **common)]
    if wanted.html:
        from instructsam.evaluation.html import write_html

        names.append(write_html(folder / "report.html", metrics, records, measured, **common).name)
    if wanted.gallery_rows:
        from instructsam.evaluation.gallery import write_gallery

        write_gallery(records, folder / "gallery.png", wanted.gallery_rows)
        names.append("gallery.png")
    print(f"{title}\n")
    print_table(metrics, baseline)
    for name, rule in benchmark.get("conventions", {}).items():
        print(f"  {name}: {rule}")
    return names


def write_summary(folder: Path, found: Mapping[str, Metrics]) -> None:
    """One line a benchmark: printed, and written as summary.json and summary.md."""
    rows = [("benchmark", "instructions", "figures")]
    summary = {}
    for name, metrics in found.items():
        overall, headline = metrics["overall"], metrics["benchmark"]["headline"]
        figures = ", ".join(f"{label(key)} {number(value_of(overall, key))}" for key in headline)
        rows.append((name, str(overall["num_samples"]), figures))
        summary[name] = {
            "num_samples": overall["num_samples"],
            **{key: value_of(overall, key) for key in headline},
            "checkpoint_sha256": metrics["checkpoint"]["sha256"],
        }
    first, second = (max(len(row[column]) for row in rows) for column in range(2))
    print()
    for name, count, figures in rows:
        print(f"{name:{first}}  {count:>{second}}  {figures}")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|:---|---:|:---|")
    _replace(folder / "summary.md", "\n".join(lines) + "\n")
    _replace(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
