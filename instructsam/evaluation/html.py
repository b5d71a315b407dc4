"""report.html: figures, curves, galleries and all instructions on one page that needs no server and no network.

Everything is inside the file: style, script, charts as SVG, pictures as JPEG. Texts that come from data are set as text
by `evaluation.markup`, never as HTML; a content security policy keeps the browser from running or fetching anything
that is not part of the page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from instructsam.evaluation import examples, tables
from instructsam.evaluation.charts import calibration_chart, count_chart, precision_recall_chart
from instructsam.evaluation.curves import CONVENTIONS, calibration, count_table, precision_recall
from instructsam.evaluation.markup import Node, document, node, table
from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.report import about_run, all_conventions, compare_reliance
from instructsam.evaluation.tables import Figures

DEFAULT_HEADLINE = ("mAP", "AP50", "giou", "ciou", "n_acc")
CURVE_FIGURES = ("AP50", "AP75", "mAP")  # of the curves, in their order


def write_html(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    measured: Measurements | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    reliance: Mapping[str, Any] | None = None,
    published: Mapping[str, Figures] | None = None,
    title: str = "Evaluation",
    per_gallery: int = 24,
) -> Path:
    """Write the page; the file stays below 15 MB.

    Args:
        path: of the file, whose folder exists.
        metrics: what `evaluate_records` returned for the records; what is read besides is as in `report.write_report`.
        records: see `evaluation.metrics`; ``image``, ``instruction`` and ``answer`` are shown where they have them. A
            picture that is not there is drawn as a grey area.
        measured: what `measure` returned for the records, by the rules in ``metrics``; None to measure them here.
        per_gallery: most instructions a gallery shows.

    Returns:
        The path. The page is written under a temporary name and renamed.

    Raises:
        ValueError: for malformed records, for a picture of another size than its record says, and as
            `report.compare_reliance`.
    """
    rules = metrics.get("conventions", {})
    threshold = rules.get("score_threshold")
    if measured is None:
        measured = measure(records, threshold, rules.get("min_area", 0))
    published = {**tables.published_of(metrics), **(published or {})}
    compared = compare_reliance(reliance) if reliance else {}
    about = about_run(metrics)
    body = node(
        "main",
        node("header", node("h1", title), _pairs(about) if about else None, _headline(metrics, published)),
        node("section", node("h2", "Figures"), table(tables.beside(metrics, baseline, published))),
        _curves(metrics, measured),
        _breakdowns(metrics, baseline),
        _reliance(compared),
        examples.section(records, measured, per_gallery, threshold),
        _conventions(metrics, settings),
    )
    folder = resources.files("instructsam.evaluation")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(document(title, body, style, script))
    os.replace(temporary, target)
    return target


# ---- parts ------------------------------------------------------------------------------------------------------


def _headline(metrics: Figures, published: Mapping[str, Figures]) -> Node:
    """A tile for every headline figure: its value, its interval, what others published."""
    keys = (metrics.get("benchmark") or {}).get("headline") or DEFAULT_HEADLINE
    tiles = []
    for key in keys:
        value = tables.value_of(metrics["overall"], key)
        tile = node("div", node("span", tables.label(key)), class_="tile")
        tile.append(node("strong", tables.number(value)))
        if tables.interval_of(metrics, key):
            tile.append(node("span", tables.interval(metrics, key), class_="faint"))
        for system, figures in published.items():
            for full, other in figures.items():
                if full == key or full.startswith(f"{key} ("):
                    kind = full[len(key) :]
                    tile.append(node("span", f"{system}{kind}: {tables.number(float(other))}", class_="faint"))
        tiles.append(tile)
    overall = metrics["overall"]
    counts = ", ".join(f"{overall[key]} {name}" for name, key in tables.COUNTS.items())
    note = node("p", f"{counts}. Figures are in 0…1; – stands where there is nothing to measure.", class_="faint")
    return node("div", node("div", tiles, class_="tiles"), note)


def _curves(metrics: Figures, measured: Measurements) -> Node:
    found = node("div", class_="charts")
    if curves := precision_recall(measured):
        averages = [tables.number(tables.value_of(metrics["overall"], key)) for key in CURVE_FIGURES]
        names = [f"{curve.name}: AP {average}" for curve, average in zip(curves, averages, strict=True)]
        found.append(_chart("Precision and recall", precision_recall_chart(curves), names))
    outside = bool(((measured.scores_P < 0) | (measured.scores_P > 1)).any())
    bins = None if outside else calibration(measured)
    if bins is not None:
        names = [f"precision (above the bar: predictions); ECE {bins.error:.3f}", "dashed: scores that are precisions"]
        found.append(_chart("Calibration of scores", calibration_chart(bins), names[:1], names[1]))
    elif outside:
        found.append(node("p", "No calibration: there are scores outside 0…1.", class_="faint"))
    counts = count_table(measured)
    exact = float((measured.num_kept_R == measured.num_truths_R).mean())
    fewer = float((measured.num_kept_R < measured.num_truths_R).mean())
    note = f"right number {exact:.1%}, too few {fewer:.1%}, too many {1 - exact - fewer:.1%}"
    found.append(_chart("Number of instances", count_chart(counts), ["true", "kept"], note))
    return node("section", node("h2", "Curves"), found)


def _chart(title: str, picture: Node, series: Sequence[str], note: str = "") -> Node:
    keys = [node("li", node("i", class_=f"key series-{number}"), name) for number, name in enumerate(series)]
    keys += [node("li", note, class_="faint")] if note else []
    return node("figure", node("figcaption", title), picture, node("ul", keys))


def _breakdowns(metrics: Figures, baseline: Figures | None) -> Node | None:
    parts = []
    for heading, name, key in tables.BREAKDOWNS:
        if metrics.get(key):
            others = baseline.get(key, {}) if baseline else None
            rows = tables.breakdown(name, metrics[key], others, tables.breakdown_columns(metrics))
            parts += [node("h3", heading), table(rows)]
    return node("section", node("h2", "Breakdowns"), parts) if parts else None


def _reliance(compared: Mapping[str, Any]) -> Node | None:
    if not compared:
        return None
    parts = [node("h2", "Query reliance")]
    parts.append(
        node(
            "p",
            "How far figures fall when the queries are replaced by ones that cannot know the answer. A fall near 0 "
            "means that the queries carry nothing.",
            class_="faint",
        )
    )
    for figure in tables.RELIANCE_FIGURES:
        parts += [node("h3", figure), table(tables.reliance_rows(compared, figure))]
    return node("section", parts)


def _conventions(metrics: Figures, settings: Mapping[str, Any] | None) -> Node:
    rules = {**all_conventions(metrics), **CONVENTIONS}
    parts = [node("h2", "How it was measured"), _pairs(rules)]
    if settings:
        block = json.dumps(dict(settings), indent=2, ensure_ascii=False, default=str)
        parts += [node("h3", "Settings"), node("pre", block)]
    return node("section", parts)


def _pairs(values: Mapping[str, Any]) -> Node:
    rows = []
    for name, value in values.items():
        rows += [node("dt", str(name)), node("dd", "none" if value is None else str(value))]
    return node("dl", rows)
