"""The tables of a report, as lists of rows of text; the first row is the header.

Figures are in 0...1 with three decimals; a cell that has nothing to show is "–", also where the number stored is a
convention and no measurement (AP without any ground truth, cIoU without any pixel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]
Rows = list[list[str]]

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
# Shown where they were measured, since they belong to one protocol only.
EXTRA_FIGURES = {"cgF1": "cgf1", "pmF1": "pmf1", "IL_MCC": "il_mcc"}
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
TERMINAL_COLUMNS = 9  # leaves room for names
# Heading, name of the first column, key of the metrics.
BREAKDOWNS = (
    ("By instruction kind", "kind", "by_kind"),
    ("By number of true instances", "instances", "by_count"),
    ("By area of the true instances", "area", "by_area"),
    ("By length of the expression in words", "words", "by_phrase_length"),
)
RELIANCE_FIGURES = ("AP50", "mAP")


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


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def change(value: float | None) -> str:
    return NOTHING if value is None else f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def count(figures: Figures | None, key: str) -> str:
    return NOTHING if figures is None or figures.get(key) is None else str(figures[key])


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


# ---- what stands beside a figure --------------------------------------------------------------------------------


def interval_of(metrics: Figures, key: str) -> tuple[float, float] | None:
    """The confidence interval of an overall figure, or None where the metrics hold none."""
    pair = (metrics.get("intervals") or {}).get(key)
    return None if not isinstance(pair, list | tuple) or None in pair else (float(pair[0]), float(pair[1]))


def interval(metrics: Figures, key: str) -> str:
    pair = interval_of(metrics, key)
    return NOTHING if pair is None else f"{pair[0]:.3f}…{pair[1]:.3f}"


def published_of(metrics: Figures) -> dict[str, dict[str, float]]:
    """System → figures of the benchmark's published runs, in 0...1; figures of one kind are called "giou (stuff)"."""
    systems: dict[str, dict[str, float]] = {}
    for entry in (metrics.get("benchmark") or {}).get("published") or ():
        key = f"{entry['figure']} ({entry['kind']})" if entry.get("kind") else entry["figure"]
        systems.setdefault(entry["system"], {})[key] = float(entry["value"])
    return systems


def label(key: str) -> str:
    """How a figure is called in a report; "giou (stuff)" is "gIoU (stuff)"."""
    key, separator, kind = key.partition(" (")
    names = {known: name for name, known in {**FIGURES, **EXTRA_FIGURES}.items()}
    return names.get(key, key) + separator + kind


def figures_shown(metrics: Figures) -> dict[str, str]:
    """Name → key of the figures of a report: the benchmark's headline first, then the others."""
    known = {**FIGURES, **{name: key for name, key in EXTRA_FIGURES.items() if key in metrics["overall"]}}
    headline = {label(key): key for key in (metrics.get("benchmark") or {}).get("headline") or ()}
    return {**headline, **known}


def breakdown_columns(metrics: Figures) -> dict[str, str]:
    """Name → key of the columns of a breakdown: the benchmark's headline first, then the usual ones."""
    names = {key: name for name, key in BREAKDOWN.items()}
    headline = (metrics.get("benchmark") or {}).get("headline") or ()
    return {**{names.get(key, label(key)): key for key in headline}, **BREAKDOWN}


# ---- tables -----------------------------------------------------------------------------------------------------


def beside(metrics: Figures, baseline: Figures | None, published: Mapping[str, Figures]) -> Rows:
    """One row a figure: this run with its interval, then the baseline and the change, then published runs."""
    others = list(published.values())
    with_intervals = bool(metrics.get("intervals"))
    rows = [["figure", "this run"]]
    rows[0] += [*(["interval"] if with_intervals else []), *(["untrained", "change"] if baseline else []), *published]
    ours, theirs = metrics["overall"], baseline["overall"] if baseline else None
    for name, key in COUNTS.items():
        middle = [NOTHING] if with_intervals else []
        middle += [count(theirs, key), NOTHING] if baseline else []
        rows.append([name, count(ours, key), *middle, *(count(other, key) for other in others)])
    for name, key in figures_shown(metrics).items():
        value, other_value = value_of(ours, key), value_of(theirs, key)
        middle = [interval(metrics, key)] if with_intervals else []
        middle += [number(other_value), change(difference(value, other_value))] if baseline else []
        rows.append([name, number(value), *middle, *(number(value_of(other, key)) for other in others)])
    return rows + _published_of_kinds(metrics, len(rows[0]) - len(others), published)


def _published_of_kinds(metrics: Figures, width: int, published: Mapping[str, Figures]) -> Rows:
    """Rows for published figures of a single kind, each beside this run's figure of that kind."""
    rows = []
    for full in dict.fromkeys(key for figures in published.values() for key in figures if key.endswith(")")):
        key, kind = full.removesuffix(")").split(" (", 1)
        ours = number(value_of(metrics.get("by_kind", {}).get(kind), key))
        others = [number(figures.get(full)) for figures in published.values()]
        rows.append([label(full), ours, *[NOTHING] * (width - 2), *others])
    return rows


def breakdown(
    name: str, groups: Mapping[str, Figures], baseline: Mapping[str, Figures] | None, columns: Mapping[str, str]
) -> Rows:
    """One row a group; with a baseline, its AP50 in the last column."""
    rows = [[name, "n", *columns, *(["AP50 untr."] if baseline is not None else [])]]
    for group, figures in groups.items():
        cells = [number(value_of(figures, key)) for key in columns.values()]
        if baseline is not None:
            cells.append(number(value_of(baseline.get(group), "AP50")))
        rows.append([group, count(figures, "num_samples"), *cells])
    return rows


def reliance_rows(compared: Mapping[str, Any], figure: str) -> Rows:
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
            row += [count(group, "num_samples"), number(triple.get("real")), number(triple.get("replaced"))]
            row.append(change(triple.get("fall")))
        rows.append(row)
    return rows
