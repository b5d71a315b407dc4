"""What the readers of benchmarks have in common: instructions gathered by image, masks in any published form.

A reader hands every instruction to a `Collector`. That gives each image one sample, keeps ids unique, names bad
records, and looks for all picture files at the end, so that a missing one is known before a model runs. Pictures are
opened only where the annotations do not say how large they are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from instructsam import masks
from instructsam.data.checks import Place, Skips, check_size, is_finite, is_size
from instructsam.errors import DataError
from instructsam.structures import RLE, PhraseTarget, Sample, Turn
from instructsam.words import is_text

_NAMED = 10
"""So many missing files are named in a message; all of them are counted."""
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are turned by a quarter


@dataclass(frozen=True)
class EvalSplit:
    """What one split of a benchmark asks.

    Attributes:
        samples: one an image, in the order of the files; their turns are the instructions. The text of a turn is the
            data set's own, without any prompt. A phrase with an empty text is one that the data set does not name.
        ignore_rles: turn id -> pixels that count neither as right nor as wrong.
        skipped: how many entries of each sort were left out as bad.
    """

    samples: list[Sample]
    ignore_rles: dict[str, RLE] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class MissingImage(DataError):
    """A picture that had to be opened is not there. The collector names all of them together."""


def _no_file(path: Path) -> MissingImage:
    return MissingImage(f"no file {path}", "image missing")


class Collector:
    """Gathers the instructions of one split.

    Args:
        name, split: ids begin with them, as in ``refcoco/val/12``.
        source: the file or folder read, for messages.
        image_root: pictures are named relative to it.
        skips: what to do about bad records.
    """

    def __init__(self, name: str, split: str, source: Path, image_root: Path | str, skips: Skips):
        self.prefix = f"{name}/{split}"
        self.source = source
        self.image_root = Path(image_root)
        self.skips = skips
        self._samples: dict[str, Sample] = {}
        self._turns: dict[str, list[Turn]] = {}
        self._where: dict[str, Place] = {}
        self._ignore: dict[str, RLE] = {}
        self._missing: Counter[str] = Counter()  # instructions that could not be read for want of their picture

    @contextmanager
    def entry(self, where: Place, what: str = "instructions") -> Iterator[None]:
        """As `Skips.entry`; pictures that are not there are left to `finish`."""
        with self.skips.entry(what, where), suppress(MissingImage):
            yield

    def add(
        self,
        where: Place,
        image: str,
        size: tuple[int, int],
        turn: Turn,
        ignore_rle: RLE | None = None,
    ) -> None:
        """One instruction about the picture ``image`` of ``size`` (height, width). ``turn.id`` is its id in the split.

        Raises:
            ValueError: an empty instruction, an id that was there already, another size than before.
        """
        identity = f"{self.prefix}/{turn.id}"
        if not is_text(turn.instruction):
            raise DataError(f"the instruction is empty, or no text: {turn.instruction!r}", "text")
        if identity in self._where:
            raise DataError(f"id {turn.id!r} is that of {self._where[identity]} too", "duplicate")
        sample = self._samples.get(image)
        if sample is not None and (sample.height, sample.width) != size:
            raise DataError(
                f"image {image} is {size[0]}x{size[1]} (height x width) here, {sample.height}x{sample.width} before",
                "image size",
            )
        if sample is None:
            self._samples[image] = Sample(f"{self.prefix}/{image}", self.image_root / image, *size, ())
        self._where[identity] = where
        self._turns.setdefault(image, []).append(replace(turn, id=identity, instruction=turn.instruction.strip()))
        if ignore_rle is not None:
            self._ignore[identity] = ignore_rle

    def size_of(self, image: str, record: Mapping[str, Any], *segmentations: Any) -> tuple[int, int]:
        """As `picture_size`; a picture that is not there is remembered for `finish`."""
        try:
            return picture_size(self.image_root / image, record, *segmentations)
        except MissingImage:
            self._missing[image] += 1
            raise

    def finish(self) -> EvalSplit:
        """The split. Raises ValueError for missing pictures (counted, the first of them named) or no instruction."""
        images = list({**self._samples, **self._missing})
        missing = [image for image in images if image in self._missing or not os.path.isfile(self.image_root / image)]
        if missing and self.skips.on_bad == "raise":
            names = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise DataError(
                f"{self.source}: {len(missing)} of {len(images)} pictures are not in {self.image_root}: {names}",
                "image missing",
            )
        for image in missing:
            self.skips.bad("images", Place(self.source, image), _no_file(self.image_root / image))
            turns = self._turns.pop(image, [])
            self.skips.counts["instructions"] += len(turns) + self._missing[image]
            for turn in turns:
                self._ignore.pop(turn.id, None)
        samples = [replace(self._samples[image], turns=tuple(asked)) for image, asked in self._turns.items()]
        self.skips.summarise(self.source, f"{sum(len(sample.turns) for sample in samples)} instructions")
        if not samples:
            raise ValueError(f"{self.source}: no usable instruction for {self.prefix}")
        return EvalSplit(samples, self._ignore, dict(self.skips.counts))


def picture_size(path: Path, record: Mapping[str, Any], *segmentations: Any) -> tuple[int, int]:
    """(height, width) of a picture: as the record says, else as its RLEs do, else as the file's header does.

    Raises:
        MissingImage: the header is needed, and there is no such file.
        ValueError: height or width that is no number of pixels, a picture that cannot be opened.
    """
    if any(record.get(key) is not None for key in ("height", "width")):
        return check_size(record.get("height"), record.get("width"))
    for segmentation in segmentations:
        if (size := _size_in(segmentation)) is not None:
            return check_size(*size)
    if not os.path.isfile(path):  # of a name that cannot be one, too
        raise _no_file(path)
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be opened ({error})", "image broken") from error


def as_phrase(expression: str) -> str:
    """The phrase that answers an expression: first letter in lower case, no final period (DESIGN section 9)."""
    text = expression.strip()
    return (text[:1].lower() + text[1:]).removesuffix(".")


def turn_of(identity: Any, text: Any, rles: list[RLE], phrase: str = "", kind: str = "") -> Turn:
    """An instruction that asks for one phrase. Raises ValueError where the text is no string."""
    if not isinstance(text, str):
        raise DataError(f"the instruction must be a string, got {text!r}", "field")
    return Turn(text, (PhraseTarget(phrase, tuple(rles)),), kind, str(identity))


def name_of(record: Any, key: str) -> str:
    """A file name in a record. Raises ValueError where the record is no object or has none."""
    if not isinstance(record, Mapping):
        raise DataError(f"expected an object, got {type(record).__name__}", "field")
    if not isinstance(record.get(key), str) or not record[key]:
        raise DataError(f"{key} must be the name of a picture, got {record.get(key)!r}", "field")
    return record[key]


def instance_rles(value: Any, height: int, width: int, what: str = "mask", empty_is_none: bool = False) -> list[RLE]:
    """Masks of the instances in any of the published forms; nothing (None or an empty list) is no-target.

    One RLE is one instance, so is a list of polygons (lists of numbers); a list of RLEs or of lists of polygons holds
    one instance each.

    Args:
        empty_is_none: RLEs that are all without a pixel are no-target too, which is how some formats write it.

    Raises:
        ValueError: naming ``what`` and the index: no such form, a malformed mask, another size, a mask without pixels.
    """
    if value is None or value == []:
        return []
    if isinstance(value, Mapping):
        rles = [masks.check_rle(value, height, width, what)]
    elif not isinstance(value, list):
        raise DataError(
            f"{what}: expected an RLE, polygons, or a list of either, got {type(value).__name__}", "rle form"
        )
    elif all(is_finite(number) for number in value):
        rles = [masks.polygons_to_rle([value], height, width, what)]
    elif all(_is_numbers(polygon) for polygon in value):
        rles = [masks.polygons_to_rle(value, height, width, what)]
    else:
        rles = [masks.segmentation_to_rle(one, height, width, f"{what}[{k}]") for k, one in enumerate(value)]
    areas = masks.areas(rles, checked=True)
    in_rle = isinstance(value, Mapping) or all(isinstance(one, Mapping) for one in value)
    if empty_is_none and in_rle and not areas.any():
        return []
    for index, area in enumerate(areas):
        if area == 0:
            raise DataError(f"{what}[{index}]: the mask is empty (area 0)", "mask empty")
    return rles


def union_rles(value: Any, height: int, width: int, what: str = "mask", empty_is_none: bool = False) -> list[RLE]:
    """As `instance_rles`, joined to one mask where there are several."""
    rles = instance_rles(value, height, width, what, empty_is_none)
    return [masks.union(rles, height, width, checked=True)] if len(rles) > 1 else rles


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int | float) for number in value)


def _size_in(segmentation: Any) -> tuple[int, int] | None:
    """The size that the first RLE states, if it is one; whether the masks fit is checked later."""
    for rle in segmentation if isinstance(segmentation, list) else [segmentation]:
        size = rle.get("size") if isinstance(rle, Mapping) else None
        if isinstance(size, list) and len(size) == 2 and all(map(is_size, size)):
            return size[0], size[1]
    return None
