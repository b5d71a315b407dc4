"""Reader of parts of objects: PACO, PartImageNet and Pascal-Part as COCO files (DESIGN sections 8, 9).

The files are those of `instructsam.data.coco_grouped`. A category is a part by its name, which says whose part it is::

    separator ":"   {"id": 1025, "name": "mug:handle"}           PACO; "mug" is a category beside it
    separator " "   {"id": 0, "name": "Quadruped Head"}          PartImageNet
    separator " "   {"id": 7, "name": "potted plant pot"}        Pascal-Part, with object_names=["potted plant", ...]

It is asked for as "handle of the mug", which reads well in an instruction and in the answer, and tells apart the heads
of different animals. Names without the separator are objects.

In PACO an annotation of a part names the object it belongs to (``obj_ann_id``), and not every object has its parts
labelled. Where a picture has an object none of whose parts is labelled, the parts of its category are left out, since
"every handle" would miss some. PACO's attributes are not read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructsam.data.checks import Skips
from instructsam.data.coco_categories import no_target_turns, readable, samples_of
from instructsam.data.coco_grouped import CocoFile, Picture
from instructsam.errors import DataError
from instructsam.structures import Sample, Turn

logger = logging.getLogger(__name__)


def read_coco_parts(
    file: Path | str,
    image_root: Path | str,
    name: str,
    separator: str = ":",
    object_names: Sequence[str] = (),
    objects: bool = True,
    prefixes: Mapping[str, str] | None = None,
    absent: int = 0,
    seed: int = 0,
    skips: Skips | None = None,
) -> Iterator[Sample]:
    """One sample a picture, in the order of the file, with a turn for every part category in it; ids are NAME/IMAGE_ID.

    Args:
        separator: stands between object and part in a category's name.
        object_names: objects whose names hold the separator themselves.
        objects: ask for whole objects too, where the file has them.
        absent: at most so many no-target turns a picture. They ask for parts of objects that the picture does not
            have: to be used only where every picture is labelled for every object (in PartImageNet it is not), or
            names those that it does not have (as PACO does).
        image_root, prefixes, seed, skips: as in `instructsam.data.coco_categories.read_coco_categories`.

    Raises:
        ValueError: as there; and a file without parts.
    """
    if absent < 0:
        raise ValueError(f"absent={absent}: must not be negative")
    if not separator:
        raise ValueError("separator is empty")
    parts = _Parts()

    def phrases_of(categories: dict[str, dict[str, Any]]) -> dict[str, str]:
        names = [entry["name"].strip() for entry in categories.values()]
        phrases = parts.add([split_name(name, separator, object_names) for name in names])
        if not parts.owner:
            raise DataError(f"{file}: no category is a part: none has {separator!r} within its name", "field")
        return dict(zip(categories, phrases, strict=True))

    coco = CocoFile(file, phrases_of, prefixes, link="obj_ann_id", skips=skips)
    left_out = 0

    def turns_of(picture: Picture) -> list[Turn]:
        nonlocal left_out
        turns = []
        for phrase, group in picture.groups.items():
            owner = parts.owner.get(phrase)
            if owner is None and objects:
                turns.append(Turn(phrase, (group.target,), "category", "", "category"))
            elif owner is not None and _is_labelled(picture, owner):
                turns.append(Turn(phrase, (group.target,), "part", "", "phrase"))
            elif owner is not None:
                left_out += 1
        return turns + no_target_turns(picture.id, parts.absent(picture), absent, seed, "phrase")

    yield from samples_of(coco, image_root, name, turns_of)
    if left_out:
        logger.info("%s: left out %d parts of objects of which some have none labelled", coco.path, left_out)


def split_name(name: str, separator: str, object_names: Sequence[str] = ()) -> tuple[str, str]:
    """Object and part; an empty part for an object. The longest of ``object_names`` that fits goes before the rest."""
    known = [owner for owner in object_names if name == owner or name.startswith(owner + separator)]
    owner = max(known, key=len) if known else name.partition(separator)[0]
    part = name.removeprefix(owner).removeprefix(separator)
    if not any(map(str.isalnum, owner)) or not any(map(str.isalnum, part)):
        return name, ""
    return owner.strip(), part.strip()


class _Parts:
    """What parts and objects are called, and which belong together."""

    def __init__(self) -> None:
        self.owner: dict[str, str] = {}  # phrase of a part -> phrase of its object
        self.parts: dict[str, list[str]] = {}  # phrase of an object -> phrases of its parts
        self.objects: set[str] = set()  # objects that are categories themselves

    def add(self, names: list[tuple[str, str]]) -> list[str]:
        """Phrases of (object, part) or (object, "")."""
        owners, parts = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
        owner_words = dict(zip(owners, readable(owners), strict=True))
        part_words = dict(zip(parts, readable(parts), strict=True))
        phrases = []
        for one, part in names:
            owner = owner_words[one]
            phrases.append(f"{part_words[part]} of the {owner}" if part else owner)
            if part:
                self.owner[phrases[-1]] = owner
                self.parts.setdefault(owner, []).append(phrases[-1])
            else:
                self.objects.add(owner)
        return phrases

    def absent(self, picture: Picture) -> list[str]:
        """Parts of the objects that a picture does not have."""
        absent, found = set(picture.absent), []
        for owner, parts in self.parts.items():
            if picture.present.isdisjoint([owner, *parts]):
                gone = owner in absent if owner in self.objects else absent.issuperset(parts)
                found += parts if gone else []
        return found


def _is_labelled(picture: Picture, owner: str) -> bool:
    """Does every object of that name have its parts labelled, as far as the file says?"""
    if owner in picture.present and owner not in picture.groups:  # left out: there are more than those labelled
        return False
    objects = picture.groups[owner].ids if owner in picture.groups else ()
    return not picture.linked or picture.linked.issuperset(objects)
