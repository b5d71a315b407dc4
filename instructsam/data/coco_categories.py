"""Reader of COCO, LVIS and Objects365 instances: "segment every dog", one instruction a category (DESIGN section 9).

The files are those of `instructsam.data.coco_grouped`, which also says when a category is left out of a picture. An
annotation without ``segmentation`` stands for its box; Objects365 has nothing else. Where some instances of a category
in a picture have masks and some only boxes, all of them are taken as boxes, since a phrase is learnt from one or the
other.

A category that a picture does not have can be asked as no-target. COCO and Objects365 label every category
in every picture, so all others are absent; LVIS labels some, and names those that were looked for in vain
(``neg_category_ids``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from instructsam.data.checks import Skips
from instructsam.data.coco_grouped import CocoFile, Picture
from instructsam.structures import PhraseTarget, Sample, Turn


def read_coco_categories(
    file: Path | str,
    image_root: Path | str,
    name: str,
    prefixes: Mapping[str, str] | None = None,
    absent: int = 0,
    seed: int = 0,
    boxes_only: bool = False,
    skips: Skips | None = None,
) -> Iterator[Sample]:
    """One sample a picture, in the order of the file, with a turn for every category in it; ids are NAME/IMAGE_ID.

    Pictures without a turn are left out. All annotations are held in memory: some 70 bytes each beside the
    compressed mask, 500 MB for LVIS and 2.5 GB for Objects365.

    Args:
        image_root: folder that file names are relative to. Of LVIS's URLs the last folder is part of the name.
        prefixes: beginnings of file names and what stands there instead, as in {"images/v1/": "train/"}; names that
            begin with none of them stay as they are.
        absent: at most so many no-target turns a picture.
        seed: which categories these are depends on it and on the picture's id alone.
        boxes_only: take boxes and do not look at masks.
        skips: what to do about bad entries; raises at the first by default. A bad annotation costs its category in
            that picture, as the rest of its instances would pass for all of them.

    Raises:
        ValueError: naming file, index and reason: a file that cannot be read as a whole, missing or repeated
            ids, unknown images or categories, masks and boxes that are malformed, empty or outside.
    """
    if absent < 0:
        raise ValueError(f"absent={absent}: must not be negative")

    def phrases_of(categories: dict[str, dict[str, Any]]) -> dict[str, str]:
        names = readable([entry["name"] for entry in categories.values()])
        return dict(zip(categories, names, strict=True))

    coco = CocoFile(file, phrases_of, prefixes, boxes_only, skips=skips)

    def turns_of(picture: Picture) -> list[Turn]:
        found = [Turn(phrase, (group.target,), "category", "", "category") for phrase, group in picture.groups.items()]
        return found + no_target_turns(picture.id, picture.absent, absent, seed, "category")

    yield from samples_of(coco, image_root, name, turns_of)


def samples_of(
    coco: CocoFile, image_root: Path | str, name: str, turns_of: Callable[[Picture], list[Turn]]
) -> Iterator[Sample]:
    """A sample for every picture that ``turns_of`` finds turns for."""
    for picture in coco.pictures():
        if turns := turns_of(picture):
            path = Path(image_root) / picture.name
            yield Sample(f"{name}/{picture.id}", path, picture.height, picture.width, tuple(turns), joint=True)


def no_target_turns(image_id: str, phrases: list[str], count: int, seed: int, form: str) -> list[Turn]:
    """At most ``count`` turns that ask for something the picture does not have."""
    if not count or not phrases:
        return []
    drawn = random.Random(f"{seed}/{image_id}").sample(phrases, min(count, len(phrases)))
    return [Turn(phrase, (PhraseTarget(phrase),), "no-target", "", form) for phrase in drawn]


_QUALIFIER = re.compile(r"\s*\([^)]*\).*$")
_MOST_CAPITALS = 4


def readable(names: Iterable[str]) -> list[str]:
    """Category names of one data set as words of an instruction.

    - underscores are blanks: baby_buggy → baby buggy;
    - what stands in parentheses is dropped, with all behind it, if the rest is nobody else's name: cup_(drinking) →
      cup, but bow_(weapon) → bow (weapon) beside bow_(decorative_ribbons);
    - alternatives are all said, since every instance of each is labelled: Chair/Stool → chair or stool;
    - lower case, but abbreviations: Wild Bird → wild bird, SUV → SUV.
    """
    full = [_words(name) for name in names]
    short = [_QUALIFIER.sub("", text) or text for text in full]
    # A name counts as taken whether it is whole or what is left of another one.
    uses: dict[str, set[str]] = {}
    for text, bare in zip(full, short, strict=True):
        uses.setdefault(bare, set()).add(text)
    return [bare if len(uses[bare]) == 1 else text for text, bare in zip(full, short, strict=True)]


def _words(name: str) -> str:
    text = re.sub(r"\s*/\s*", " or ", name.replace("_", " ").strip(" \t\n/"))
    return " ".join(map(_lower, text.split()))


def _lower(word: str) -> str:
    is_abbreviation = word.isalpha() and word.isupper() and 2 <= len(word) <= _MOST_CAPITALS
    return word if is_abbreviation else word.lower()
