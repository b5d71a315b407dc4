"""Masks and boxes as the release's JSON writes them: objects or JSON texts of them, RLEs and polygons in any nesting.

Everything is looked through here, and handed to `instructsam.masks` in a form that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from reprlib import repr as short
from typing import Any

from instructsam import masks
from instructsam.data.checks import check_four, is_number, parse_json
from instructsam.errors import DataError, at
from instructsam.structures import RLE

POLYGON_KEYS = ("segmentation", "polygons", "polygon")
"""Keys under which an object that is no RLE may hold polygons (or an RLE); the first that is there counts."""


def parse_text(value: Any, what: str) -> Any:
    """The value of a JSON text; anything else is taken to be parsed already."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except DataError as error:
        raise at(what, error) from None


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _are_points(value: Any) -> bool:
    return isinstance(value, list) and all(_are_numbers(point) and len(point) == 2 for point in value)


def instances_of(entry: Any, what: str) -> list[tuple[str, Any]]:
    """The instances of one entry of ``mask``: none, a mask (RLE or polygons), or a list of masks."""
    entry = parse_text(entry, what)
    if entry is None or entry == []:
        return []
    if not isinstance(entry, list) or all(_are_numbers(one) or is_number(one) or _are_points(one) for one in entry):
        return [(what, entry)]
    return [(name := f"{what}[{k}]", parse_text(one, name)) for k, one in enumerate(entry)]


def check_each(rles: list[Any]) -> list[RLE | None]:
    """Checked RLEs, None in place of bad ones; where one is bad, the half without it is still checked at once."""
    try:
        return list(masks.check_rles(rles)) if rles else []
    except ValueError:
        if len(rles) == 1:
            return [None]
        middle = len(rles) // 2
        return check_each(rles[:middle]) + check_each(rles[middle:])


@lru_cache(maxsize=4096)
def _empty(height: int, width: int) -> str:
    """The counts of a mask without a pixel: canonical codes of the same mask are equal."""
    return masks.empty_rle(height, width)["counts"]


def refuse_empty(rle: RLE, what: str) -> None:
    """Raises DataError for a checked RLE without a pixel."""
    if rle["counts"] == _empty(*rle["size"]):
        raise DataError(f"{what}: the mask is empty (area 0)", "mask empty")


def mask_of(shape: Any, height: int, width: int, what: str) -> RLE:
    """One instance: an RLE, the polygons of it, or one polygon. Raises DataError naming ``what`` and the reason."""
    if isinstance(shape, Mapping) and "counts" not in shape:
        shape = next((shape[key] for key in POLYGON_KEYS if key in shape), shape)
    if isinstance(shape, Mapping):
        return masks.check_rle(shape, height, width, what)
    polygons = [shape] if shape and _are_numbers(shape) else shape
    if not isinstance(polygons, list) or not all(_are_numbers(one) or _are_points(one) for one in polygons):
        raise DataError(f"{what}: expected an RLE or polygons, got {short(shape)}", "polygon form")
    return masks.polygons_to_rle(polygons, height, width, what)


def box_of(value: Any, height: int, width: int, what: str) -> RLE:
    """[x, y, w, h] in pixels as a filled box. Raises DataError naming ``what`` and the reason."""
    try:
        x, y, w, h = map(float, check_four(value, what))
    except OverflowError:  # a whole number that is too large to be a float
        raise DataError(f"{what}: holds a coordinate beyond all bounds", "box outside") from None
    return masks.box_to_rle([x, y, x + w, y + h], height, width, what)
