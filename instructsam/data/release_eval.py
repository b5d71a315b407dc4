"""Reader of the release's evaluation JSON: Inst2Seg, gRefCOCO, ReasonSeg and RoboRefIt (DESIGN section 9).

One file a split, a list of

    inst2seg    {image, height, width, annotation: [{text, mask?}]}
    grefcoco    {image, height, width, cat: [expression, ...], masks: [mask of each expression, ...]}
    reasonseg   {image, question, is_sentence, mask, ignore_mask?}
    roborefit   {image, question | expression, masks}

A mask is an RLE, a list of RLEs, polygons, or a list of lists of polygons; no mask is no-target, in inst2seg and
grefcoco RLEs without a pixel too, which is how the released code writes it. Height and width may
be absent where masks are RLEs; else the picture's header is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructsam.data.checks import Place, Skips, read_json
from instructsam.data.eval_split import Collector, EvalSplit, as_phrase, instance_rles, name_of, turn_of, union_rles
from instructsam.errors import DataError


@dataclass(frozen=True)
class _Asked:
    """An instruction of a record: its place there ("" = the record itself), its words, its masks as they stand."""

    place: str
    text: Any
    mask: Any
    ignore: Any = None
    kind: str = ""
    is_phrase: bool = False
    joined: bool = False
    empty_is_none: bool = False


def read_release_eval(
    root: Path | str,
    split: str,
    name: str,
    layout: str,
    file: str,
    image_root: Path | str,
    skips: Skips | None = None,
) -> EvalSplit:
    """Read one split; ids are NAME/SPLIT/INDEX or NAME/SPLIT/INDEX-INDEX, the places in the file.

    Args:
        layout: inst2seg, grefcoco, reasonseg or roborefit, see above.
        file: below ``root``; ``{split}`` in it stands for the split.
        image_root: folder that pictures are named relative to.
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file, index and reason: another layout, missing fields, empty texts, masks that are
            malformed, empty or of another size, missing pictures.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    path = Path(root) / file.replace("{split}", split)
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records, got {type(records).__name__}", "field")
    collector = Collector(name, split, path, image_root, skips or Skips())
    for index, record in enumerate(records):
        asked: list[_Asked] = []
        where = Place(path, f"[{index}]")
        with collector.entry(where, "records"):
            image = name_of(record, "image")
            asked = list(LAYOUTS[layout](record))
        for number, one in enumerate(asked):
            place = where.within(one.place)
            with collector.entry(place):
                height, width = collector.size_of(image, record, one.mask, one.ignore)
                read = union_rles if one.joined else instance_rles
                rles = read(one.mask, height, width, empty_is_none=one.empty_is_none)
                ignored = union_rles(one.ignore, height, width, "ignore_mask", empty_is_none=True)
                identity = f"{index}-{number}" if one.place else index
                phrase = as_phrase(one.text) if one.is_phrase and isinstance(one.text, str) else ""
                turn = turn_of(identity, one.text, rles, phrase, one.kind)
                collector.add(place, image, (height, width), turn, ignored[0] if ignored else None)
    return collector.finish()


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(record.get(key), list):
        raise DataError(f"has no list {key!r}", "field")
    return record[key]


def _inst2seg(record: Mapping[str, Any]) -> Iterator[_Asked]:
    for index, entry in enumerate(_list(record, "annotation")):
        if not isinstance(entry, Mapping):
            raise DataError(f"annotation[{index}]: expected an object, got {type(entry).__name__}", "field")
        yield _Asked(f"annotation[{index}]", entry.get("text"), entry.get("mask"), empty_is_none=True)


def _grefcoco(record: Mapping[str, Any]) -> Iterator[_Asked]:
    texts, found = _list(record, "cat"), _list(record, "masks")
    if len(texts) != len(found):
        raise DataError(f"has {len(texts)} expressions in cat, but {len(found)} masks", "field")
    for index, (text, mask) in enumerate(zip(texts, found, strict=True)):
        yield _Asked(f"cat[{index}]", text, mask, is_phrase=True, empty_is_none=True)


def _reasonseg(record: Mapping[str, Any]) -> Iterator[_Asked]:
    if not isinstance(record.get("is_sentence"), bool):
        raise DataError(f"is_sentence must be true or false, got {record.get('is_sentence')!r}", "field")
    kind = "long" if record["is_sentence"] else "short"
    if record.get("mask") in (None, []):
        raise DataError("has no mask", "field")
    yield _Asked("", record.get("question"), record["mask"], record.get("ignore_mask"), kind, joined=True)


def _roborefit(record: Mapping[str, Any]) -> Iterator[_Asked]:
    keys = [key for key in ("question", "expression") if record.get(key) is not None]
    if len(keys) != 1:
        raise DataError("needs either a question or an expression", "field")
    if record.get("masks") in (None, []):
        raise DataError("has no masks", "field")
    yield _Asked("", record[keys[0]], record["masks"], is_phrase=keys == ["expression"])


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Iterator[_Asked]]] = {
    "inst2seg": _inst2seg,
    "grefcoco": _grefcoco,
    "reasonseg": _reasonseg,
    "roborefit": _roborefit,
}
