"""The plots of an ablation as SVG files, drawn by matplotlib (extra ``plots``).

Figures by number of true instances, duplicates, and cost against accuracy; whiskers are deviations over seeds.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructsam.evaluation.tables import label
from instructsam.files import replace_text

MISSING = "no plots: matplotlib is not installed (pip install -c constraints.txt -e '.[plots]')"
_SETTINGS: Any = {
    "svg.hashsalt": "instructsam",  # the same numbers give the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}
_WIDTH, _HEIGHT = 6.4, 3.4  # inches

Pair = tuple[float, float]
"""Mean and deviation."""


def write_plots(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write what can be drawn of `report.collect`'s numbers; returns file name -> title. Without matplotlib none."""
    if importlib.util.find_spec("matplotlib") is None:
        print(MISSING)
        return {}
    import matplotlib

    plots: dict[str, Callable[[Any], str | None]] = {
        f"{figure}_by_instances": lambda axes, figure=figure: _by_instances(axes, found, figure)  # type: ignore[misc]
        for figure in found["grouped_figures"]
    }
    plots |= {"duplicates": lambda axes: _duplicates(axes, found)}
    plots |= {"cost_time": lambda axes: _cost(axes, found, "seconds_per_step", "seconds a step")}
    plots |= {"cost_parameters": lambda axes: _cost(axes, found, "parameters", "parameters")}
    written = {}
    with matplotlib.rc_context(_SETTINGS):
        for name, draw in plots.items():
            path = folder / f"{name}.svg"
            title = _write(draw, path)
            if title is None:
                path.unlink(missing_ok=True)  # of an earlier report
            else:
                written[path.name] = title
    return written


def _write(draw: Callable[[Any], str | None], path: Path) -> str | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    title = draw(figure.add_subplot())
    if title is not None:
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": title})
        lines = (line.rstrip() for line in text.getvalue().splitlines())
        replace_text(path, "\n".join(lines) + "\n")
    return title


def _by_instances(axes: Any, found: Mapping[str, Any], figure: str) -> str | None:
    """Lines over the cells' number, one for each number of true instances; without such, bars for each cell."""
    cells = {name: cell["by_instances"][figure] for name, cell in found["cells"].items()}
    cells = {name: groups for name, groups in cells.items() if any(map(_pair, groups.values()))}
    if not cells:
        return None
    groups = list(next(iter(cells.values())))
    axes.set_ylabel(label(figure))
    if not found["x_name"]:
        rows = {name: [_pair(spreads[group]) for group in groups] for name, spreads in cells.items()}
        _grouped_bars(axes, groups, rows)
        axes.set_xlabel("true instances")
        return f"{label(figure)} by number of true instances"
    x_of = {name: found["cells"][name]["x"] for name in cells}
    names = sorted((name for name in cells if x_of[name] is not None), key=lambda name: x_of[name])
    for group in groups:
        known = [(k, pair) for k, name in enumerate(names) if (pair := _pair(cells[name][group]))]
        if known:
            places, pairs = zip(*known, strict=True)
            means, deviations = zip(*pairs, strict=True)
            axes.errorbar(places, means, deviations, marker="o", markersize=4, capsize=2, label=group)
    axes.set_xticks(range(len(names)), [f"{x_of[name]:g}" for name in names])
    axes.set_xlabel(found["x_name"])
    axes.set_ylim(bottom=0)
    axes.get_figure().legend(title="true instances", loc="outside right upper", frameon=False)
    return f"{label(figure)} against {found['x_name']} by number of true instances"


def _grouped_bars(axes: Any, groups: Sequence[str], rows: Mapping[str, Sequence[Pair | None]]) -> None:
    width = 0.85 / len(rows)
    for number, (name, pairs) in enumerate(rows.items()):
        known = [(k + (number + 0.5) * width - 0.425, *pair) for k, pair in enumerate(pairs) if pair]
        places, means, deviations = zip(*known, strict=True)
        axes.bar(places, means, width, yerr=deviations, label=name, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    axes.get_figure().legend(loc="outside right upper", frameon=False)


def _duplicates(axes: Any, found: Mapping[str, Any]) -> str | None:
    """A bar a cell, the first on top."""
    bars = {name: _pair(cell["figures"].get("duplicate_rate")) for name, cell in found["cells"].items()}
    known = {name: pair for name, pair in bars.items() if pair}
    if not known:
        return None
    means, deviations = zip(*known.values(), strict=True)
    axes.barh(list(known), means, xerr=deviations, height=0.6, error_kw={"elinewidth": 0.8})
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("duplicate rate")
    axes.grid(visible=False, axis="y")
    return "Duplicate rate by cell"


def _cost(axes: Any, found: Mapping[str, Any], key: str, name: str) -> str | None:
    """The first figure of every cell with a training of its own, against one of its costs if that differs."""
    figure, costs = found["figures"][0], list[float]()
    for cell_name, cell in found["cells"].items():
        spent, pair = cell["cost"][key]["mean"], _pair(cell["figures"][figure])
        if spent is not None and pair is not None and cell.get("trained_as") is None:
            marker = "osDv^P*X"[len(costs) % 8]
            axes.errorbar(spent, pair[0], pair[1], marker=marker, linestyle="", capsize=2, label=cell_name)
            costs.append(spent)
    if len(set(costs)) < 2:
        return None
    axes.set_xlabel(name)
    axes.set_ylabel(label(figure))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.tick_params(axis="x", rotation=20 if key == "parameters" else 0)
    axes.get_figure().legend(loc="outside right upper", frameon=False)
    return f"{label(figure)} against {name}"


def _pair(spread: Mapping[str, Any] | None) -> Pair | None:
    return None if spread is None or spread["mean"] is None else (spread["mean"], spread["deviation"] or 0.0)
