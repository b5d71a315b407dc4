"""The nouns that every other part speaks: run-length masks, samples with their targets, predictions.

Plain data classes without torch, so that readers, metrics and reports can be used on a machine that has no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

DEFAULT_THRESHOLD = 0.3
"""Instances with a higher score are kept, unless another one is asked for (DESIGN section 7)."""


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
    """One instruction (user turn) and the phrases that its answer consists of.

    Attributes:
        instruction: what the user says; with a ``form``, the bare words that go into it.
        form: "" = the instruction stands as it is; "category", "phrase", "sentence" or "ocr" = it is put into a
            template of that form (`instructsam.data.wording`), newly chosen each time it is asked.
        answer: the answer's text before, between and after its phrases (one piece more than phrases); empty = the
            phrases one after another, joined by ", ". One piece and no phrase is an answer in plain words.
    """

    instruction: str
    phrases: tuple[PhraseTarget, ...] = ()
    kind: str = ""
    id: str = ""
    form: str = ""
    answer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.answer or len(self.answer) == len(self.phrases) + 1

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is said: instruction, phrases, and the answer's own text."""
        return (self.instruction, *(phrase.text for phrase in self.phrases), *self.answer)


@dataclass(frozen=True)
class Sample:
    """An image with one or more turns about it.

    Attributes:
        image: None (with a height and width of 0) for a conversation about no image.
        objects: the image's annotations, where a reader knows them.
        joint: the turns may also be asked in one instruction that lists all their phrases.
    """

    id: str
    image: Path | None
    height: int
    width: int
    turns: tuple[Turn, ...]
    objects: tuple[dict[str, Any], ...] = ()
    joint: bool = False


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
