"""Reader of LISA++'s instance and reasoning (CoT) data: questions about COCO pictures (DESIGN section 9).

    [{"English Question": "Which animals could pull a sledge?", "img_path": "train2017/000000000034.jpg",
      "ID": [1375, 1402]}, ...]

``ID`` names annotations of COCO's instances file, which holds the masks and says what picture they belong to. An
answer in words, as the reasoning data has one, stands under a key that is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from instructsam.data.checks import Place, Skips, check_size, is_id
from instructsam.data.coco_instances import annotation_name
from instructsam.data.eval_split import name_of
from instructsam.data.json_stream import stream_json, stream_records
from instructsam.data.release_markup import check_file_name, check_text
from instructsam.data.release_masks import mask_of, refuse_empty
from instructsam.errors import DataError, at
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

logger = logging.getLogger(__name__)

QUESTION, IMAGE, IDS = "English Question", "img_path", "ID"
CROWDS = "records of crowd regions only"


@dataclass(frozen=True)
class _Coco:
    """What the records need of an instances file: annotations asked for, and all images and categories, by id."""

    annotations: dict[Any, tuple[int, dict[str, Any]]]
    images: dict[Any, tuple[Any, Any, Any]]
    categories: dict[Any, str]


def read_lisa_plus(
    file: Path | str,
    instances: Path | str,
    image_root: Path | str,
    answer_key: str | None = None,
    encoding: str = "utf-8",
    skips: Skips | None = None,
) -> Iterator[Sample]:
    """Read a file, one sample a record; sample ids are FILE/INDEX.

    The phrase of an answer is the name of the category that its annotations share, else empty: the source says
    what it is then (`instructsam.data.sources`). Crowd regions are not instances and are left out; records of nothing
    else are left out too, counted in ``skips.aside`` and logged. Both files are read item by item, ``file`` twice.

    Args:
        instances: COCO instances JSON that the ids belong to (train2017).
        image_root: folder of its pictures, which are named as there; ``img_path`` must end in the same name.
        answer_key: key of a text that the answer gives before the phrase; answers are the phrase alone where None.
        encoding: "utf-8" or "cp1252", of ``file``.
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file, index and reason: missing fields, empty texts, ids that are unknown, occur twice or
            belong to another picture, masks that are malformed or empty; no usable record at all. A file that is not
            JSON to its end is an error with "skip" too.
    """
    file, skips = Path(file), skips or Skips()
    wanted = {one for _, record in stream_records(file, encoding) for one in _ids_in(record)}
    coco = _read_instances(Path(instances), wanted, skips)
    count = crowds = 0
    for index, record in stream_records(file, encoding):
        turn = None
        with skips.entry("records", Place(file, f"[{index}]")):
            question, found = _asked(record, coco)
            name, height, width = _image(coco, found[0][1]["image_id"], record)
            text = None if answer_key is None else check_text(record.get(answer_key), answer_key)
            instances_only = [(place, entry) for place, entry in found if not entry.get("iscrowd")]
            if not instances_only:
                crowds += 1
                skips.aside[CROWDS] += 1
                continue
            rles = tuple(_rle(entry, place, height, width) for place, entry in instances_only)
            shared = {entry["category_id"] for _, entry in instances_only}
            target = PhraseTarget(coco.categories[shared.pop()] if len(shared) == 1 else "", rles)
            answer = () if text is None else (f"{text} ", "")
            identity = f"{file.name}/{index}"
            turn = Turn(question, (target,), "reasoning", identity, "sentence", answer)
        if turn is not None:
            count += 1
            yield Sample(turn.id, Path(image_root) / name, height, width, (turn,))
    if crowds:
        logger.warning("%s: left out %d %s", file, crowds, CROWDS)
    if not count:
        raise ValueError(f"{file}: no usable record")


def _ids_in(record: Any) -> list[Any]:
    """The ids that a record names, as far as they are ids; what is wrong with it is found later."""
    ids = record.get(IDS) if isinstance(record, Mapping) else None
    return [one for one in ids if is_id(one)] if isinstance(ids, list) else []


def _asked(record: Any, coco: _Coco) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """The question of a record, and its annotations (with their place in the instances file), all of one image."""
    if not isinstance(record, Mapping):
        raise DataError(f"expected an object, got {type(record).__name__}", "field")
    question = check_text(record.get(QUESTION), QUESTION)
    ids = record.get(IDS)
    if not isinstance(ids, list) or not ids or not all(map(is_id, ids)):
        raise DataError(f"{IDS} must be a list with at least one annotation id", "field")
    if len(set(ids)) < len(ids):
        raise DataError(f"{IDS} holds an id twice", "duplicate")
    for one in ids:
        if one not in coco.annotations:
            raise DataError(f"{IDS}: the instances file has no annotation {one!r}", "reference")
    found = [coco.annotations[one] for one in ids]
    for _, entry in found:
        if entry["category_id"] not in coco.categories:
            raise DataError(f"the instances file has no category {entry['category_id']!r}", "reference")
    if len({entry["image_id"] for _, entry in found}) > 1:
        raise DataError(f"{IDS} names annotations of several pictures", "reference")
    return question, found


def _image(coco: _Coco, image_id: Any, record: Mapping[str, Any]) -> tuple[str, int, int]:
    """File name, height and width of the picture that the annotations and the record name."""
    if image_id not in coco.images:
        raise DataError(f"the instances file has no image {image_id!r}", "reference")
    name, height, width = coco.images[image_id]
    if not isinstance(name, str) or not name:
        raise DataError(f"image {image_id!r} of the instances file lacks file_name", "field")
    try:
        check_size(height, width)
    except DataError as error:
        raise at(f"image {image_id!r} of the instances file", error) from None
    said = name_of(record, IMAGE)
    # COCO_train2014_000000000034.jpg and 000000000034.jpg are the same picture.
    if not PurePosixPath(said.replace("\\", "/")).name.endswith(PurePosixPath(name).name):
        raise DataError(f"{IMAGE} is {said!r}, but the annotations belong to {name!r}", "reference")
    return check_file_name(name), height, width


def _rle(entry: dict[str, Any], place: int, height: int, width: int) -> RLE:
    what = annotation_name(place, entry)
    rle = mask_of(entry.get("segmentation"), height, width, what)
    refuse_empty(rle, what)
    return rle


def _read_instances(path: Path, wanted: set[Any], skips: Skips) -> _Coco:
    """The annotations that are wanted, and all images and categories; other annotations are not kept."""
    coco = _Coco({}, {}, {})
    for key, index, entry in stream_json(path):
        if key in ("images", "annotations", "categories"):
            if index < 0:
                raise DataError(f"{path}: {key} must be a list", "field")
            with skips.entry(key, Place(path, f"{key}[{index}]")):
                _keep(coco, key, index, entry, wanted)
    return coco


def _keep(coco: _Coco, key: str, index: int, entry: Any, wanted: set[Any]) -> None:
    """Take up an entry of the instances file."""
    if not isinstance(entry, dict) or not is_id(entry.get("id")):
        raise DataError("expected an object with an id", "field")
    identity = entry["id"]
    if key == "annotations" and identity not in wanted:
        return
    if identity in getattr(coco, key):
        raise DataError(f"id {identity!r} occurs a second time", "duplicate")
    if key == "images":
        coco.images[identity] = (entry.get("file_name"), entry.get("height"), entry.get("width"))
    elif key == "categories":
        coco.categories[identity] = check_text(entry.get("name"), "name")
    elif not all(is_id(entry.get(part)) for part in ("image_id", "category_id")):
        raise DataError("image_id and category_id must be numbers or strings", "field")
    else:
        coco.annotations[identity] = (index, entry)
