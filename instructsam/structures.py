"""The nouns that every other part speaks: run-length masks, samples with their targets, predictions.

Plain data classes without torch, so that readers, metrics and reports can be used on a machine that has no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict


class RLE(TypedDict):
    """A COCO run-length encoded binary mask: ``size`` is [height, width], ``counts`` the compressed string."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class PhraseTarget:
    """A phrase of the answer and the instances that belong to it (none = no-target).

    ``rles`` are the instance masks at the image's own size. With ``box_only`` they are filled boxes that stand for
    box annotations, and the mask losses are replaced by the projection loss (DESIGN section 6).
    """

    text: str
    rles: tuple[RLE, ...] = ()
    box_only: bool = False


@dataclass(frozen=True)
class Turn:
    """One instruction (user turn) and the phrases that its answer consists of."""

    instruction: str
    phrases: tuple[PhraseTarget, ...] = ()
    kind: str = ""
    id: str = ""


@dataclass(frozen=True)
class Sample:
    """An image with one or more turns about it. ``objects`` holds the image's annotations where a reader knows them."""

    id: str
    image: Path
    height: int
    width: int
    turns: tuple[Turn, ...]
    objects: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Instance:
    """One predicted instance: mask at image size, score in 0…1, box [x1, y1, x2, y2] in pixels, owning phrase."""

    rle: RLE
    score: float
    box: tuple[float, float, float, float]
    phrase: str
    phrase_index: int


@dataclass(frozen=True)
class Prediction:
    """What a model answers to one instruction: the text it wrote, its phrases, and the instances it kept."""

    answer: str
    phrases: tuple[str, ...]
    instances: tuple[Instance, ...]
    height: int
    width: int
    meta: dict[str, Any] = field(default_factory=dict)
