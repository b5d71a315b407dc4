"""An evaluation for people: metrics.json, report.md and a plain table for the terminal.

Works on what `evaluation.metrics.evaluate_records` returns; how figures are set is in `evaluation.tables`. The page for
a browser, which needs the records too, is written by `evaluation.html`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from instructsam.evaluation.tables import (
    BREAKDOWNS,
    RELIANCE_FIGURES,
    TERMINAL_COLUMNS,
    Figures,
    beside,
    breakdown,
    breakdown_columns,
    difference,
    label,
    number,
    published_of,
    reliance_rows,
    value_of,
)

TERMINAL_WIDTH = 100


def compare_reliance(reliance: Mapping[str, Any]) -> dict[str, Any]:
    """What query reliance comes to: figures with the real queries, with replaced ones, and the fall between them.

    Args:
        reliance: ``{replacement: {"real": metrics, "replaced": metrics}}``, each pair over the same instructions (what
            `evaluation.reliance.query_reliance` gives), or ``{"real": metrics, replacement: metrics, ...}``, all over
            the same instructions. Metrics hold ``overall`` and ``by_kind``.

    Returns:
        ``{replacement: {"overall": group, "by_kind": {kind: group}}}`` with group = ``{"num_samples", "AP50": {"real",
        "replaced", "fall"}, "mAP": ...}``; None where a figure does not exist.

    Raises:
        ValueError: where a replacement has no real figures to compare with.
    """
    if "real" in reliance:
        real = reliance["real"]
        pairs = {name: (real, replaced) for name, replaced in reliance.items() if name != "real"}
    else:
        pairs = {}
        for name, pair in reliance.items():
            if missing := [side for side in ("real", "replaced") if side not in pair]:
                raise ValueError(f"query reliance {name!r}: has no {' and no '.join(missing)} figures")
            pairs[name] = (pair["real"], pair["replaced"])
    return {
        name: {
            "overall": _compare(real["overall"], replaced["overall"]),
            "by_kind": {
                kind: _compare(figures, replaced.get("by_kind", {}).get(kind))
                for kind, figures in real.get("by_kind", {}).items()
            },
        }
        for name, (real, replaced) in pairs.items()
    }


def _compare(real: Figures, replaced: Figures | None) -> dict[str, Any]:
    group: dict[str, Any] = {"num_samples": real.get("num_samples")}
    for figure in RELIANCE_FIGURES:
        before, after = value_of(real, figure), value_of(replaced, figure)
        group[figure] = {"real": before, "replaced": after, "fall": difference(before, after)}
    return group


# ---- files ------------------------------------------------------------------------------------------------------


def write_report(
    folder: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    reliance: Mapping[str, Any] | None = None,
    published: Mapping[str, Figures] | None = None,
    title: str = "Evaluation",
) -> tuple[Path, Path]:
    """Write ``metrics.json`` and ``report.md`` into a folder, which is made if need be.

    Args:
        metrics: what `evaluate_records` returned; the report also shows ``intervals`` (figure -> (low, high)),
            ``benchmark`` (name, title, split, threshold, headline, published, conventions, ...) and ``checkpoint``
            (path, sha256, layout) where they are in it.
        settings: whatever describes the run; stored beside the figures.
        baseline: metrics of the untrained model over the same records.
        reliance: see :func:`compare_reliance`.
        published: name -> figures (keys as in ``overall``) of published runs, shown beside this one's and those of
            the benchmark.
        title: heading of the report.

    Returns:
        The paths of both files. Each is written under a temporary name and renamed.

    Raises:
        ValueError: for figures that are NaN or infinite, and as :func:`compare_reliance`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compared = compare_reliance(reliance) if reliance else None
    stored: dict[str, Any] = {**metrics, "settings": dict(settings or {})}
    if baseline is not None:
        stored["baseline"] = {key: value for key, value in baseline.items() if key != "conventions"}
    if compared:
        stored["query_reliance"] = compared
    if published:
        stored["published"] = dict(published)
    text = json.dumps(stored, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    report = render_markdown(
        metrics, settings, baseline, compared, {**published_of(metrics), **(published or {})}, title
    )
    paths = folder / "metrics.json", folder / "report.md"
    for path, content in zip(paths, (text, report), strict=True):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    return paths


def render_markdown(
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    baseline: Mapping[str, Any] | None,
    compared: Mapping[str, Any] | None,
    published: Mapping[str, Figures],
    title: str,
) -> str:
    """The report as Markdown; ``compared`` comes from :func:`compare_reliance`, the rest as for `write_report`."""
    parts = [f"# {title}", "Figures are in 0…1; – stands where there is nothing to measure."]
    if about := about_run(metrics):
        parts.append("\n".join(f"- {name}: {_plain(value)}" for name, value in about.items()))
    parts += ["## Figures", markdown_table(beside(metrics, baseline, published))]
    for heading, name, key in BREAKDOWNS:
        if metrics.get(key):
            rows = breakdown(
                name, metrics[key], baseline.get(key, {}) if baseline else None, breakdown_columns(metrics)
            )
            parts += [f"## {heading}", markdown_table(rows)]
    if compared:
        parts += [
            "## Query reliance",
            "How far figures fall when the queries are replaced by ones that cannot know the answer; each comparison "
            "is over the same instructions. A fall near 0 means that the queries carry nothing.",
        ]
        for figure in RELIANCE_FIGURES:
            parts += [f"### {figure}", markdown_table(reliance_rows(compared, figure))]
    conventions = [f"- **{name}**: {_plain(rule)}" for name, rule in all_conventions(metrics).items()]
    if conventions:
        parts += ["## Conventions", "\n".join(conventions)]
    if settings:
        block = json.dumps(dict(settings), indent=2, ensure_ascii=False, default=str)
        parts += ["## Settings", f"```json\n{block}\n```"]
    return "\n\n".join(parts) + "\n"


def about_run(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Name → value of what was measured on what: benchmark, split, thresholds, checkpoint and its hash."""
    benchmark, checkpoint = metrics.get("benchmark") or {}, metrics.get("checkpoint") or {}
    threshold = benchmark.get("threshold")
    if threshold is not None and benchmark.get("inclusive"):
        threshold = f"{threshold}, inclusive"
    about = {
        "benchmark": benchmark.get("title") or benchmark.get("name"),
        "split": benchmark.get("split"),
        "score threshold": threshold,
        "smallest area that counts, in pixels": benchmark.get("min_area") or None,
        "checkpoint": checkpoint.get("path"),
        "layout": checkpoint.get("layout"),
        "sha256 of the weights": checkpoint.get("sha256"),
    }
    return {name: value for name, value in about.items() if value not in (None, "")}


def all_conventions(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Name → rule: those of the benchmark first, then those of the metrics; where both have one, both stand."""
    own, general = (metrics.get("benchmark") or {}).get("conventions") or {}, metrics.get("conventions", {})
    return {**{f"{name} (benchmark)" if name in general else name: rule for name, rule in own.items()}, **general}


def _plain(rule: Any) -> str:
    return "none" if rule is None else str(rule)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header; all columns but the first are right-aligned."""

    def line(cells: Sequence[str]) -> str:
        # A bar or a line break in a name would break the table, a leading > would be read as a quote.
        escaped = (cell.replace("|", "\\|").replace("\n", " ").replace(">", "&gt;") for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    rule = "|:---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


# ---- terminal ---------------------------------------------------------------------------------------------------


def print_table(
    metrics: Mapping[str, Any], baseline: Mapping[str, Any] | None = None, file: TextIO | None = None
) -> None:
    """Print the figures, published ones, then the breakdowns, as plain text of at most 100 columns."""
    write: Callable[[str], Any] = (file or sys.stdout).write
    write(_text(beside(metrics, baseline, {})))
    if published := published_of(metrics):
        names = list(dict.fromkeys(key for figures in published.values() for key in figures))
        rows = [["published", *map(label, names)]]
        for system, figures in published.items():
            rows.append([system, *(number(value_of(figures, key)) for key in names)])
        write("\n" + _text(rows))
    columns = dict(list(breakdown_columns(metrics).items())[:TERMINAL_COLUMNS])
    for _, name, key in BREAKDOWNS:
        if metrics.get(key):
            groups = baseline.get(key, {}) if baseline else None
            write("\n" + _text(breakdown(name, metrics[key], groups, columns)))


def _text(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, numbers to the right; the first column gives way if a line would grow too long."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = TERMINAL_WIDTH - sum(widths[1:]) - 2 * len(widths[1:])
    widths[0] = min(widths[0], room)
    lines = []
    for row in rows:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths[1:])))
    return "\n".join(lines) + "\n"
