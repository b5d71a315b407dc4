"""The parts of a COCO instances JSON file by their ids; what an entry holds beyond that is left to the reader.

{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"id", "image_id", ...}],
 "categories": [{"id", "name"}]}
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from instructsam.data.checks import Place, Skips, check_size, is_id, read_json
from instructsam.data.release_markup import check_file_name
from instructsam.errors import Consequence, DataError


def load_instances(path: Path) -> dict[str, Any]:
    """The whole file. Raises ValueError, naming it, where it is not of that form."""
    coco = read_json(path)
    if not isinstance(coco, dict):
        raise DataError(f"{path}: expected an object with images and annotations, got {type(coco).__name__}", "field")
    for key in ("images", "annotations"):
        if not isinstance(coco.get(key), list):
            raise DataError(f"{path}: has no list {key!r}", "field")
    return coco


def categories_by_id(path: Path, entries: Any) -> dict[Any, str]:
    """Names by id. Raises ValueError for an entry without either."""
    try:
        return {entry["id"]: str(entry["name"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: every entry of categories needs id and name", "field") from error


def images_by_id(path: Path, entries: list[Any], skips: Skips) -> dict[Any, dict[str, Any]]:
    """The usable images by id."""
    images: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        with skips.entry("images", Place(path, f"images[{index}]")):
            _check_image(entry)
            if entry["id"] in images:
                raise DataError(f"id {entry['id']!r} occurs a second time", "duplicate")
            images[entry["id"]] = entry
    return images


def _check_image(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {type(entry).__name__}", "field")
    if not is_id(entry.get("id")):
        raise DataError(f"id must be a number or a string, got {entry.get('id')!r}", "field")
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        raise DataError("has no file_name", "field")
    check_file_name(entry["file_name"])
    check_size(entry.get("height"), entry.get("width"))


def annotations_by_image(
    path: Path, entries: list[Any], known: set[Any], skips: Skips, lost: Collection[Any] = ()
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Annotations (with their place in the file) by image id; their contents are not looked at yet.

    Args:
        known, lost: ids of the images that are usable, and of those that were left out as bad.
    """
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    seen: set[Any] = set()
    for index, entry in enumerate(entries):
        with skips.entry("annotations", Place(path, annotation_name(index, entry))):
            if not isinstance(entry, dict) or not is_id(entry.get("id")):
                raise DataError("expected an object with an id", "field")
            if entry["id"] in seen:
                raise DataError(f"id {entry['id']!r} occurs a second time", "duplicate")
            if not is_id(entry.get("image_id")) or entry["image_id"] not in known:
                if is_id(entry.get("image_id")) and entry["image_id"] in lost:
                    raise Consequence(f"image {entry['image_id']!r} was left out", "reference")
                raise DataError(f"unknown image_id {entry.get('image_id')!r}", "reference")
            seen.add(entry["id"])
            by_image.setdefault(entry["image_id"], []).append((index, entry))
    return by_image


def listed_ids(entries: list[Any]) -> set[Any]:
    """The ids of all entries that have one, of bad ones too."""
    return {entry["id"] for entry in entries if isinstance(entry, dict) and is_id(entry.get("id"))}


def annotation_name(index: int, entry: Any) -> str:
    """How messages call an annotation: its place in the list, and its id where it has one."""
    identity = entry.get("id") if isinstance(entry, dict) else None
    return f"annotations[{index}]" + (f" (id {identity!r})" if is_id(identity) else "")
