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

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from instructsam import masks
from instructsam.data.checks import Place, Skips, check_four, is_finite, is_id, parse_json
from instructsam.data.coco_instances import (
    annotation_name,
    annotations_by_image,
    categories_by_id,
    images_by_id,
    listed_ids,
    load_instances,
)
from instructsam.data.json_stream import stream_json_lines
from instructsam.data.release_masks import check_each
from instructsam.errors import Consequence, DataError
from instructsam.structures import RLE, PhraseTarget, Sample, Turn
from instructsam.words import is_text

_BLOCK = 256
"""Images whose masks are checked together."""


@dataclass(frozen=True)
class _Object:
    rle: RLE
    box_only: bool
    info: dict[str, Any]


def read_coco_instructions(
    root: Path | str,
    split: str,
    skips: Skips | None = None,
    limit: int | None = None,
) -> list[Sample]:
    """The first ``limit`` samples of `stream_coco_instructions` (all by default); what comes after is not checked.

    Raises:
        ValueError: a limit below one; no image with a usable instruction; and as `stream_coco_instructions`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1, or None for all")
    skips = skips or Skips()
    samples = list(islice(stream_coco_instructions(root, split, skips), limit))
    folder = Path(root) / split
    skips.summarise(folder, f"{len(samples)} images")
    if not samples:
        raise ValueError(f"{folder}: no image with a usable instruction")
    return samples


def stream_coco_instructions(root: Path | str, split: str, skips: Skips | None = None) -> Iterator[Sample]:
    """Read ROOT/SPLIT: one sample an image, in the order of instances.json, with all its instructions as turns.

    Images without an instruction are left out. ``Sample.objects`` holds a dict for every annotation of the image: id,
    category, bbox [x, y, w, h] in pixels, area in pixels, attributes, rle.

    Args:
        skips: what to do about bad entries; raises at the first by default. What depends on a bad image or annotation
            is left out with it.

    Raises:
        ValueError: naming file, index or line and reason: missing files, broken JSON, unknown or repeated ids, empty
            instruction or phrase, masks that are malformed, empty or of another size than their image. A file that
            cannot be read as a whole is an error with "skip" too.
    """
    folder = Path(root) / split
    skips = skips or Skips()
    instances_file, instructions_file = folder / "instances.json", folder / "instructions.jsonl"
    coco = load_instances(instances_file)
    categories = categories_by_id(instances_file, coco.get("categories", []))
    images = images_by_id(instances_file, coco["images"], skips)
    lost_images = listed_ids(coco["images"]) - set(images)
    annotations = annotations_by_image(instances_file, coco["annotations"], set(images), skips, lost_images)
    lines = _instructions_by_image(instructions_file, images, skips, lost_images)
    lost = listed_ids(coco["annotations"]) - {entry["id"] for group in annotations.values() for _, entry in group}

    asked = [image_id for image_id in images if image_id in lines]
    checked: dict[Any, RLE] = {}
    for number, image_id in enumerate(asked):
        image = images[image_id]
        if number % _BLOCK == 0:
            block = {other: images[other] for other in asked[number : number + _BLOCK]}
            checked = _check_together(block, annotations)
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            missing = DataError(f"no file {path}", "image missing")
            skips.bad("images", Place(instances_file, f"image {image_id!r}"), missing)
            skips.counts["instructions"] += len(lines[image_id])
            continue
        entries = annotations.get(image_id, [])
        objects = _objects(instances_file, image, entries, categories, checked, skips)
        lost.update(entry["id"] for _, entry in entries if not entry.get("iscrowd") and entry["id"] not in objects)
        turns = tuple(_turns(instructions_file, lines[image_id], objects, lost, skips))
        if turns:
            infos = tuple(item.info for item in objects.values())
            yield Sample(f"{split}/{image_id}", path, image["height"], image["width"], turns, infos)


# ---- annotations -------------------------------------------------------------------------------------------------


def _objects(
    path: Path,
    image: dict[str, Any],
    entries: list[tuple[int, dict[str, Any]]],
    categories: dict[Any, str],
    checked: dict[Any, RLE],
    skips: Skips,
) -> dict[Any, _Object]:
    """The usable annotations of one image by id. Crowd regions are not instances and are left out."""
    height, width = image["height"], image["width"]
    objects = {}
    for index, entry in entries:
        if entry.get("iscrowd"):
            continue
        with skips.entry("annotations", Place(path, annotation_name(index, entry))):
            objects[entry["id"]] = _object(entry, height, width, categories, checked.get(entry["id"]))
    return objects


def _check_together(
    images: dict[Any, dict[str, Any]], annotations: dict[Any, list[tuple[int, dict[str, Any]]]]
) -> dict[Any, RLE]:
    """Checked masks by annotation id, found at once because that is many times faster than one by one.

    One that is missing in the result is bad, or no RLE of its image's size: the check of it alone will say why.
    """
    rles = {}
    for image_id, image in images.items():
        size = [image["height"], image["width"]]
        for _, entry in annotations.get(image_id, []):
            rle = entry.get("segmentation")
            if isinstance(rle, dict) and rle.get("size") == size:
                rles[entry["id"]] = rle
    found = zip(rles, check_each([*rles.values()]), strict=True)
    return {identity: rle for identity, rle in found if rle is not None}


def _object(entry: dict[str, Any], height: int, width: int, categories: dict[Any, str], checked: RLE | None) -> _Object:
    box = entry.get("bbox")
    if box is not None:
        if not all(map(is_finite, check_four(box))):
            raise DataError(f"bbox must be four numbers, all finite, [x, y, w, h], got {box!r}", "box nan")
        if box[2] <= 0 or box[3] <= 0:
            raise DataError(f"bbox {box} has no extent", "box extent")
    category = entry.get("category_id")
    if category is not None and (not is_id(category) or category not in categories):
        raise DataError(f"unknown category_id {category!r}", "reference")
    attributes = entry.get("attributes", {})
    if not isinstance(attributes, dict):
        raise DataError(f"attributes must be an object, got {type(attributes).__name__}", "field")
    segmentation = entry.get("segmentation")
    box_only = segmentation is None or segmentation == []
    if checked is not None:
        rle = checked
    elif not box_only:
        rle = masks.segmentation_to_rle(segmentation, height, width)
    elif box is not None:
        rle = masks.box_to_rle([box[0], box[1], box[0] + box[2], box[1] + box[3]], height, width, "bbox")
    else:
        raise DataError("has neither segmentation nor bbox", "field")
    area = int(masks.areas([rle], checked=True)[0])
    if area == 0:
        raise DataError("the mask is empty (area 0)", "mask empty")
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
    path: Path, images: dict[Any, dict[str, Any]], skips: Skips, lost: set[Any]
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Instructions (with their line numbers) by image id; their phrases are not looked up yet."""
    by_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    seen: dict[str, int] = {}
    for number, line in stream_json_lines(path):
        with skips.entry("instructions", Place(path, str(number))):
            entry = parse_json(line)
            _check_instruction(entry)
            if entry["image_id"] in lost:
                raise Consequence(f"image {entry['image_id']!r} was left out", "reference")
            if entry["image_id"] not in images:
                raise DataError(f"unknown image_id {entry['image_id']!r}", "reference")
            if (first := seen.setdefault(str(entry["id"]), number)) != number:
                raise DataError(f"id {entry['id']!r} is that of line {first} too", "duplicate")
            by_image.setdefault(entry["image_id"], []).append((number, entry))
    return by_image


