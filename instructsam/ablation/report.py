"""The report of an ablation, from the records that its cells left: whatever is there, and what is not, with the reason.

Files in the output folder: report.md, tables.tex, summary.csv (a row a cell), cells.csv (a row a cell and seed),
figures.json (all numbers), records.parquet (every instruction of every run), plots/*.svg.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from instructsam.ablation.cells import Ablation
from instructsam.ablation.cost import COSTS, cost_of
from instructsam.ablation.plots import write_plots
from instructsam.ablation.raw import write_raw
from instructsam.ablation.state import COMPLETE, Place, status_of
from instructsam.ablation.statistics import CONVENTIONS, by_instances, by_kind, paired, spread_of
from instructsam.evaluation import bootstrap
from instructsam.evaluation.comparison import Run, aligned_records, check_rules, load_run
from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.metrics import summarise
from instructsam.evaluation.report import markdown_table
from instructsam.evaluation.tables import NOTHING, Rows, change, label, number, value_of
from instructsam.files import replace_text

Statuses: TypeAlias = "Mapping[tuple[str, int], tuple[str, str]]"
"""(cell, seed) -> what `status_of` says."""
GROUPED_FIGURES = ("AP50", "count_error", "duplicate_rate")  # by number of instances; the first also by kind
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"} | {">": "$>$", "<": "$<$", "…": r"\ldots{}"}


def write_report(ablation: Ablation, output: str | Path, resamples: int = bootstrap.RESAMPLES) -> dict[str, Any]:
    """Write all files; returns what figures.json holds.

    Raises:
        ValueError: a figure that is unknown, cells evaluated by different rules or on other instructions, or records
            that cannot be read.
    """
    output = Path(output)
    # Looked at once: a sweep may be at work meanwhile.
    statuses = {(c.name, seed): status_of(ablation, output, c, seed) for c, seed in ablation.order()}
    runs = load_runs(ablation, output, statuses)
    found = collect(ablation, output, statuses, runs, resamples)
    write_raw(runs, output / "records.parquet")
    plots = write_plots(found, output / "plots")
    replace_text(output / "figures.json", json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    tables = tables_of(found)
    replace_text(output / "report.md", _markdown(found, tables, plots))
    replace_text(output / "tables.tex", "\n".join(latex(rows, caption) for caption, rows in tables.items()))
    replace_text(output / "summary.csv", as_csv(_summary_rows(found)))
    replace_text(output / "cells.csv", as_csv(_cell_rows(found)))
    return found


def load_runs(ablation: Ablation, output: Path, statuses: Statuses) -> dict[str, dict[int, Measurements]]:
    """Cell -> seed -> measured records of what is complete, all on the same instructions in the same order."""
    runs: dict[str, dict[int, Measurements]] = {name: {} for name in ablation.cells}
    first: Run | None = None
    for name, cell in ablation.cells.items():
        for seed in ablation.seeds:
            if statuses[name, seed][0] == COMPLETE:
                run = load_run(Place.of(output, cell, seed).eval / "metrics.json")
                first = first or run
                check_rules(first, run)
                runs[name][seed] = measure(aligned_records(first, run), run.score_threshold, run.min_area)
    return runs


def collect(
    ablation: Ablation,
    output: Path,
    statuses: Statuses,
    runs: Mapping[str, Mapping[int, Measurements]],
    resamples: int,
) -> dict[str, Any]:
    """All numbers of the report."""
    for figure in (*ablation.figures, *GROUPED_FIGURES):
        if not bootstrap.is_known(figure):
            raise ValueError(f"ablation.figures: {figure!r} is no figure that can be resampled; see evaluation.metrics")
    cells: dict[str, Any] = {}
    for name, cell in ablation.cells.items():
        per_seed = {}
        for seed in ablation.seeds:
            status, reason = statuses[name, seed]
            entry: dict[str, Any] = {"status": status, "reason": reason}
            if status == COMPLETE:
                measured = runs[name][seed]
                overall = summarise(measured)
                entry["figures"] = {figure: value_of(overall, figure) for figure in ablation.figures}
                entry["by_instances"] = by_instances(measured, GROUPED_FIGURES)
                entry["by_kind"] = by_kind(measured, GROUPED_FIGURES[0])
                entry["cost"] = cost_of(ablation, output, cell, seed)
            per_seed[str(seed)] = entry
        cells[name] = {"x": cell.x, "trained_as": cell.trained_as, "seeds": per_seed, **_spreads(ablation, per_seed)}
    for name in cells:
        if name != ablation.default:
            found = paired(runs[name], runs[ablation.default], ablation.figures, resamples)
            cells[name]["against_default"] = found
    return {
        "name": ablation.name,
        "title": ablation.title,
        "default": ablation.default,
        "x_name": ablation.x_name,
        "seeds": list(ablation.seeds),
        "figures": list(ablation.figures),
        "grouped_figures": list(GROUPED_FIGURES),
        "num_instructions": max((len(one) for seeds in runs.values() for one in seeds.values()), default=0),
        "cells": cells,
        "conventions": {**CONVENTIONS, "resamples": resamples},
    }


def _spreads(ablation: Ablation, per_seed: Mapping[str, Any]) -> dict[str, Any]:
    done = [entry for entry in per_seed.values() if entry["status"] == COMPLETE]

    def over(*keys: str) -> dict[str, Any]:
        """The spreads of a mapping of each seed."""
        found: list[Any] = [functools.reduce(operator.getitem, keys, entry) for entry in done]
        return {key: spread_of([values[key] for values in found]) for key in (found[0] if found else ())}

    return {
        "figures": {key: spread_of([entry["figures"][key] for entry in done]) for key in ablation.figures},
        "by_instances": {figure: over("by_instances", figure) for figure in GROUPED_FIGURES},
        "by_kind": over("by_kind"),
        "cost": {key: spread_of([entry["cost"][key] for entry in done]) for key in COSTS.values()},
    }


# ---- tables -----------------------------------------------------------------------------------------------------


def tables_of(found: Mapping[str, Any]) -> dict[str, Rows]:
    """Caption -> rows of the tables of report.md and tables.tex."""
    default, figures = found["default"], found["figures"]
    names = {name: f"{name} (default)" if name == default else name for name in found["cells"]}
    main = [["cell", "seeds", *map(label, figures)]]
    against = [["cell", "figure", "seeds", "difference", "interval", "p", "p (t-test)"]]
    costs = [["cell", *COSTS]]
    for name, cell in found["cells"].items():
        done = sum(entry["status"] == COMPLETE for entry in cell["seeds"].values())
        main.append([names[name], f"{done}/{len(cell['seeds'])}", *(plus_minus(cell["figures"][k]) for k in figures)])
        costs.append([names[name], *(_cost(cell["cost"][key]["mean"]) for key in COSTS.values())])
        for figure, row in cell.get("against_default", {}).items():
            interval = NOTHING if row["low"] is None else f"{change(row['low'])} … {change(row['high'])}"
            tests = [NOTHING if row[key] is None else f"{row[key]:.3g}" for key in ("p", "p_t_test")]
            against.append([name, label(figure), str(row["n"]), change(row["difference"]), interval, *tests])
    tables = {"Figures, mean ± deviation over seeds": main, f"Differences from {default}": against}
    for figure in found["grouped_figures"]:
        rows = {names[name]: cell["by_instances"][figure] for name, cell in found["cells"].items()}
        tables[f"{label(figure)} by number of true instances"] = _grouped(rows)
    rows = {names[name]: cell["by_kind"] for name, cell in found["cells"].items()}
    tables[f"{label(found['grouped_figures'][0])} by kind of instruction"] = _grouped(rows)
    tables["Cost"] = costs
    if gone := _not_complete(found):
        tables["Not complete"] = [["cell", "seed", "status", "reason"], *gone]
    return tables


def _grouped(cells: Mapping[str, Mapping[str, Any]]) -> Rows:
    """A column for every group; the header alone where no cell has any."""
    groups = next((list(spreads) for spreads in cells.values() if spreads), [])
    rows = [[name, *(plus_minus(spreads.get(group)) for group in groups)] for name, spreads in cells.items()]
    return [["cell", *groups], *(rows if groups else [])]


def _not_complete(found: Mapping[str, Any]) -> Rows:
    return [
        [name, seed, entry["status"], entry["reason"]]
        for name, cell in found["cells"].items()
        for seed, entry in cell["seeds"].items()
        if entry["status"] != COMPLETE
    ]


def plus_minus(spread: Mapping[str, Any] | None) -> str:
    """ "0.512 ± 0.013"; without a deviation the mean alone."""
    if spread is None or spread["mean"] is None:
        return NOTHING
    return number(spread["mean"]) + (f" ± {spread['deviation']:.3f}" if spread["deviation"] is not None else "")


def _cost(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(found: Mapping[str, Any], tables: Mapping[str, Rows], plots: Mapping[str, str]) -> str:
    parts = [f"# Ablation: {found['title']}", f"{found['num_instructions']} instructions."]
    for caption, rows in tables.items():
        parts += [f"## {caption}", markdown_table(rows) if len(rows) > 1 else "Nothing yet."]
    if plots:
        parts += ["## Plots", *(f"![{title}](plots/{name})" for name, title in plots.items())]
    rules = [f"- {name}: {rule}" for name, rule in found["conventions"].items()]
    return "\n\n".join([*parts, "## Conventions", "\n".join(rules)]) + "\n"


def latex(rows: Rows, caption: str) -> str:
    """A table environment (package booktabs)."""
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    table = [f"\\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]
    return "\n".join([r"\begin{table}", r"\centering", f"\\caption{{{_latex(caption)}}}", *table, r"\end{table}", ""])


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _summary_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    parts = ("mean", "deviation", "n")
    tests = ("difference", "low", "high", "p", "p_t_test")
    header = ["cell", "x", "complete", "planned"]
    header += [f"{figure} {part}" for figure in found["figures"] for part in (*parts, *tests)]
    rows = [header]
    for name, cell in found["cells"].items():
        done = sum(entry["status"] == COMPLETE for entry in cell["seeds"].values())
        row: list[Any] = [name, cell["x"], done, len(cell["seeds"])]
        for figure in found["figures"]:
            compared = cell.get("against_default", {}).get(figure, {})
            row += [cell["figures"][figure][part] for part in parts] + [compared.get(test) for test in tests]
        rows.append(row)
    return rows


def _cell_rows(found: Mapping[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["cell", "seed", "status", "reason", *found["figures"], *COSTS.values()]]
    for name, cell in found["cells"].items():
        for seed, entry in cell["seeds"].items():
            figures, cost = entry.get("figures", {}), entry.get("cost", {})
            row = [name, seed, entry["status"], entry["reason"], *(figures.get(key) for key in found["figures"])]
            rows.append([*row, *(cost.get(key) for key in COSTS.values())])
    return rows


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated, floats in full, None as an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
