"""COCO and LVIS files of any size, picture by picture, with the annotations of a picture grouped by category.

Reads, in any order of the lists (DESIGN section 9)::

    {"images":      [{"id", "file_name" or "coco_url", "height", "width",
                      "neg_category_ids"?: [...], "not_exhaustive_category_ids"?: [...]}],       (LVIS: the last two)
     "annotations": [{"id", "image_id", "category_id", "iscrowd"?, "segmentation"?: RLE or polygons,
                      "bbox": [x, y, w, h]}],
     "categories":  [{"id", "name"}]}

The annotations of a picture stand anywhere in such a file, so all of them are held at once, but as little of each as
possible: a row of numbers, and its compressed mask or its box in one long row of bytes. The file is gone through twice,
since masks can be made only when the sizes of the pictures are known.

"Every person in the picture" can be asked only if every one is labelled. A category is therefore left out of a picture
that has a crowd region of it (unlabelled individuals), that LVIS calls not exhaustively labelled for it, or where one
of its annotations is bad and skipped. An annotation whose category cannot be told makes the whole picture doubtful.
"""

from __future__ import annotations

import logging
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instructsam import masks
from instructsam.data.checks import Place, Skips, check_four, check_size, is_id, is_whole
from instructsam.data.coco_instances import annotation_name
from instructsam.data.json_stream import stream_json
from instructsam.data.release_markup import check_file_name, check_text
from instructsam.errors import DataError
from instructsam.structures import RLE, PhraseTarget

logger = logging.getLogger(__name__)

_MASK, _BOX, _CROWD, _BAD = range(4)  # states of an annotation
_UNKNOWN = 2**16 - 1  # category of an annotation that does not tell it
_BOX_FORM = struct.Struct("4f")  # x1, y1, x2, y2 in pixels
_NO_LINK = -1

PhrasesOf = Callable[[dict[str, dict[str, Any]]], Mapping[str, str]]
"""From category entries by id to the phrase of each id. Categories of one phrase count as one."""


@dataclass(frozen=True)
class Group:
    """All instances of one phrase in one picture, and the ids of their annotations."""

    target: PhraseTarget
    ids: tuple[int, ...]


class Picture(NamedTuple):
    """A picture and what is known to be in it and not in it.

    Attributes:
        groups: by phrase; every instance of the phrase in the picture is there.
        present: phrases of the groups, and those left out because not every instance is labelled.
        absent: phrases of which the picture has no instance.
        linked: ids of annotations that others of the picture name.
    """

    id: str
    name: str
    height: int
    width: int
    groups: dict[str, Group]
    present: set[str]
    absent: list[str]
    linked: set[int]


