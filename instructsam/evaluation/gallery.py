"""A gallery of evaluation records: truth beside prediction, spread over the kinds of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from instructsam.visualization import GalleryRow, gallery, save_png


def spread(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` records, taken in turn from every kind in the order of their first appearance."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        kinds.setdefault(record.get("kind", ""), []).append(record)
    rounds = zip_longest(*kinds.values())
    return [record for group in rounds for record in group if record is not None][:count]


def write_gallery(records: Sequence[dict[str, Any]], path: str | Path, rows: int = 8, columns: int = 2) -> None:
    """Write a PNG (under 300 KB) of `rows` instructions, each with truth and prediction."""
    chosen = spread(records, rows)
    tiles = [GalleryRow.from_record(record, record["image"]) for record in chosen]
    save_png(gallery(tiles, columns=columns, cell=240), path)