def _check_instruction(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {type(entry).__name__}", "field")
    for key in ("id", "image_id"):
        if not is_id(entry.get(key)):
            raise DataError(f"{key} must be a number or a string, got {entry.get(key)!r}", "field")
    if not is_text(entry.get("instruction")):
        raise DataError(f"the instruction is empty: {entry.get('instruction')!r}", "text")
    if not isinstance(entry.get("kind", ""), str):
        raise DataError(f"kind must be a string, got {entry['kind']!r}", "field")
    phrases = entry.get("phrases")
    if not isinstance(phrases, list) or not phrases:
        raise DataError("phrases must be a list with at least one phrase", "field")
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, dict) or not is_text(phrase.get("phrase")):
            raise DataError(f"phrases[{index}]: the phrase is empty or missing", "text")
        ids = phrase.get("annotation_ids")
        if not isinstance(ids, list) or not all(map(is_id, ids)):
            raise DataError(
                f"phrases[{index}]: annotation_ids must be a list of ids (an empty one for no-target)", "field"
            )
        if len(set(ids)) < len(ids):
            raise DataError(f"phrases[{index}]: annotation_ids holds an id twice", "duplicate")


def _turns(
    path: Path, lines: list[tuple[int, dict[str, Any]]], objects: dict[Any, _Object], lost: set[Any], skips: Skips
) -> list[Turn]:
    """The turns whose annotations are all among ``objects``; ``lost`` are ids of annotations that were left out."""
    turns: list[Turn] = []
    for number, entry in lines:
        with skips.entry("instructions", Place(path, str(number))):
            phrases = tuple(_phrase(i, phrase, objects, lost) for i, phrase in enumerate(entry["phrases"]))
            turn = Turn(entry["instruction"].strip(), phrases, entry.get("kind", ""), str(entry["id"]))
            turns.append(turn)
    return turns


def _phrase(index: int, phrase: dict[str, Any], objects: dict[Any, _Object], lost: set[Any]) -> PhraseTarget:
    wanted = []
    for annotation_id in phrase["annotation_ids"]:
        if annotation_id not in objects:
            error = Consequence if annotation_id in lost else DataError
            raise error(
                f"phrases[{index}]: annotation_id {annotation_id!r} is no usable annotation of this image", "reference"
            )
        wanted.append(objects[annotation_id])
    box_only = {item.box_only for item in wanted}
    if len(box_only) > 1:
        raise DataError(f"phrases[{index}]: some of its annotations have masks, some only boxes", "annotation type")
    return PhraseTarget(phrase["phrase"].strip(), tuple(item.rle for item in wanted), True in box_only)
