"""Which evaluation records are worth a look, and galleries of them: truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from instructsam.evaluation.measure import Measured
from instructsam.visualization import GalleryRow, gallery, save_png

SECTIONS = {
    "worst": "Targets missed or met badly: lowest IoU first, at equal IoU the most confident.",
    "best": "Highest IoU first, at equal IoU the most instances.",
    "duplicates": "Several kept masks of one phrase on the same pixels, most of them first.",
    "false positives": "Nothing was asked for that is there, yet something was kept: highest score first.",
}


def spread(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` records, taken in turn from every kind in the order of their first appearance."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record.get("kind", ""), []).append(record)
    rounds = zip_longest(*kinds.values())
    return [record for group in rounds for record in group if record is not None][:count]


def sort_out(measured: Sequence[Measured]) -> dict[str, list[int]]:
    """Indices of the measured records that belong to each of ``SECTIONS``, the most telling first.

    An instruction is among the worst or the best, never both: the worst have IoU < 0.5, the best at least that.
    """

    def top(one: Measured) -> float:
        return float(one.scores_P.max()) if len(one.scores_P) else 0.0

    numbered = list(enumerate(measured))
    targets = [(index, one) for index, one in numbered if one.num_truths > 0]
    found: dict[str, list[tuple[float, float, int]]] = {
        "worst": sorted((one.iou, -top(one), index) for index, one in targets if one.iou < 0.5),
        "best": sorted((-one.iou, -one.num_truths, index) for index, one in targets if one.iou >= 0.5),
        "duplicates": sorted((-one.num_duplicates, one.iou, index) for index, one in numbered if one.num_duplicates),
        "false positives": sorted(
            (0.0, -top(one), index) for index, one in numbered if one.num_truths == 0 and not one.is_empty
        ),
    }
    return {section: [index for _, _, index in found[section]] for section in SECTIONS}


def write_gallery(records: Sequence[dict[str, Any]], path: str | Path, rows: int = 8, columns: int = 2) -> None:
    """Write a PNG (under 300 KB) of `rows` instructions, each with truth and prediction."""
    chosen = spread(records, rows)
    tiles = [GalleryRow.from_record(record, record["image"]) for record in chosen]
    save_png(gallery(tiles, columns=columns, cell=240), path)
