"""The parts of a COCO instances JSON file by their ids; what an entry holds beyond that is left to the reader.

{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"id", "image_id", ...}],
 "categories": [{"id", "name"}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructsam.data.checks import Skips, is_id, is_size, read_json


def load_instances(path: Path) -> dict[str, Any]:
    """The whole file. Raises ValueError, naming it, where it is not of that form."""
    coco = read_json(path)
    if not isinstance(coco, dict):
        raise ValueError(f"{path}: expected an object with images and annotations, got {type(coco).__name__}")
    for key in ("images", "annotations"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{path}: has no list {key!r}")
    return coco


def categories_by_id(path: Path, entries: Any) -> dict[Any, str]:
    """Names by id. Raises ValueError for an entry without either."""
    try:
        return {entry["id"]: str(entry["name"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: every entry of categories needs id and name") from error


def images_by_id(path: Path, entries: list[Any], skips: Skips) -> dict[Any, dict[str, Any]]:
    """The usable images by id."""
    images: dict[Any, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: images[{index}]"
        reason = _why_no_image(entry)
        if reason is None and entry["id"] in images:
            reason = f"id {entry['id']!r} occurs a second time"
        if reason is not None:
            skips.bad("images", f"{where}: {reason}")
            continue
        images[entry["id"]] = entry
    return images


def _why_no_image(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, got {type(entry).__name__}"
    if not is_id(entry.get("id")):
        return f"id must be a number or a string, got {entry.get('id')!r}"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return "has no file_name"
    for key in ("height", "width"):
        if not is_size(entry.get(key)):
            return f"{key} must be a positive number of pixels, got {entry.get(key)!r}"
    return None


def annotations_by_image(
    path: Path, entries: list[Any], known: set[Any], skips: Skips
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Annotations (with their place in the file) by image id; their contents are not looked at yet."""
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    seen: set[Any] = set()
    for index, entry in enumerate(entries):
        where = f"{path}: annotations[{index}]"
        if not isinstance(entry, dict) or not is_id(entry.get("id")):
            skips.bad("annotations", f"{where}: expected an object with an id")
        elif entry["id"] in seen:
            skips.bad("annotations", f"{where}: id {entry['id']!r} occurs a second time")
        elif not is_id(entry.get("image_id")) or entry["image_id"] not in known:
            skips.bad("annotations", f"{where} (id {entry['id']!r}): unknown image_id {entry.get('image_id')!r}")
        else:
            seen.add(entry["id"])
            by_image.setdefault(entry["image_id"], []).append((index, entry))
    return by_image
