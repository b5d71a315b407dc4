"""Reader of own data and of the tiny world: COCO instances plus instructions as JSON lines (DESIGN section 9).

Layout of a split::

    ROOT/SPLIT/images/000001.png ...
    ROOT/SPLIT/instances.json       {"images": [{"id", "file_name", "height", "width"}],
                                     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h],
                                                      "segmentation": RLE or polygons, "attributes": {...}}],
                                     "categories": [{"id", "name"}]}
    ROOT/SPLIT/instructions.jsonl   {"id": "a-1", "image_id": 1, "instruction": "the red circles", "kind": "category",
                                     "phrases": [{"phrase": "red circles", "annotation_ids": [3, 5]}]}

No annotation ids make a phrase no-target. An annotation without segmentation stands for its box. Category, attributes
and kind are optional. Pictures are not opened here, only looked for.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from instructsam import masks
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

logger = logging.getLogger(__name__)

OnBad = Literal["raise", "skip"]
_LOGGED = 20
"""So many skipped entries are logged one by one; all of them are counted."""
_BLOCK = 256
"""Images whose masks are checked together."""


@dataclass
class _Skips:
    """What to do about bad entries: raise, or count and log them up to a limit."""

    on_bad: OnBad
    max_bad: int | None
    counts: Counter[str] = field(default_factory=Counter)

    def bad(self, what: str, message: str) -> None:
        if self.on_bad == "raise":
            raise ValueError(message)
        self.counts[what] += 1
        total = self.counts.total()
        if total <= _LOGGED:
            logger.warning("skipped: %s", message)
        if self.max_bad is not None and total > self.max_bad:
            raise ValueError(f"{message}; that makes {total} bad entries, more than the {self.max_bad} allowed")


@dataclass(frozen=True)
class _Object:
    rle: RLE
    box_only: bool
    info: dict[str, Any]


def read_coco_instructions(
    root: Path | str,
    split: str,
    on_bad: OnBad = "raise",
    limit: int | None = None,
    max_bad: int | None = None,
) -> list[Sample]:
    """Read ROOT/SPLIT: one sample an image, in the order of instances.json, with all its instructions as turns.

    Images without an instruction are left out. ``Sample.objects`` holds a dict for every annotation of the image: id,
    category, bbox [x, y, w, h] in pixels, area in pixels, attributes, rle.

    Args:
        on_bad: "raise" at the first bad entry; "skip" leaves out bad instructions (and those about bad images or
            annotations), logs and counts them.
        limit: read so many images only; the others are not checked.
        max_bad: with "skip", more bad entries than this are an error.

    Raises:
        ValueError: naming file, index or line and reason: missing files, broken JSON, unknown or repeated ids, empty
            instruction or phrase, masks that are malformed, empty or of another size than their image. A file that
            cannot be read as a whole is an error with "skip" too.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1, or None for all")
    folder = Path(root) / split
    skips = _Skips(on_bad, max_bad)
    instances_file, instructions_file = folder / "instances.json", folder / "instructions.jsonl"
    coco = _load_instances(instances_file)
    categories = _categories(instances_file, coco.get("categories", []))
    images = _images(instances_file, coco["images"], skips)
    annotations = _annotations_by_image(instances_file, coco["annotations"], set(images), skips)
    lines = _instructions_by_image(instructions_file, images, skips)

    samples: list[Sample] = []
    asked = [image_id for image_id in images if image_id in lines]
    checked: dict[Any, RLE] = {}
    for number, image_id in enumerate(asked):
        if limit is not None and len(samples) == limit:
            break
        image = images[image_id]
        if number % _BLOCK == 0:
            block = {other: images[other] for other in asked[number : number + _BLOCK]}
            checked = _check_together(block, annotations)
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            skips.bad("images", f"{instances_file}: image {image_id!r}: no file {path}")
            skips.counts["instructions"] += len(lines[image_id])
            continue
        objects = _objects(instances_file, image, annotations.get(image_id, []), categories, checked, skips)
        turns = tuple(_turns(instructions_file, lines[image_id], objects, skips))
        if turns:
            infos = tuple(item.info for item in objects.values())
            samples.append(Sample(f"{split}/{image_id}", path, image["height"], image["width"], turns, infos))
    if skips.counts:
        summary = ", ".join(f"{count} {what}" for what, count in sorted(skips.counts.items()))
        logger.warning("%s: skipped %s; %d images are left", folder, summary, len(samples))
    if not samples:
        raise ValueError(f"{folder}: no image with a usable instruction")
    return samples


