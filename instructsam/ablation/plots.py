"""The plots of an ablation as SVG files that stand alone: AP against the number by instances, duplicates, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from instructsam.evaluation.charts import bar_chart, line_chart, scatter_chart
from instructsam.evaluation.markup import Node, node
from instructsam.evaluation.tables import label
from instructsam.training.files import replace_text

_COLOURS = ("#3b6fd4", "#d9822b", "#2f9461", "#a04fb5", "#c0392b")
_STYLE = "\n".join(
    [
        "svg { background: #ffffff; font-family: system-ui, sans-serif; }",
        "text { fill: #5b636d; font-size: 11px; text-anchor: middle; } text.y { text-anchor: end; }",
        ".grid { stroke: #d5d9de; } .bar, .dot { fill: currentColor; } .bar { opacity: 0.75; }",
        ".line { fill: none; stroke: currentColor; stroke-width: 2; } .whisker { stroke: currentColor; }",
        *(f".series-{number} {{ color: {colour}; }}" for number, colour in enumerate(_COLOURS)),
    ]
)


def write_plots(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write what can be drawn of `report.collect`'s numbers; returns file name -> title."""
    charts = {f"{figure}_by_instances": by_instances(found, figure) for figure in found["grouped_figures"]}
    charts |= {"duplicates": duplicates(found)}
    charts |= {"cost_time": cost(found, "seconds_per_step", "seconds a step")}
    charts |= {"cost_parameters": cost(found, "parameters", "parameters")}
    written = {}
    for name, chart in charts.items():
        path = folder / f"{name}.svg"
        if chart is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        chart.set("xmlns", "http://www.w3.org/2000/svg")
        chart.insert(0, node("style", _STYLE))
        replace_text(path, ElementTree.tostring(chart, encoding="unicode") + "\n")
        written[path.name] = chart.get("aria-label", name)
    return written


def by_instances(found: Mapping[str, Any], figure: str) -> Node | None:
    """A figure against the cells' number (or cell by cell), a line for every number of true instances."""
    cells = {name: cell for name, cell in found["cells"].items() if cell["by_instances"][figure]}
    if found["x_name"]:
        placed = [item for item in cells.items() if item[1]["x"] is not None]
        cells = dict(sorted(placed, key=lambda item: item[1]["x"]))
    if not cells:
        return None
    names = [f"{cell['x']:g}" if found["x_name"] else name for name, cell in cells.items()]
    groups = next(iter(cells.values()))["by_instances"][figure]
    series = {group: [_pair(cell["by_instances"][figure][group]) for cell in cells.values()] for group in groups}
    series = {f"{group} inst.": values for group, values in series.items() if any(values)}
    if not series:
        return None
    x_name = found["x_name"] or "cell"
    title = f"{label(figure)} against {x_name} by number of true instances"
    highest = 1.0 if figure.startswith("AP") else _highest(pair for values in series.values() for pair in values)
    return line_chart(title, x_name, label(figure), names, series, highest)


def duplicates(found: Mapping[str, Any]) -> Node | None:
    """The duplicate rate of every cell."""
    bars = {name: _pair(cell["figures"].get("duplicate_rate")) for name, cell in found["cells"].items()}
    if not any(bars.values()):
        return None
    return bar_chart("Duplicate rate by cell", "cell", "duplicate rate", bars, _highest(bars.values()))


def cost(found: Mapping[str, Any], key: str, name: str) -> Node | None:
    """The first figure of every cell against one of its costs."""
    figure = found["figures"][0]
    points = {}
    for cell_name, cell in found["cells"].items():
        spent, pair = cell["cost"][key]["mean"], _pair(cell["figures"][figure])
        if spent is not None and pair is not None:
            points[cell_name] = (spent, *pair)
    return scatter_chart(f"{label(figure)} against {name}", name, label(figure), points) if points else None


def _highest(pairs: Iterable[tuple[float, float | None] | None]) -> float:
    """Where an axis ends that starts at 0."""
    return max([value + (deviation or 0.0) for value, deviation in filter(None, pairs)] + [0.01])


def _pair(spread: Mapping[str, Any] | None) -> tuple[float, float | None] | None:
    return None if spread is None or spread["mean"] is None else (spread["mean"], spread["deviation"])
