"""From the turns of a sample to what one epoch asks of it (DESIGN section 9).

The turns are asked in random order, each by itself, except that

- of a sample whose turns may be asked jointly (`Sample.joint`), all categories and phrases are, in one instruction and
  one answer, with a probability;
- where a sample has three or more categories or phrases and they are not asked jointly, two of them are asked together
  in place of their own turns, if their masks hardly overlap;
- no-target turns may be left out, always or with a probability;
- the turns of a dialogue (all of them of the kind "conversation") keep their order, as one refers to another.

What goes beyond the limits is left out of a draw: as the order is random, all of it is seen over the epochs. A dialogue
is an exception: it is always asked from its beginning, since a later turn may mean nothing without those before it, and
what is beyond the limits or beyond ``turns_per_image`` is never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from instructsam import masks
from instructsam.data.checks import is_probability, is_whole
from instructsam.data.reader_options import from_settings
from instructsam.structures import RLE, Sample, Turn

Group: TypeAlias = tuple[Turn, ...]
"""Turns that are asked in one instruction; mostly a single one."""

CONVERSATION = "conversation"
JOINT_FORMS = ("category", "phrase")
PAIR_IOU = 0.05
"""Two phrases are asked together if the unions of their masks overlap less than this."""
PAIR_TRIES = 4


@dataclass(frozen=True)
class Composition:
    """How turns become what is asked.

    Args:
        joint_probability: of asking a sample's categories and phrases in one instruction, where it says they may be.
        pairs: ask two of three or more phrases together.
        no_target: what becomes of turns without any instance: "keep", "drop", or the probability of keeping each, newly
            drawn in every epoch. With a probability, a sample with nothing else keeps one of them.
        max_phrases: so many phrases a draw at most (None: any number).
        max_instances: so many instances a draw at most (None: any number).

    Raises:
        ValueError: values out of range.
    """

    joint_probability: float = 0.5
    pairs: bool = True
    no_target: str | float = "keep"
    max_phrases: int | None = None
    max_instances: int | None = None

    def __post_init__(self) -> None:
        if not is_probability(self.joint_probability):
            raise ValueError(f"composition.joint_probability={self.joint_probability!r}: must be between 0 and 1")
        if not isinstance(self.pairs, bool):
            raise ValueError(f"composition.pairs={self.pairs!r}: must be true or false")
        if self.no_target not in ("keep", "drop") and not is_probability(self.no_target):
            raise ValueError(f"composition.no_target={self.no_target!r}: must be keep, drop or a probability")
        for name in ("max_phrases", "max_instances"):
            value = getattr(self, name)
            if value is not None and not is_whole(value):
                raise ValueError(f"composition.{name}={value!r}: must be a whole number of at least 1, or null")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Composition:
        """From a configuration. Raises ValueError for an unknown name or a value out of range."""
        return from_settings(cls, "composition", values)

    def draw(self, sample: Sample, rng: np.random.Generator) -> list[Group]:
        """What is asked this time, in order and within the limits.

        At least one group, unless ``no_target`` is "drop" and the sample has nothing else, or no turn is within the
        limits by itself.
        """
        if is_dialogue(sample):
            return self._limited([(turn,) for turn in sample.turns], in_order=True)
        turns = [sample.turns[k] for k in rng.permutation(len(sample.turns))]
        if self.no_target != "keep":
            turns = self._without_no_target(turns, rng)
        places = [place for place, turn in enumerate(turns) if _may_be_joined(turn)]
        if sample.joint and len(places) >= 2 and rng.random() < self.joint_probability:
            together = _of_different_words(turns, places)
        elif self.pairs and len(places) >= 3:
            together = _pair(turns, places, sample, rng)
        else:
            together = []
        return self._limited(_grouped(turns, together))

    def within_limits(self, turn: Turn) -> bool:
        """Can the turn be asked by itself?"""
        return bool(self._limited([(turn,)]))

    def _without_no_target(self, turns: list[Turn], rng: np.random.Generator) -> list[Turn]:
        if self.no_target == "drop":
            return [turn for turn in turns if not is_no_target(turn)]
        kept = [turn for turn in turns if not is_no_target(turn) or rng.random() < float(self.no_target)]
        return kept or turns[:1]

    def _limited(self, groups: Sequence[Group], in_order: bool = False) -> list[Group]:
        """Groups without the turns that are too much; a smaller one that comes later may still fit."""
        if self.max_phrases is None and self.max_instances is None:
            return list(groups)
        left = [self.max_phrases or np.inf, self.max_instances or np.inf]
        kept: list[Group] = []
        for group in groups:
            part = []
            for turn in group:
                needs = (len(turn.phrases), num_instances(turn))
                if needs[0] <= left[0] and needs[1] <= left[1]:
                    left = [left[0] - needs[0], left[1] - needs[1]]
                    part.append(turn)
                elif in_order and kept:
                    return kept
            if part:
                kept.append(tuple(part))
        return kept


def is_dialogue(sample: Sample) -> bool:
    """Do its turns follow one upon another?"""
    return bool(sample.turns) and all(turn.kind == CONVERSATION for turn in sample.turns)


def num_instances(turn: Turn) -> int:
    """Instances of all its phrases."""
    return sum(len(phrase.rles) for phrase in turn.phrases)


def is_no_target(turn: Turn) -> bool:
    """Does it ask for something, and nothing of it is there?"""
    return bool(turn.phrases) and not any(phrase.rles for phrase in turn.phrases)


def _may_be_joined(turn: Turn) -> bool:
    return turn.form in JOINT_FORMS and len(turn.phrases) == 1 and not turn.answer


def _of_different_words(turns: Sequence[Turn], places: Sequence[int]) -> list[int]:
    """The places, without later turns of the same words: "dog, cat and dog" is no instruction."""
    first: dict[str, int] = {}
    for place in places:
        first.setdefault(turns[place].instruction.casefold(), place)
    return list(first.values())


def _pair(turns: Sequence[Turn], places: Sequence[int], sample: Sample, rng: np.random.Generator) -> list[int]:
    """Places of two turns of different words whose masks hardly overlap; none if a few tries find none."""
    for _ in range(PAIR_TRIES):
        pair = [places[k] for k in rng.choice(len(places), 2, replace=False)]
        differ = len(_of_different_words(turns, pair)) == 2
        if differ and _overlap(turns[pair[0]], turns[pair[1]], sample) < PAIR_IOU:
            return pair
    return []


def _overlap(first: Turn, second: Turn, sample: Sample) -> float:
    """IoU of the unions of two turns' masks."""
    a, b = (_union(turn.phrases[0].rles, sample) for turn in (first, second))
    return 0.0 if a is None or b is None else float(masks.pairwise_iou([a], [b], checked=True)[0, 0])


def _union(rles: Sequence[RLE], sample: Sample) -> RLE | None:
    if len(rles) < 2:
        return rles[0] if rles else None
    return masks.union(rles, sample.height, sample.width, checked=True)


def _grouped(turns: Sequence[Turn], together: Sequence[int]) -> list[Group]:
    """One group of the turns at the places together, where the first of them stands, and the others by themselves."""
    groups: list[Group] = []
    for place, turn in enumerate(turns):
        if place not in together:
            groups.append((turn,))
        elif place == together[0]:
            groups.append(tuple(turns[k] for k in together))
    return groups