class _Images:
    """Entries of ``images`` by row, without what is not needed of them."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}  # id -> row; -1 for a bad one
        self.names: list[str] = []
        self.heights, self.widths = array("i"), array("i")
        self.negative: dict[int, list[str]] = {}  # row -> category ids
        self.unexhaustive: dict[int, list[str]] = {}
        self.federated = False  # as LVIS: labelled for some categories only, and each picture says for which

    def add(self, entry: Any, prefixes: Mapping[str, str]) -> None:
        if not isinstance(entry, dict) or not is_id(entry.get("id")):
            raise DataError("expected an object with an id (a number or a string)", "field")
        identity = str(entry["id"])
        if identity in self.rows:
            raise DataError(f"id {entry['id']!r} occurs a second time", "duplicate")
        self.rows[identity] = -1
        name = _file_name(entry)
        check_size(entry.get("height"), entry.get("width"))
        negative, unexhaustive = (_ids(entry, f"{key}_category_ids") for key in ("neg", "not_exhaustive"))
        row = self.rows[identity] = len(self.names)
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        self.names.append(prefixes.get(prefix, "") + name.removeprefix(prefix))
        self.heights.append(entry["height"])
        self.widths.append(entry["width"])
        self.federated |= negative is not None
        if negative:
            self.negative[row] = negative
        if unexhaustive:
            self.unexhaustive[row] = unexhaustive


class _Annotations:
    """Columns of numbers, one row an annotation; masks and boxes one after another in ``data``."""

    def __init__(self) -> None:
        self.image, self.category, self.state = array("i"), array("H"), array("B")
        self.index, self.id, self.link = array("I"), array("q"), array("q")
        self.data, self.ends = bytearray(), array("q", [0])

    def add(self, index: int, image: int, category: int, state: int, identity: int, data: bytes) -> None:
        self.index.append(index)
        self.image.append(image)
        self.category.append(category)
        self.state.append(state)
        self.id.append(identity)
        self.data += data
        self.ends.append(len(self.data))


class CocoFile:
    """A file, read; then its pictures are gone through once.

    Args:
        path: the JSON file.
        phrases_of: what its categories are called.
        prefixes: beginnings of file names and what stands there instead; the first that fits is replaced.
        boxes_only: take boxes and do not look at masks.
        link: field of an annotation that names another one (PACO's obj_ann_id), for `Picture.linked`.
        skips: what to do about bad entries.

    Raises:
        ValueError: a file that cannot be read, that has no images, annotations or categories; bad entries as
            configured, naming file, index and reason.
    """

    def __init__(
        self,
        path: Path | str,
        phrases_of: PhrasesOf,
        prefixes: Mapping[str, str] | None = None,
        boxes_only: bool = False,
        link: str | None = None,
        skips: Skips | None = None,
    ):
        self.path, self.boxes_only, self.link = Path(path), boxes_only, link
        self.skips = skips or Skips()
        self.left_out: Counter[str] = Counter()
        self._images, self._annotations = _Images(), _Annotations()
        entries: dict[str, dict[str, Any]] = {}
        for key, index, entry in self._items("images", "categories"):
            if key == "images":
                with self.skips.entry("images", Place(self.path, f"images[{index}]")):
                    self._images.add(entry, prefixes or {})
            else:
                with self.skips.entry("categories", Place(self.path, f"categories[{index}]")):
                    _add_category(entry, entries)
        for key, found in (("images", self._images.rows), ("categories", entries)):
            if not found:
                raise DataError(f"{self.path}: has no {key}", "field")
        phrases = phrases_of(entries)
        self.phrases = list(dict.fromkeys(phrases.values()))
        if len(self.phrases) >= _UNKNOWN:
            raise ValueError(f"{self.path}: {len(self.phrases)} categories are more than the {_UNKNOWN - 1} supported")
        numbers = {phrase: number for number, phrase in enumerate(self.phrases)}
        self._category = {identity: numbers[phrase] for identity, phrase in phrases.items()}
        self._ids_of: dict[str, set[str]] = {}
        for identity, phrase in phrases.items():
            self._ids_of.setdefault(phrase, set()).add(identity)
        self._read_annotations()
        self._order, self._starts = self._by_image()

    # ---- reading -----------------------------------------------------------------------------------------------

    def _items(self, *keys: str) -> Iterator[tuple[str, int, Any]]:
        for key, index, entry in stream_json(self.path):
            if key == "" or (key in keys and index < 0):
                raise DataError(f"{self.path}: expected an object with lists of {', '.join(keys)}", "field")
            if key in keys:
                yield key, index, entry

    def _read_annotations(self) -> None:
        index = -1
        for _, index, entry in self._items("annotations"):
            self._read_annotation(index, entry)
        if index < 0:
            raise DataError(f"{self.path}: has no annotations", "field")
        self._mark_repeated()

    def _read_annotation(self, index: int, entry: Any) -> None:
        image, category, identity, link = -1, _UNKNOWN, 0, _NO_LINK
        state, data = _BAD, b""
        with self.skips.entry("annotations", Place(self.path, annotation_name(index, entry))):
            if not isinstance(entry, dict):
                raise DataError(f"expected an object, got {type(entry).__name__}", "field")
            image = self._lookup(self._images.rows, entry, "image_id")
            if image < 0:  # one of a bad picture, which is counted already
                return
            category = self._lookup(self._category, entry, "category_id")
            identity = _whole(entry, "id")
            link = _NO_LINK if self.link is None or entry.get(self.link) is None else _whole(entry, self.link)
            state, data = self._contents(entry, self._images.heights[image], self._images.widths[image])
        if image >= 0:
            self._annotations.add(index, image, category, state, identity, data)
            if self.link is not None:
                self._annotations.link.append(link)

    @staticmethod
    def _lookup(rows: Mapping[str, int], entry: dict[str, Any], key: str) -> int:
        if not is_id(entry.get(key)) or (row := rows.get(str(entry[key]))) is None:
            raise DataError(f"unknown {key} {entry.get(key)!r}", "reference")
        return row

    def _contents(self, entry: dict[str, Any], height: int, width: int) -> tuple[int, bytes]:
        """State of an annotation and its mask or box as bytes. Boxes are checked when they become masks."""
        crowd = entry.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            raise DataError(f"iscrowd must be 0 or 1, got {crowd!r}", "field")
        if crowd:
            return _CROWD, b""
        segmentation = None if self.boxes_only else entry.get("segmentation")
        if segmentation is None or segmentation == []:
            if entry.get("bbox") is None:
                raise DataError(f"has no {'bbox' if self.boxes_only else 'segmentation and no bbox'}", "field")
            return _BOX, _BOX_FORM.pack(*_corners(entry["bbox"]))
        rle = masks.segmentation_to_rle(segmentation, height, width)
        if not masks.areas([rle], checked=True)[0]:
            raise DataError("the mask is empty (area 0)", "mask empty")
        return _MASK, rle["counts"].encode("ascii")

    def _mark_repeated(self) -> None:
        """Later annotations of an id that was there already are bad."""
        ids, state = np.frombuffer(self._annotations.id, np.int64), np.frombuffer(self._annotations.state, np.uint8)
        order = np.argsort(ids, kind="stable")
        later = order[1:][ids[order[1:]] == ids[order[:-1]]]
        for row in np.sort(later[state[later] != _BAD]).tolist():
            repeated = DataError(f"id {self._annotations.id[row]} occurs a second time", "duplicate")
            self._bad(row, repeated)
            self._annotations.state[row] = _BAD

    def _bad(self, row: int, error: Exception) -> None:
        name = annotation_name(self._annotations.index[row], {"id": self._annotations.id[row]})
        self.skips.bad("annotations", Place(self.path, name), error)

    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the annotations, those of the first picture first; and where each picture's begin."""
        image = np.frombuffer(self._annotations.image, np.int32)
        order = np.argsort(image, kind="stable").astype(np.uint32)
        return order, np.concatenate([[0], np.cumsum(np.bincount(image, minlength=len(self._images.names)))])

    # ---- pictures ----------------------------------------------------------------------------------------------

    def pictures(self) -> Iterator[Picture]:
        """All usable pictures in the order of the file; at the end, a line in the log on what was left out of them.

        Raises:
            ValueError: boxes without extent, outside their picture or with NaN, unless they are skipped.
        """
        identities = (identity for identity, row in self._images.rows.items() if row >= 0)
        for row, (identity, name) in enumerate(zip(identities, self._images.names, strict=True)):
            annotations = self._annotations
            states: dict[int, list[int]] = {}  # category -> rows of its annotations
            for place in self._order[self._starts[row] : self._starts[row + 1]].tolist():
                states.setdefault(annotations.category[place], []).append(place)
            if _UNKNOWN in states:
                self.left_out["pictures with an annotation of an unknown category"] += 1
                continue
            size = (self._images.heights[row], self._images.widths[row])
            unexhaustive = self._images.unexhaustive.get(row, ())
            doubtful = {self._category[one] for one in unexhaustive if one in self._category}
            groups = {}
            for category, places in states.items():
                group, reason = self._group(self.phrases[category], places, *size), "bad annotations"
                if any(annotations.state[place] == _CROWD for place in places):
                    group, reason = None, "crowd regions"
                elif category in doubtful:
                    group, reason = None, "incomplete labels"
                if group is None:
                    self.left_out[f"categories of a picture for {reason}"] += 1
                else:
                    groups[self.phrases[category]] = group
            present = {self.phrases[category] for category in chain(states, doubtful)}
            linked = self._linked(chain.from_iterable(states.values()))
            yield Picture(identity, name, *size, groups, present, self._absent(row, present), linked)
        if self.left_out:
            reasons = ", ".join(f"{count} {what}" for what, count in sorted(self.left_out.items()))
            logger.info("%s: left out, as not every instance is labelled: %s", self.path, reasons)

    def _linked(self, places: Iterable[int]) -> set[int]:
        """What annotations name beside themselves."""
        if self.link is None:
            return set()
        links, ids = self._annotations.link, self._annotations.id
        return {links[place] for place in places if links[place] not in (ids[place], _NO_LINK)}

    def _absent(self, row: int, present: set[str]) -> list[str]:
        if not self._images.federated:
            return [phrase for phrase in self.phrases if phrase not in present]
        negative = set(self._images.negative.get(row, ()))
        found = {self.phrases[self._category[identity]] for identity in negative if identity in self._category}
        return sorted(phrase for phrase in found - present if self._ids_of[phrase] <= negative)

    def _group(self, phrase: str, places: list[int], height: int, width: int) -> Group | None:
        """The instances of a phrase; None where one is missing. Masks become boxes where others have only boxes."""
        annotations = self._annotations
        states = [annotations.state[place] for place in places]
        complete = all(state in (_MASK, _BOX) for state in states)
        box_only = _BOX in states
        rles: list[RLE] = []
        for place, state in zip(places, states, strict=True):
            data = bytes(annotations.data[annotations.ends[place] : annotations.ends[place + 1]])
            if state == _MASK:
                rle: RLE = {"size": [height, width], "counts": data.decode("ascii")}
                if box_only:
                    rle = masks.box_to_rle(masks.bboxes([rle], checked=True)[0], height, width)
                rles.append(rle)
            elif state == _BOX:
                try:
                    rles.append(masks.box_to_rle(_BOX_FORM.unpack(data), height, width, "bbox"))
                except DataError as error:
                    self._bad(place, error)
                    complete = False
        if not complete:
            return None
        return Group(PhraseTarget(phrase, tuple(rles), box_only), tuple(annotations.id[place] for place in places))


def _add_category(entry: Any, entries: dict[str, dict[str, Any]]) -> None:
    if not isinstance(entry, dict) or not is_id(entry.get("id")):
        raise DataError("expected an object with an id (a number or a string)", "field")
    if not isinstance(entry.get("name"), str) or not any(map(str.isalnum, entry["name"])):
        raise DataError(f"the name is empty or missing: {entry.get('name')!r}", "text")
    check_text(entry["name"], "the name")
    if str(entry["id"]) in entries:
        raise DataError(f"id {entry['id']!r} occurs a second time", "duplicate")
    entries[str(entry["id"])] = entry


def _file_name(entry: dict[str, Any]) -> str:
    """LVIS gives no name but a URL, of which folder and name are taken: train2017/000000391895.jpg."""
    if (name := entry.get("file_name")) is None and isinstance(url := entry.get("coco_url"), str):
        name = "/".join(url.split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise DataError("has no file_name (and no coco_url)", "field")
    return check_file_name(name)


def _ids(entry: dict[str, Any], key: str) -> list[str] | None:
    ids = entry.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(map(is_id, ids)):
        raise DataError(f"{key} must be a list of ids, got {ids!r}", "field")
    return [str(identity) for identity in ids]


def _whole(entry: dict[str, Any], key: str) -> int:
    value = entry.get(key)
    if not is_whole(value, 0) or value >= 2**63:
        raise DataError(f"{key} must be a whole number, got {value!r}", "field")
    return value


def _corners(box: Any) -> tuple[float, float, float, float]:
    """[x, y, w, h] as x1, y1, x2, y2."""
    if any(abs(value) > masks.MAX_PIXELS for value in check_four(box)):  # infinite too; NaN is found later
        finite = all(abs(value) != float("inf") for value in box)
        raise DataError(f"bbox {str(box)[:60]} lies outside any picture", "box outside" if finite else "box nan")
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height
