"""Reader of referring sets whose masks are PNG files: a JSON list of records beside folders of pictures and masks.

A record is one expression with one target. What its fields are called is told by the reader's arguments::

    [{"text": "the red can left of the box", "rgb_path": "train/image/0000012.png",
      "mask_path": "train/mask/0000012.png", "bbox": [311, 140, 58, 90], "height": 480, "width": 640}, ...]

RoboRefIt is of this kind (DESIGN section 9). DESIGN does not give the names of its fields: compare the arguments in a
configuration with the file that you have.

In a mask any value but 0 belongs to the target, in one with colours any colour but black, transparent pixels do not.
Masks refer to the upright picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from instructsam import masks
from instructsam.data.checks import Place, Skips, check_four, check_size
from instructsam.data.eval_split import as_phrase
from instructsam.data.json_stream import stream_records
from instructsam.errors import DataError
from instructsam.processing.image_files import READ_ERRORS
from instructsam.structures import RLE, PhraseTarget, Sample, Turn
from instructsam.words import is_text

BOX_FORMS = ("xywh", "xyxy")


def read_png_masks(
    file: Path | str,
    image_root: Path | str,
    name: str,
    text_key: str,
    image_key: str,
    mask_key: str | None = None,
    mask_root: Path | str | None = None,
    box_key: str | None = None,
    box_form: str = "xywh",
    skips: Skips | None = None,
) -> Iterator[Sample]:
    """One sample for every run of records about the same picture, in the order of the file, with a turn each.

    Ids are NAME/INDEX, the place of the first record in the file. Where a record says ``height`` and ``width``, a mask
    must be of that size; else the size is the mask's.

    Args:
        text_key, image_key: fields of the expression and of the picture's name below ``image_root``. Backslashes in
            names are read as slashes.
        mask_key: field of the mask's name below ``mask_root`` (by default ``image_root``).
        box_key: field of the box in pixels, taken where a record has no mask; such a record needs height and width.
        box_form: "xywh" or "xyxy", what the numbers of a box are.
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file, index and reason: unknown settings, a file that cannot be read, missing fields, masks
            that are missing, broken, of another size or empty, boxes that are malformed or outside.
    """
    if mask_key is None and box_key is None:
        raise ValueError("neither mask_key nor box_key is given: where are the targets?")
    if box_form not in BOX_FORMS:
        raise ValueError(f"box_form={box_form!r} is none of {', '.join(BOX_FORMS)}")
    path, skips = Path(file), skips or Skips()
    root = Path(image_root if mask_root is None else mask_root)

    def read(index: int, record: Any) -> _Read:
        if not isinstance(record, dict):
            raise DataError(f"expected an object, got {type(record).__name__}", "field")
        image, size = _name(record, image_key), _size(record)
        if not is_text(record.get(text_key)):
            raise DataError(f"{text_key} is empty or missing: {record.get(text_key)!r}", "text")
        if mask_key is not None and record.get(mask_key) is not None:
            rle, box_only = _mask(root / _name(record, mask_key), size), False
        else:
            rle, box_only = _box(record, box_key, box_form, size), True
        phrase = as_phrase(record[text_key])
        turn = Turn(phrase, (PhraseTarget(phrase, (rle,), box_only),), "phrase", "", "phrase")
        return _Read(index, image, rle["size"][0], rle["size"][1], turn)

    for _, run in groupby(_records(path, read, skips), lambda one: one[1:4]):
        first, *others = run
        turns = tuple(one.turn for one in (first, *others))
        yield Sample(f"{name}/{first.number}", Path(image_root) / first.image, first.height, first.width, turns)


class _Read(NamedTuple):
    number: int
    image: str
    height: int
    width: int
    turn: Turn


def _records(path: Path, read: Callable[[int, Any], _Read], skips: Skips) -> Iterator[_Read]:
    for index, record in stream_records(path):
        found = None
        with skips.entry("records", Place(path, f"[{index}]")):
            found = read(index, record)
        if found is not None:
            yield found


def _name(record: dict[str, Any], key: str) -> str:
    name = record.get(key)
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{key} must be the name of a file, got {name!r}", "field")
    return name.replace("\\", "/")


def _size(record: dict[str, Any]) -> tuple[int, int] | None:
    size = record.get("height"), record.get("width")
    if size == (None, None):
        return None
    return check_size(*size)


def _mask(path: Path, size: tuple[int, int] | None) -> RLE:
    target_HW = read_mask(path)
    if size not in (None, target_HW.shape):
        raise DataError(f"{path} has height and width {target_HW.shape}, the record says {size}", "mask size")
    if not target_HW.any():
        raise DataError(f"{path}: the mask is empty (area 0)", "mask empty")
    return masks.encode(target_HW)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask picture as (H, W) bool, upright if it has an EXIF orientation. Raises DataError: missing or broken."""
    if not os.path.isfile(path):  # of a name that cannot be one too
        raise DataError(f"no file {path}", "image missing")
    try:
        with Image.open(path) as stored:
            picture = ImageOps.exif_transpose(stored)
            if picture.mode in ("LA", "PA", "RGBA"):
                values = np.asarray(picture.convert("RGBA"))
                return values[..., :3].any(axis=-1) & (values[..., 3] > 0)
            values = np.asarray(picture) != 0  # of a palette the indices, whatever colours they stand for
            return values.any(axis=-1) if values.ndim == 3 else values
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image, broken or truncated? ({error})", "image broken") from None


def _box(record: dict[str, Any], key: str | None, form: str, size: tuple[int, int] | None) -> RLE:
    if key is None or record.get(key) is None:
        raise DataError("has no mask" if key is None else "has neither mask nor box", "field")
    if size is None:
        raise DataError("has a box only, and no height and width of its picture", "field")
    box = check_four(record[key], key)
    if any(abs(value) > masks.MAX_PIXELS for value in box):
        raise DataError(f"{key} {str(box)[:60]} lies outside any picture", "box outside")
    if form == "xywh":
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return masks.box_to_rle(box, *size, key)
