"""Pictures that must not be trained on, because a validation or test split asks about them (DESIGN section 9).

The referring sets are about COCO's train2014 pictures, and each splits them in its own way: a picture of RefCOCO's test
split may be in RefCOCOg's training split, and all of them are in train2017, which most other sets are built on. A
picture is known by its COCO id, whatever folder it lies in; one that is not named in COCO's way cannot be known, and is
kept with a count.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructsam.data.checks import is_id, read_json
from instructsam.data.containers import read_pickle
from instructsam.errors import DataError
from instructsam.structures import Sample

TRAIN = "train"
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.\w+")  # COCO_train2014_000000581857.jpg, 000000581857.jpg


def coco_id(image: Path | str | None) -> int | None:
    """The COCO id in a picture's file name; None where it is not named in COCO's way."""
    found = _COCO_NAME.fullmatch(Path(image).name) if image is not None else None
    return int(found[1]) if found else None


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs of a referring set, pickled (``.p``) or JSON, each with a split.

    Raises:
        ValueError: naming file and index: it cannot be read, is no list of refs, or one of them has no split.
    """
    refs = read_pickle(path) if path.suffix in (".p", ".pkl") else read_json(path)
    if not isinstance(refs, list):
        raise DataError(f"{path}: expected a list of refs, got {type(refs).__name__}", "field")
    for index, ref in enumerate(refs):
        # Whose split a broken ref belongs to cannot be known, so none is skipped here.
        if not isinstance(ref, dict) or not isinstance(ref.get("split"), str):
            raise DataError(f"{path}: [{index}]: expected an object with a split, got {str(ref)[:60]}", "field")
    return refs


def held_out_images(refs: Sequence[Path | str]) -> frozenset[int]:
    """COCO ids of the pictures in all splits but "train" of these files of refs.

    Raises:
        ValueError: as `read_refs`; a ref outside of the training split that names no picture.
    """
    held_out: set[int] = set()
    for file in map(Path, refs):
        for index, ref in enumerate(read_refs(file)):
            if ref["split"] == TRAIN:
                continue
            image = ref.get("image_id")
            if not is_id(image) or not str(image).isdigit():
                raise DataError(f"{file}: [{index}]: image_id must be a number, got {image!r}", "field")
            held_out.add(int(str(image)))
    return frozenset(held_out)


@dataclass
class Leakage:
    """What a source loses to validation and test splits, and what cannot be told.

    Attributes:
        samples: left out, as their pictures are held out.
        pictures: COCO ids of these.
        known: kept samples whose pictures are known not to be held out.
        unknown: kept samples whose pictures' names give no COCO id.
    """

    samples: int = 0
    pictures: set[int] = field(default_factory=set)
    known: int = 0
    unknown: int = 0

    def leaves_out(self, sample: Sample, held_out: Collection[int]) -> bool:
        """Whether the sample's picture is held out; counts it."""
        identity = coco_id(sample.image)
        if identity in held_out and identity is not None:
            self.samples += 1
            self.pictures.add(identity)
            return True
        if sample.image is not None:
            self.known += identity is not None
            self.unknown += identity is None
        return False

    def check(self, source: str) -> None:
        """Raises ValueError if no picture of the source could be told from held-out ones, of all that it has."""
        if self.unknown and not self.known and not self.samples:
            raise DataError(
                f"held_out is true, but no picture of {source} is named by a COCO id (000000581857.jpg), so none can "
                f"be told from those of validation and test splits; data.sources.{source}.held_out=false, if none is",
                "leakage",
            )

    def counts(self) -> dict[str, int]:
        """For a table's manifest."""
        return {"samples": self.samples, "pictures": len(self.pictures), "unknown": self.unknown}

    def __str__(self) -> str:
        parts = []
        if self.samples:
            pictures = len(self.pictures)
            parts.append(f"left out {self.samples} samples about {pictures} pictures of validation and test splits")
        if self.unknown:
            parts.append(f"kept {self.unknown} samples though their pictures' names give no COCO id to tell by")
        return "; ".join(parts)
