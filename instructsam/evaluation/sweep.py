"""Figures over thresholds of the score, and the best threshold, which may be chosen on validation data only.

The records have to list predictions down to the lowest threshold looked at: an evaluation with ``threshold=0.3`` has
thrown away what lies below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from instructsam.evaluation.measure import Measurements, measure
from instructsam.evaluation.metrics import summarise

THRESHOLDS = tuple(k / 20 for k in range(1, 20))
VALIDATION_SPLITS = ("val", "validation")
LOWER_IS_BETTER = ("count_error", "duplicate_rate")
_DEPENDENT = ("giou", "ciou", "n_acc", "no_target_accuracy", "t_acc", *LOWER_IS_BETTER)


def sweep(
    records: Measurements | Iterable[Mapping[str, Any]], thresholds: Sequence[float] = THRESHOLDS, *, min_area: int = 0
) -> list[dict[str, Any]]:
    """Figures at every threshold (predictions with score > threshold are kept), each with its ``threshold``.

    Masks are read once. AP, cgF1, pmF1 and IL_MCC do not depend on the threshold: they are the same in every row.

    Raises:
        ValueError: for no thresholds, one that is not finite, or malformed records.
    """
    thresholds = [float(threshold) for threshold in thresholds]
    if not thresholds or not np.isfinite(thresholds).all():
        raise ValueError(f"thresholds must be finite numbers, at least one, got {thresholds}")
    measured = records if isinstance(records, Measurements) else measure(records)
    return [{"threshold": threshold, **summarise(measured.at(threshold, min_area))} for threshold in thresholds]


def best_threshold(
    val_records: Iterable[Mapping[str, Any]],
    figure: str,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    min_area: int = 0,
    any_split: bool = False,
) -> tuple[float, float]:
    """The threshold with the best figure, and that figure; the lowest threshold of equals.

    Args:
        val_records: records whose ``split`` is "val" or "validation".
        figure: key of `summarise` that depends on the threshold. Of a count error or a duplicate rate the least is
            best, of others the greatest.
        any_split: choose on whatever the records are; what is then reported on them is not held out.

    Raises:
        ValueError: for records of another split or of none, a figure that does not depend on the threshold, or has
            nothing to measure.
    """
    records = list(val_records)
    if not any_split:
        for index, record in enumerate(records):
            if record.get("split") not in VALIDATION_SPLITS:
                raise ValueError(
                    f"record {record.get('id', index)!r} is of split {record.get('split')!r}: a threshold is chosen on "
                    "val or validation only (any_split=True does it all the same)"
                )
    if figure not in _DEPENDENT and not figure.startswith("P@"):
        raise ValueError(f"{figure!r} is no figure that depends on the threshold of the score")
    rows = sweep(records, sorted(thresholds), min_area=min_area)
    if rows[0].get(figure) is None:
        raise ValueError(f"{figure!r} has nothing to measure in these records")
    # A duplicate rate does not exist where nothing is kept.
    rows = [row for row in rows if row[figure] is not None]
    best = (min if figure in LOWER_IS_BETTER else max)(rows, key=lambda row: row[figure])
    return best["threshold"], best[figure]
