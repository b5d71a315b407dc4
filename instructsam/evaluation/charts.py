"""The charts of a report as inline SVG, coloured by the classes of report.css so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def line_chart(
    title: str,
    x_name: str,
    y_name: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float | None] | None]],
    highest: float = 1.0,
) -> Node:
    """A line a series over equally spaced places: a value (0…highest) with its deviation, or None where there is none.

    Lines are of classes series-0, series-1, ... and named at their right end.
    """
    slot, scale = 1 / len(names), 1 / max(highest, 1e-9)
    picture = _frame(title, x_name, y_name, [(name, (k + 0.5) * slot) for k, name in enumerate(names)], _steps(highest))
    for number, (name, values) in enumerate(series.items()):
        known = [((k + 0.5) * slot, *value) for k, value in enumerate(values) if value is not None]
        path = " ".join(f"{_x(x)},{_y(y * scale)}" for x, y, _ in known)
        picture.append(node("polyline", node("title", name), points=path, class_=f"line series-{number}"))
        for x, y, deviation in known:
            label = node("title", f"{name}: {y:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}"))
            if deviation:
                picture.append(_whisker(x, y * scale, deviation * scale, number))
            picture.append(node("circle", label, cx=_x(x), cy=_y(y * scale), r=3, class_=f"dot series-{number}"))
        if known:
            x, y = known[-1][:2]
            picture.append(node("text", name, x=_x(x) + 6, y=_y(y * scale) - 6, class_="value name"))
    return picture


def bar_chart(
    title: str, x_name: str, y_name: str, bars: Mapping[str, tuple[float, float | None] | None], highest: float
) -> Node:
    """A bar a name: a value (0…highest) with its deviation; None leaves the place empty."""
    slot, scale = 1 / len(bars), 1 / max(highest, 1e-9)
    picture = _frame(title, x_name, y_name, [(name, (k + 0.5) * slot) for k, name in enumerate(bars)], _steps(highest))
    for number, (name, bar) in enumerate(bars.items()):
        if bar is None:
            continue
        value, deviation = bar
        label = f"{name}: {value:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
        picture.append(_bar(label, (number + 0.15) * slot, 0.7 * slot, value * scale))
        if deviation:
            picture.append(_whisker((number + 0.5) * slot, value * scale, deviation * scale, 0))
    return picture


def scatter_chart(
    title: str, x_name: str, y_name: str, points: Mapping[str, tuple[float, float, float | None]]
) -> Node:
    """A named dot each: x from 0 on, y (0…1), and the deviation of y."""
    highest = 1.1 * max([x for x, _, _ in points.values()], default=1.0) or 1.0
    x_steps = [(_amount(highest * part), part) for part in (0, 0.5, 1)]
    picture = _frame(title, x_name, y_name, x_steps, _fractions())
    for name, (x, y, deviation) in points.items():
        label = node("title", f"{name}: {x_name} {x:.4g}, {y_name} {y:.3f}")
        if deviation:
            picture.append(_whisker(x / highest, y, deviation, 0))
        picture.append(node("circle", label, cx=_x(x / highest), cy=_y(y), r=4, class_="dot series-0"))
        picture.append(node("text", name, x=_x(x / highest), y=_y(y) - 8, class_="value"))
    return picture


def _bar(label: str, start: float, width: float, height: float, series: int = 0) -> Node:
    """A bar that stands on the axis; places and sizes in 0…1."""
    size = {"x": _x(start), "y": _y(height), "width": width * INNER_WIDTH, "height": _y(0) - _y(height)}
    return node("rect", node("title", label), class_=f"bar series-{series}", **size)


def _steps(highest: float) -> list[tuple[str, float]]:
    """Marks of an axis from 0 to there."""
    return _fractions() if highest == 1.0 else [(f"{highest * part:.3g}", part) for part in (0, 0.5, 1)]


def _whisker(x: float, y: float, deviation: float, series: int) -> Node:
    low, high = max(y - deviation, 0.0), min(y + deviation, 1.0)
    return node("line", x1=_x(x), x2=_x(x), y1=_y(low), y2=_y(high), class_=f"whisker series-{series}")


def _amount(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


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
