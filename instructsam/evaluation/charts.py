"""The charts of a report as inline SVG, coloured by the classes of report.css so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from instructsam.evaluation.curves import Calibration, Curve
from instructsam.evaluation.markup import Node, node

WIDTH, HEIGHT = 380, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 42
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def precision_recall_chart(curves: Sequence[Curve]) -> Node:
    """One line a curve, of classes series-0, series-1, ..."""
    picture = _frame("Precision over recall", "recall", "precision", _fractions())
    for number, curve in enumerate(curves):
        points = zip(curve.recall_R.tolist(), curve.precision_R.tolist(), strict=True)
        path = " ".join(f"{_x(recall):.1f},{_y(precision):.1f}" for recall, precision in points)
        picture.append(node("polyline", node("title", curve.name), points=path, class_=f"line series-{number}"))
    return picture


def calibration_chart(bins: Calibration) -> Node:
    """A bar of precision for every bin of scores that has predictions, beside the diagonal of perfect scores."""
    picture = _frame("Precision over score", "score", "precision at IoU 0.5", _fractions())
    for number, count in enumerate(bins.count_B.tolist()):
        if not count:
            continue
        low, high = bins.edges[number], bins.edges[number + 1]
        precision, score = float(bins.precision_B[number]), float(bins.score_B[number])
        label = f"scores {low:.1f}…{high:.1f}: precision {precision:.3f}, mean score {score:.3f}, {count} predictions"
        # A bar of height 0 still shows that there are predictions.
        size = {"x": _x(low) + 1, "width": _x(high) - _x(low) - 2, "y": _y(precision)}
        bar = node("rect", node("title", label), height=max(_y(0) - _y(precision), 1), class_="bar series-0", **size)
        picture.append(bar)
        picture.append(node("circle", node("title", label), cx=_x(score), cy=_y(precision), r=3, class_="mark"))
        # Above the bar, or in its head where there is no room above.
        text_y = _y(precision) - 6 if precision < 0.9 else _y(precision) + 14
        picture.append(node("text", _short(count), x=(_x(low) + _x(high)) / 2, y=text_y, class_="value"))
    picture.append(node("line", x1=_x(0), y1=_y(0), x2=_x(1), y2=_y(1), class_="diagonal"))
    return picture


def count_chart(table: NDArray[np.int64]) -> Node:
    """Two bars a number of instances: instructions that have as many, and instructions for which as many were kept."""
    true, kept = table.sum(axis=1), table.sum(axis=0)
    highest = max(int(true.max()), int(kept.max()), 1)
    last = len(true) - 1
    slot = 1 / len(true)
    names = [(str(number) if number < last else f"≥{last}", (number + 0.5) * slot) for number in range(len(true))]
    steps = [(_short(round(highest * share)), share) for share in (0, 0.5, 1)]
    picture = _frame("Instructions by number of instances", "instances", "instructions", names, steps)
    for number, name in enumerate(name for name, _ in names):
        for series, (counts, what) in enumerate(((true, "true"), (kept, "kept"))):
            count = int(counts[number])
            label, start = f"{name} {what} instances: {count} instructions", (number + 0.12 + 0.38 * series) * slot
            picture.append(_bar(label, start, 0.38 * slot, count / highest, series))
    return picture


def share_chart(title: str, x_name: str, y_name: str, names: Sequence[str], shares: Sequence[float]) -> Node:
    """One bar a name, as high as its share (0…1) of the whole; the axis ends at the largest."""
    highest = max([*shares, 1e-9])
    slot = 1 / len(names)
    steps = [(f"{highest * part:.0%}" if highest >= 0.1 else f"{highest * part:.1%}", part) for part in (0, 0.5, 1)]
    picture = _frame(title, x_name, y_name, [(name, (k + 0.5) * slot) for k, name in enumerate(names)], steps)
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        picture.append(_bar(f"{name}: {share:.2%}", (number + 0.1) * slot, 0.8 * slot, share / highest))
    return picture


def _bar(label: str, start: float, width: float, height: float, series: int = 0) -> Node:
    """A bar that stands on the axis; places and sizes in 0…1."""
    size = {"x": _x(start), "y": _y(height), "width": width * INNER_WIDTH, "height": _y(0) - _y(height)}
    return node("rect", node("title", label), class_=f"bar series-{series}", **size)


def _frame(
    title: str,
    x_name: str,
    y_name: str,
    x_steps: Sequence[tuple[str, float]],
    y_steps: Sequence[tuple[str, float]] | None = None,
) -> Node:
    """Axes with names and steps (text, place in 0…1)."""
    picture = node("svg", node("title", title), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    for text, place in y_steps if y_steps is not None else x_steps:
        picture.append(node("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_y(place), y2=_y(place), class_="grid"))
        picture.append(node("text", text, x=LEFT - 6, y=_y(place) + 4, class_="step y"))
    for text, place in x_steps:
        picture.append(node("text", text, x=_x(place), y=HEIGHT - BOTTOM + 16, class_="step"))
    picture.append(node("text", x_name, x=LEFT + INNER_WIDTH / 2, y=HEIGHT - 6, class_="axis"))
    middle = TOP + INNER_HEIGHT / 2
    picture.append(node("text", y_name, x=12, y=middle, class_="axis", transform=f"rotate(-90 12 {middle})"))
    return picture


def _fractions() -> list[tuple[str, float]]:
    return [(f"{step / 4:g}", step / 4) for step in range(5)]


def _x(value: float) -> float:
    return round(LEFT + float(value) * INNER_WIDTH, 2)


def _y(value: float) -> float:
    return round(TOP + (1 - float(value)) * INNER_HEIGHT, 2)


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
