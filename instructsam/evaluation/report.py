"""An evaluation for people: metrics.json, report.md and a plain table for the terminal.

Works on what `evaluation.metrics.evaluate_records` returns. Figures are in 0...1 with three decimals; a cell that has
nothing to show is "–", also where the number stored is a convention and no measurement (AP without any ground truth,
cIoU without any pixel).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Figures = Mapping[str, Any]

NOTHING = "–"
COUNTS = {"instructions": "num_samples", "true instances": "num_gt_instances", "kept instances": "num_kept_instances"}
FIGURES = {
    "mAP": "mAP",
    "AP50": "AP50",
    "AP75": "AP75",
    "gIoU": "giou",
    "cIoU": "ciou",
    "P@0.5": "P@0.5",
    "P@0.6": "P@0.6",
    "P@0.7": "P@0.7",
    "P@0.8": "P@0.8",
    "P@0.9": "P@0.9",
    "no-target accuracy (N-acc)": "n_acc",
    "target accuracy (T-acc)": "t_acc",
    "duplicate rate": "duplicate_rate",
    "count error": "count_error",
    "exact phrases": "phrase_accuracy",
}
# The columns of a breakdown.
BREAKDOWN = {
    "mAP": "mAP",
    "AP50": "AP50",
    "AP75": "AP75",
    "gIoU": "giou",
    "cIoU": "ciou",
    "N-acc": "n_acc",
    "T-acc": "t_acc",
    "dupl.": "duplicate_rate",
    "count±": "count_error",
    "phrases": "phrase_accuracy",
}
TERMINAL_BREAKDOWN = {name: key for name, key in BREAKDOWN.items() if name != "phrases"}  # leaves room for names
RELIANCE_FIGURES = ("AP50", "mAP")
TERMINAL_WIDTH = 100


# ---- cells ------------------------------------------------------------------------------------------------------


def value_of(figures: Figures | None, key: str) -> float | None:
    """The figure, or None where it does not exist."""
    if figures is None or figures.get(key) is None:
        return None
    if (key == "mAP" or key.startswith("AP")) and figures.get("num_gt_instances") == 0:
        return None
    if key == "ciou" and figures.get("union") == 0:
        return None
    return float(figures[key])


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _change(value: float | None) -> str:
    return NOTHING if value is None else f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def _count(figures: Figures | None, key: str) -> str:
    return NOTHING if figures is None or figures.get(key) is None else str(figures[key])


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


# ---- tables, as lists of rows (the first is the header) ---------------------------------------------------------


def _beside(metrics: Figures, baseline: Figures | None, published: Mapping[str, Figures]) -> list[list[str]]:
    """One row a figure: this run, then the baseline and the change, then published runs."""
    others = list(published.values())
    rows = [["figure", "this run", *(["untrained", "change"] if baseline else []), *published]]
    ours, theirs = metrics["overall"], baseline["overall"] if baseline else None
    for name, key in COUNTS.items():
        middle = [_count(theirs, key), NOTHING] if baseline else []
        rows.append([name, _count(ours, key), *middle, *(_count(other, key) for other in others)])
    for name, key in FIGURES.items():
        value, other_value = value_of(ours, key), value_of(theirs, key)
        middle = [_number(other_value), _change(_difference(value, other_value))] if baseline else []
        rows.append([name, _number(value), *middle, *(_number(value_of(other, key)) for other in others)])
    return rows


def _breakdown(
    name: str, groups: Mapping[str, Figures], baseline: Mapping[str, Figures] | None, columns: Mapping[str, str]
) -> list[list[str]]:
    """One row a group; with a baseline, its AP50 in the last column."""
    rows = [[name, "n", *columns, *(["AP50 untr."] if baseline is not None else [])]]
    for group, figures in groups.items():
        cells = [_number(value_of(figures, key)) for key in columns.values()]
        if baseline is not None:
            cells.append(_number(value_of(baseline.get(group), "AP50")))
        rows.append([group, _count(figures, "num_samples"), *cells])
    return rows


def _reliance(compared: Mapping[str, Any], figure: str) -> list[list[str]]:
    """One row for all and for every kind; of each replacement: instructions, real, replaced, fall."""
    rows = [["kind"]]
    for replacement in compared:
        rows[0] += [f"{replacement}: n", "real", "replaced", "fall"]
    kinds = sorted({kind for groups in compared.values() for kind in groups["by_kind"]})
    for kind in (None, *kinds):
        row = ["all" if kind is None else kind]
        for groups in compared.values():
            group = groups["overall"] if kind is None else groups["by_kind"].get(kind, {})
            triple = group.get(figure, {})
            row += [_count(group, "num_samples"), _number(triple.get("real")), _number(triple.get("replaced"))]
            row.append(_change(triple.get("fall")))
        rows.append(row)
    return rows


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
        group[figure] = {"real": before, "replaced": after, "fall": _difference(before, after)}
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
        metrics: what `evaluate_records` returned.
        settings: whatever describes the run; stored beside the figures.
        baseline: metrics of the untrained model over the same records.
        reliance: see :func:`compare_reliance`.
        published: name -> figures (keys as in ``overall``) of published runs, shown beside this one's.
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
    report = render_markdown(metrics, settings, baseline, compared, published or {}, title)
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
    parts += ["## Figures", _markdown(_beside(metrics, baseline, published))]
    for heading, name, key in _BREAKDOWNS:
        if metrics.get(key):
            rows = _breakdown(name, metrics[key], baseline.get(key, {}) if baseline else None, BREAKDOWN)
            parts += [f"## {heading}", _markdown(rows)]
    if compared:
        parts += [
            "## Query reliance",
            "How far figures fall when the queries are replaced by ones that cannot know the answer; each comparison "
            "is over the same instructions. A fall near 0 means that the queries carry nothing.",
        ]
        for figure in RELIANCE_FIGURES:
            parts += [f"### {figure}", _markdown(_reliance(compared, figure))]
    conventions = [f"- **{name}**: {_plain(rule)}" for name, rule in metrics.get("conventions", {}).items()]
    if conventions:
        parts += ["## Conventions", "\n".join(conventions)]
    if settings:
        block = json.dumps(dict(settings), indent=2, ensure_ascii=False, default=str)
        parts += ["## Settings", f"```json\n{block}\n```"]
    return "\n\n".join(parts) + "\n"


_BREAKDOWNS = (
    ("By instruction kind", "kind", "by_kind"),
    ("By number of true instances", "instances", "by_count"),
)


def _plain(rule: Any) -> str:
    return "none" if rule is None else str(rule)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
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
    """Print the figures, then the breakdowns by kind and by count, as plain text of at most 100 columns."""
    write: Callable[[str], Any] = (file or sys.stdout).write
    write(_text(_beside(metrics, baseline, {})))
    for _, name, key in _BREAKDOWNS:
        if metrics.get(key):
            groups = baseline.get(key, {}) if baseline else None
            write("\n" + _text(_breakdown(name, metrics[key], groups, TERMINAL_BREAKDOWN)))


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