# ---- instances.json ---------------------------------------------------------------------------------------------


def _load_instances(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path}: expected an object with images and annotations, got {type(coco).__name__}")
    for key in ("images", "annotations"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{path}: has no list {key!r}")
    return coco


def _categories(path: Path, entries: Any) -> dict[Any, str]:
    try:
        return {entry["id"]: str(entry["name"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: every entry of categories needs id and name") from error


def _images(path: Path, entries: list[Any], skips: _Skips) -> dict[Any, dict[str, Any]]:
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
    if not _is_id(entry.get("id")):
        return f"id must be a number or a string, got {entry.get('id')!r}"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return "has no file_name"
    for key in ("height", "width"):
        if not isinstance(entry.get(key), int) or isinstance(entry[key], bool) or entry[key] < 1:
            return f"{key} must be a positive number of pixels, got {entry.get(key)!r}"
    return None


def _annotations_by_image(
    path: Path, entries: list[Any], known: set[Any], skips: _Skips
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Annotations (with their place in the file) by image id; their contents are not looked at yet."""
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    seen: set[Any] = set()
    for index, entry in enumerate(entries):
        where = f"{path}: annotations[{index}]"
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            skips.bad("annotations", f"{where}: expected an object with an id")
        elif entry["id"] in seen:
            skips.bad("annotations", f"{where}: id {entry['id']!r} occurs a second time")
        elif not _is_id(entry.get("image_id")) or entry["image_id"] not in known:
            skips.bad("annotations", f"{where} (id {entry['id']!r}): unknown image_id {entry.get('image_id')!r}")
        else:
            seen.add(entry["id"])
            by_image.setdefault(entry["image_id"], []).append((index, entry))
    return by_image


def _objects(
    path: Path,
    image: dict[str, Any],
    entries: list[tuple[int, dict[str, Any]]],
    categories: dict[Any, str],
    checked: dict[Any, RLE],
    skips: _Skips,
) -> dict[Any, _Object]:
    """The usable annotations of one image by id. Crowd regions are not instances and are left out."""
    height, width = image["height"], image["width"]
    objects = {}
    for index, entry in entries:
        if entry.get("iscrowd"):
            continue
        try:
            objects[entry["id"]] = _object(entry, height, width, categories, checked.get(entry["id"]))
        except ValueError as error:
            skips.bad("annotations", f"{path}: annotations[{index}] (id {entry['id']!r}): {error}")
    return objects


def _check_together(
    images: dict[Any, dict[str, Any]], annotations: dict[Any, list[tuple[int, dict[str, Any]]]]
) -> dict[Any, RLE]:
    """Checked masks by annotation id, found at once because that is many times faster than one by one.

    If anything is wrong with one of them the result is empty: the check of the single masks will name it.
    """
    rles = {}
    for image_id, image in images.items():
        size = [image["height"], image["width"]]
        for _, entry in annotations.get(image_id, []):
            rle = entry.get("segmentation")
            if isinstance(rle, dict) and rle.get("size") == size:
                rles[entry["id"]] = rle
    try:
        return dict(zip(rles, masks.check_rles(rles.values()), strict=True))
    except ValueError:
        return {}


def _object(entry: dict[str, Any], height: int, width: int, categories: dict[Any, str], checked: RLE | None) -> _Object:
    box = entry.get("bbox")
    if box is not None:
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise ValueError(f"bbox must be four numbers [x, y, w, h], got {box!r}")
        if box[2] <= 0 or box[3] <= 0:
            raise ValueError(f"bbox {box} has no extent")
    category = entry.get("category_id")
    if category is not None and (not _is_id(category) or category not in categories):
        raise ValueError(f"unknown category_id {category!r}")
    attributes = entry.get("attributes", {})
    if not isinstance(attributes, dict):
        raise ValueError(f"attributes must be an object, got {type(attributes).__name__}")
    segmentation = entry.get("segmentation")
    box_only = segmentation is None or segmentation == []
    if checked is not None:
        rle = checked
    elif not box_only:
        rle = masks.segmentation_to_rle(segmentation, height, width)
    elif box is not None:
        rle = masks.box_to_rle([box[0], box[1], box[0] + box[2], box[1] + box[3]], height, width, "bbox")
    else:
        raise ValueError("has neither segmentation nor bbox")
    area = int(masks.areas([rle], checked=True)[0])
    if area == 0:
        raise ValueError("the mask is empty (area 0)")
    if box is None:
        x1, y1, x2, y2 = masks.bboxes([rle], checked=True)[0].tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
    info = {
        "id": entry["id"],
        "category": "" if category is None else categories[category],
        "bbox": [float(value) for value in box],
        "area": area,
        "attributes": attributes,
        "rle": rle,
    }
    return _Object(rle, box_only, info)


# ---- instructions.jsonl -----------------------------------------------------------------------------------------


def _instructions_by_image(
    path: Path, images: dict[Any, dict[str, Any]], skips: _Skips
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Instructions (with their line numbers) by image id; their phrases are not looked up yet."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            _check_instruction(entry)
            if entry["image_id"] not in images:
                raise ValueError(f"unknown image_id {entry['image_id']!r}")
            if (first := seen.setdefault(str(entry["id"]), number)) != number:
                raise ValueError(f"id {entry['id']!r} is that of line {first} too")
        except ValueError as error:
            skips.bad("instructions", f"{path}:{number}: {error}")
            continue
        by_image.setdefault(entry["image_id"], []).append((number, entry))
    return by_image


def _check_instruction(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    for key in ("id", "image_id"):
        if not _is_id(entry.get(key)):
            raise ValueError(f"{key} must be a number or a string, got {entry.get(key)!r}")
    if not _is_text(entry.get("instruction")):
        raise ValueError(f"the instruction is empty: {entry.get('instruction')!r}")
    if not isinstance(entry.get("kind", ""), str):
        raise ValueError(f"kind must be a string, got {entry['kind']!r}")
    phrases = entry.get("phrases")
    if not isinstance(phrases, list) or not phrases:
        raise ValueError("phrases must be a list with at least one phrase")
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, dict) or not _is_text(phrase.get("phrase")):
            raise ValueError(f"phrases[{index}]: the phrase is empty or missing")
        ids = phrase.get("annotation_ids")
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            raise ValueError(f"phrases[{index}]: annotation_ids must be a list of ids (an empty one for no-target)")
        if len(set(ids)) < len(ids):
            raise ValueError(f"phrases[{index}]: annotation_ids holds an id twice")


def _turns(
    path: Path, lines: list[tuple[int, dict[str, Any]]], objects: dict[Any, _Object], skips: _Skips
) -> Iterator[Turn]:
    for number, entry in lines:
        try:
            phrases = tuple(_phrase(i, phrase, objects) for i, phrase in enumerate(entry["phrases"]))
        except ValueError as error:
            skips.bad("instructions", f"{path}:{number}: {error}")
            continue
        yield Turn(entry["instruction"].strip(), phrases, entry.get("kind", ""), str(entry["id"]))


def _phrase(index: int, phrase: dict[str, Any], objects: dict[Any, _Object]) -> PhraseTarget:
    wanted = []
    for annotation_id in phrase["annotation_ids"]:
        if annotation_id not in objects:
            raise ValueError(f"phrases[{index}]: annotation_id {annotation_id!r} is no usable annotation of this image")
        wanted.append(objects[annotation_id])
    box_only = {item.box_only for item in wanted}
    if len(box_only) > 1:
        raise ValueError(f"phrases[{index}]: some of its annotations have masks, some only boxes")
    return PhraseTarget(phrase["phrase"].strip(), tuple(item.rle for item in wanted), True in box_only)


# ---- small checks -----------------------------------------------------------------------------------------------


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
