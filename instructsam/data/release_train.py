"""Reader of the release's training JSON (DESIGN section 9): a list of records, each of one of these kinds

    {"image", "height", "width", "type": "instseg",
     "annotation": [{"type": "phrase" | "sentence" | "OCR", "text", "category", "ann_type": "mask" | "bbox" | "point",
                     "ann": null or [JSON of an RLE, of polygons, or of [x, y, w, h], ...]}, ...] or JSON of that list}
    {"image", "height", "width", "mask": [RLE or polygons, ...], "conversations": [{"value"}, ...]}
    {"image": null, "conversations": [{"value"}, ...]}

An annotation is a turn by itself: ``ann`` holds its instances, null or an empty list is no-target. With ``mask``, the
k-th phrase marked in the answers (`instructsam.data.release_markup`) has the k-th entry, itself a mask, a list of them
or null; a conversation with only one marked phrase has all of them for it. Height and width may be absent where masks
are RLEs; else the picture's header is read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Any

from instructsam.data.checks import Place, Skips
from instructsam.data.eval_split import as_phrase, name_of, picture_size
from instructsam.data.json_stream import stream_records
from instructsam.data.release_markup import PHRASE_MARKS, check_file_name, check_text, read_conversation
from instructsam.data.release_masks import box_of, check_each, instances_of, mask_of, parse_text, refuse_empty
from instructsam.errors import DataError
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

logger = logging.getLogger(__name__)

POINTS = "point annotations"
_BLOCK = 64
"""Records whose masks are checked together."""


@dataclass
class _Unit:
    """Turns that are kept or lost together, their masks not checked yet.

    Attributes:
        place: in the record; "" is the record itself.
        shapes: one list a phrase, in the order of the turns: (name, parsed JSON) of each instance.
    """

    place: str
    turns: list[Turn] = field(default_factory=list)
    shapes: list[list[tuple[str, Any]]] = field(default_factory=list)
    are_boxes: bool = False
    fault: ValueError | None = None


@dataclass
class _Record:
    place: Place
    id: str
    image: Path | None = None
    height: int = 0
    width: int = 0
    joint: bool = False
    units: list[_Unit] = field(default_factory=list)
    fault: ValueError | None = None


def read_release_train(
    file: Path | str,
    image_root: Path | str,
    parts: int | None = None,
    phrase_marks: Sequence[Sequence[str]] = PHRASE_MARKS,
    encoding: str = "utf-8",
    skips: Skips | None = None,
) -> Iterator[Sample]:
    """Read a file, or those that a pattern names ("mapillary*.json"), one sample a record, in the order of the files.

    Sample ids are FILE/INDEX. A bad annotation is left out by itself, a bad conversation with all its turns. Points
    cannot be trained on: their annotations are left out whatever ``skips`` says, counted in ``skips.aside`` and logged
    at the end.

    Args:
        image_root: folder that pictures are named relative to; they are not looked for unless their size is not given.
        parts: the number of files that the pattern must name; any where None.
        phrase_marks: pairs of what opens and closes a phrase in an answer.
        encoding: "utf-8" or "cp1252".
        skips: what to do about bad entries; raises at the first by default.

    Raises:
        ValueError: naming file, index and reason: missing fields, empty texts, unknown types, masks that are malformed,
            empty or of another size, phrases and masks that do not fit together; another number of parts; no usable
            record at all. A file that is not JSON to its end is an error with "skip" too.
    """
    skips = skips or Skips()
    reader = _Reader(Path(image_root), phrase_marks, skips)
    planned = reader.plan_all(_files(file, parts), encoding)
    count = 0
    while block := list(islice(planned, _BLOCK)):
        for sample in reader.finish(block):
            count += 1
            yield sample
    if reader.num_points:
        logger.warning("%s: left out %d %s, which cannot be trained on", file, reader.num_points, POINTS)
    if not count:
        points = f" ({reader.num_points} {POINTS} cannot be trained on)" if reader.num_points else ""
        raise ValueError(f"{file}: no usable record{points}")


def _files(file: Path | str, parts: int | None) -> dict[str, Path]:
    """The files by name, as ids have it, in natural order ("x2.json" before "x10.json")."""
    found = [str(file)] if Path(file).is_file() else glob(str(file))
    if not found:
        raise ValueError(f"{file}: no such file")
    found.sort(
        key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
    )
    names = [os.path.basename(path) for path in found]
    if parts is not None and len(found) != parts:
        raise ValueError(f"{file}: expected {parts} files, found {len(found)}: {', '.join(names)}")
    if len(set(names)) < len(names):
        folder = os.path.commonpath([os.path.dirname(path) for path in found])
        names = [Path(os.path.relpath(path, folder)).as_posix() for path in found]
    return {name: Path(path) for name, path in zip(names, found, strict=True)}


class _Reader:
    """From records to samples: `plan` reads what a record says, `finish` checks the masks of many at once."""

    def __init__(self, image_root: Path, phrase_marks: Sequence[Sequence[str]], skips: Skips):
        self.image_root, self.phrase_marks, self.skips = image_root, phrase_marks, skips
        self.num_points = 0

    def plan_all(self, files: Mapping[str, Path], encoding: str) -> Iterator[_Record]:
        """The records of all files, by their names in ids."""
        for name, path in files.items():
            for index, record in stream_records(path, encoding):
                yield self.plan(record, Place(path, f"[{index}]"), f"{name}/{index}")

    def plan(self, record: Any, place: Place, identity: str) -> _Record:
        """What a record asks. Faults are kept for `finish`, which tells them in the order of the file."""
        planned = _Record(place, identity)
        try:
            if not isinstance(record, Mapping):
                raise DataError(f"expected an object, got {type(record).__name__}", "field")
            name = None if record.get("image") is None else check_file_name(name_of(record, "image"))
            annotation, conversations = (record.get(key) or None for key in ("annotation", "conversations"))
            if annotation is None and conversations is None:
                raise DataError("has neither annotation nor conversations", "field")
            if annotation is not None and conversations is not None:
                raise DataError("has both annotation and conversations", "field")
            if annotation is not None:
                if name is None:
                    raise DataError("has an annotation, but no image", "field")
                planned.units = list(self._annotations(annotation, identity))
                planned.joint = _lower(record.get("type")) == "instseg"
            else:
                planned.units = [self._conversation(conversations, record.get("mask"), name is not None, identity)]
            if name is not None:
                shapes = [shape for unit in planned.units for one in unit.shapes for _, shape in one]
                planned.image = self.image_root / name
                planned.height, planned.width = picture_size(planned.image, record, shapes)
        except ValueError as error:
            planned.fault = error
        return planned

    def finish(self, block: list[_Record]) -> Iterator[Sample]:
        """The samples of planned records."""
        checked = _check_together(block)
        for record in block:
            turns: list[Turn] = []
            if record.fault is not None:
                self.skips.bad("records", record.place, record.fault)
                continue
            for unit in record.units:
                place = record.place.within(unit.place)
                with self.skips.entry("annotations" if unit.place else "records", place):
                    turns.extend(_with_masks(unit, record.height, record.width, checked))
            if turns:
                # A joint sample that lost an annotation keeps the rest: what is asked is what is left, and nothing in
                # the joint instruction says that it is all there is.
                joint = record.joint and all(turn.form == "phrase" for turn in turns)
                yield Sample(record.id, record.image, record.height, record.width, tuple(turns), joint=joint)

    # ---- annotations --------------------------------------------------------------------------------------------

    def _annotations(self, value: Any, identity: str) -> Iterator[_Unit]:
        value = parse_text(value, "annotation")
        if not isinstance(value, list):
            raise DataError(f"annotation must be a list, or JSON of one, got {type(value).__name__}", "field")
        if not value:
            raise DataError("annotation is an empty list", "field")
        for index, entry in enumerate(value):
            place = f"annotation[{index}]"
            try:
                if isinstance(entry, Mapping) and _lower(entry.get("ann_type")) == "point" and entry.get("ann"):
                    self.num_points += 1
                    self.skips.aside[POINTS] += 1  # at once: who reads it may stop before the end
                    continue
                yield _annotation(entry, place, f"{identity}-{index}")
            except ValueError as error:
                yield _Unit(place, fault=error)

    # ---- conversations ------------------------------------------------------------------------------------------

    def _conversation(self, turns: Any, mask: Any, has_image: bool, identity: str) -> _Unit:
        if mask is not None and not isinstance(mask, list):
            raise DataError(f"mask must be a list of masks, got {type(mask).__name__}", "field")
        if mask and not has_image:
            raise DataError("has masks, but no image", "field")
        exchanges = read_conversation(turns, has_image, mask is not None, self.phrase_marks)
        count = sum(len(exchange.phrases) for exchange in exchanges)
        entries = [instances_of(entry, f"mask[{k}]") for k, entry in enumerate(mask or [])]
        if count == 1:
            entries = [[shape for entry in entries for shape in entry]]
        if count != len(entries):
            raise DataError(f"{count} phrases are marked in the answers, but there are {len(entries)} masks", "markup")
        asked = []
        for number, (instruction, pieces, phrases) in enumerate(exchanges):
            if pieces == ("", *[", "] * (len(phrases) - 1), ""):
                pieces = ()  # nothing but the phrases one after another
            targets = tuple(PhraseTarget(phrase) for phrase in phrases)
            asked.append(Turn(instruction, targets, "conversation", f"{identity}-{number}", answer=pieces))
        return _Unit("", asked, entries)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _annotation(entry: Any, place: str, identity: str) -> _Unit:
    if not isinstance(entry, Mapping):
        raise DataError(f"expected an object, got {type(entry).__name__}", "field")
    form = _lower(entry.get("type"))
    if form not in ("phrase", "sentence", "ocr"):
        raise DataError(f"type must be phrase, sentence or OCR, got {short(entry.get('type'))}", "annotation type")
    instruction = phrase = check_text(entry.get("text"), "text")
    if form == "phrase":
        instruction = phrase = check_text(as_phrase(instruction), "text")
    elif form == "sentence":
        phrase = check_text(entry.get("category"), "category (the phrase to answer with)")

    ann = entry.get("ann")
    if ann is not None and not isinstance(ann, list):
        raise DataError(f"ann must be null or a list, got {type(ann).__name__}", "field")
    kind = _lower(entry.get("ann_type"))
    if kind not in ("mask", "bbox") and ann:
        raise DataError(f"ann_type must be mask, bbox or point, got {short(entry.get('ann_type'))}", "annotation type")
    shapes = [(what := f"ann[{k}]", parse_text(shape, what)) for k, shape in enumerate(ann or [])]
    turn = Turn(instruction, (PhraseTarget(phrase),), form if shapes else "no-target", identity, form)
    return _Unit(place, [turn], [shapes], are_boxes=kind == "bbox")


# ---- masks -----------------------------------------------------------------------------------------------------------


def _check_together(block: Iterable[_Record]) -> dict[int, RLE]:
    """Checked RLEs by the `id` of what was read, for all records at once: that is many times faster than one by one.

    An RLE that is missing in the result is bad; the check of it alone will say why.
    """
    found: list[Any] = []
    for record in block:
        if record.fault is None:
            size = [record.height, record.width]
            for unit in record.units:
                if not unit.are_boxes:
                    found.extend(
                        shape
                        for shapes in unit.shapes
                        for _, shape in shapes
                        if isinstance(shape, dict) and shape.get("size") == size
                    )
    return {id(shape): rle for shape, rle in zip(found, check_each(found), strict=True) if rle is not None}


def _with_masks(unit: _Unit, height: int, width: int, checked: Mapping[int, RLE]) -> list[Turn]:
    """The turns with the instances of their phrases."""
    if unit.fault is not None:
        raise unit.fault
    shapes = iter(unit.shapes)
    turns = []
    for turn in unit.turns:
        phrases = []
        for phrase in turn.phrases:
            rles = []
            for what, shape in next(shapes):
                if unit.are_boxes:
                    rles.append(box_of(shape, height, width, what))
                else:
                    rles.append(checked.get(id(shape)) or mask_of(shape, height, width, what))
                refuse_empty(rles[-1], what)
            phrases.append(replace(phrase, rles=tuple(rles), box_only=unit.are_boxes and bool(rles)))
        turns.append(replace(turn, phrases=tuple(phrases)))
    return turns
