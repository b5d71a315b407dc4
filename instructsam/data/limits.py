"""What is too much for a model: instances of a phrase, phrases of a turn, tokens of a sample (DESIGN sections 9, 16).

A data set may have millions of samples, and none is read that need not be: almost all are decided from their sizes
alone (`instructsam.data.samples.SampleSizes`), the doubtful ones are read once when the data set is opened.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instructsam.data.composition import Composition, Group, is_no_target, num_instances
from instructsam.data.samples import Samples, SampleSizes, text_bytes
from instructsam.data.wording import ADDED_BYTES
from instructsam.errors import DataError, at
from instructsam.processing.chat import ChatTurn
from instructsam.processing.image_files import MAX_ASPECT_RATIO
from instructsam.processing.images import VLMImageTransform
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample, Turn

logger = logging.getLogger(__name__)

TOO_MANY = ("raise", "drop", "truncate")
_DONE = {"drop": "dropped", "truncate": "truncated"}

TURN_TOKENS = 32
"""Markup of a turn, and of the picture before it, is fewer tokens than this; that of a phrase is `PHRASE_TOKENS`."""
PHRASE_TOKENS = 6
TOKENS_PER_BYTE = 3
"""A token is a byte or more, but Unicode normalisation may make three bytes of one."""


@dataclass(frozen=True)
class Usable:
    """The samples that have something to ask.

    Attributes:
        rows: (usable,) int64, their numbers, rising.
        limited: (usable,) bool: something of the sample may be too much, so that every draw has to look.
        left_out: how many of what are left out. Phrases are counted in samples that have one.
    """

    rows: NDArray[np.int64]
    limited: NDArray[np.bool_]
    left_out: Counter[str]


@dataclass(frozen=True)
class Limits:
    """The limits of a processor and a composition.

    Args:
        too_many_instances, on_bad, turns_per_image, independent_turns: see `InstructionDataset`.

    Raises:
        ValueError: unknown policies.
    """

    processor: InstructSAMProcessor
    composition: Composition
    too_many_instances: str = "raise"
    on_bad: str = "raise"
    turns_per_image: int = 1
    independent_turns: bool = True

    def __post_init__(self) -> None:
        if self.too_many_instances not in TOO_MANY:
            raise ValueError(f"too_many_instances={self.too_many_instances!r} is not one of {', '.join(TOO_MANY)}")
        if self.on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {self.on_bad!r}")

    # ---- all samples, when a data set is opened ---------------------------------------------------------------------

    def select(self, samples: Samples) -> Usable:
        """Find the samples that have something to ask; what is left out is logged in one line.

        Raises:
            DataError: the first bad record (names the sample), if ``on_bad`` is "raise".
        """
        sizes, drops_no_target = samples.sizes, self.composition.no_target == "drop"
        crowded = sizes.most > self.processor.num_queries
        large = self._may_be_too_long(sizes) | self._may_be_too_large(sizes)
        doubtful = large | crowded if self.too_many_instances == "raise" else large.copy()
        keep = sizes.turns > 0
        left_out: Counter[str] = Counter()
        first = ""
        if self.too_many_instances == "drop":
            only_crowded = keep & (sizes.fewest > self.processor.num_queries)
            keep &= ~only_crowded
            left_out["samples"] = int(only_crowded.sum())
        if drops_no_target:
            without = keep & (sizes.phrases > 0) & (sizes.masks == 0) & (sizes.turns == 1)
            keep &= ~without
            left_out["samples without a target"] = int(without.sum())
            # Several turns without a mask may hold a plain answer; where large phrases go, nothing else may be there.
            doubtful |= (sizes.phrases > 0) & (sizes.fewest == 0) & ((sizes.masks == 0) | crowded)
        if self.too_many_instances != "raise" and crowded.any():
            first = str(self._crowded(samples[int(crowded.argmax())]))

        def leave_out(error: DataError) -> None:
            nonlocal first
            first = first or str(error)
            left_out["turns"] += 1

        long_draws = 0
        for row in np.flatnonzero(doubtful & keep).tolist():
            sample = samples[row]
            turns = self.usable(sample, leave_out)
            if all(drops_no_target and is_no_target(turn) for turn in turns):
                keep[row] = False
                left_out["samples without a target" if turns else "samples"] += 1
            elif large[row]:
                longest = sorted(turns, key=self.most_tokens)[-self.turns_per_image :]
                long_draws += not self._fit(sample, longest)
        if self.too_many_instances != "raise":
            left_out[f"samples with {_DONE[self.too_many_instances]} phrases"] = int((crowded & keep).sum())
        left_out = +left_out
        self._report(left_out, first, long_draws)
        rows = np.flatnonzero(keep)
        return Usable(rows, (large | crowded)[rows], left_out)

    def _may_be_too_long(self, sizes: SampleSizes) -> NDArray[np.bool_]:
        """Where the bound of `most_tokens`, of all turns together and the largest picture, exceeds max_length."""
        turns, phrases, text = (a.astype(np.int64) for a in (sizes.turns, sizes.phrases, sizes.text_bytes))
        tokens = (TURN_TOKENS + ADDED_BYTES) * turns + TOKENS_PER_BYTE * text
        tokens += (self.processor.num_queries + PHRASE_TOKENS) * phrases
        return tokens > self.processor.max_length - most_image_tokens(self.processor.vlm_image)

    def _may_be_too_large(self, sizes: SampleSizes) -> NDArray[np.bool_]:
        """Where a turn may have too many phrases or instances by itself: it has, unless some of them are dropped."""
        most = self.processor.num_queries * sizes.turn_phrases.astype(np.int64)  # what is left of them
        phrases = sizes.turn_phrases > (self.composition.max_phrases or np.inf)
        return phrases | (np.minimum(sizes.turn_masks, most) > (self.composition.max_instances or np.inf))

    def _report(self, left_out: Counter[str], first: str, long_draws: int) -> None:
        if left_out:
            counts = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
            logger.warning("left out: %s%s", counts, f"; the first: {first}" if first else "")
        if long_draws:
            logger.warning(
                "%d samples are too long for max_length=%d when their longest turns (%d at once) are drawn together; "
                "the last turns of such a draw are left out",
                long_draws,
                self.processor.max_length,
                self.turns_per_image,
            )

    # ---- one sample -------------------------------------------------------------------------------------------------

    def usable(self, sample: Sample, leave_out: Callable[[DataError], None] | None = None) -> tuple[Turn, ...]:
        """The turns that can be asked by themselves, without what is too much of their phrases.

        Args:
            leave_out: is told of turns that are bad records, if ``on_bad`` is "skip".

        Raises:
            DataError: a bad record, if ``on_bad`` is "raise".
        """
        usable = []
        for turn in sample.turns:
            try:
                limited = self._limited(sample, turn)
                if limited is None:
                    continue
                self._check_alone(sample, limited)
            except DataError as error:
                if self.on_bad == "raise":
                    raise
                if leave_out is not None:
                    leave_out(error)
                continue
            usable.append(limited)
        return tuple(usable)

    def fit(self, sample: Sample, groups: Sequence[Group]) -> list[Group]:
        """The groups without the last turns, until the rest fits max_length; at least one turn."""
        groups = list(groups)
        while sum(map(len, groups)) > 1 and not self._fit(sample, [_together(group) for group in groups]):
            last = groups.pop()
            if len(last) > 1:
                groups.append(last[:-1])
        return groups

    def _limited(self, sample: Sample, turn: Turn) -> Turn | None:
        """The turn with phrases of no more instances than there are queries; None if it is left with none."""
        most = self.processor.num_queries
        if all(len(phrase.rles) <= most for phrase in turn.phrases):
            return turn
        if self.too_many_instances == "raise":
            raise self._crowded(dataclasses.replace(sample, turns=(turn,)))
        return within_queries(turn, most, self.too_many_instances == "truncate")

    def _crowded(self, sample: Sample) -> DataError:
        """What is wrong with the first phrase that has more instances than there are queries."""
        most = self.processor.num_queries
        phrase = next(p for turn in sample.turns for p in turn.phrases if len(p.rles) > most)
        return DataError(
            f"sample {sample.id}: phrase {phrase.text!r} has {len(phrase.rles)} instances, more than the {most} "
            "queries of a phrase (data.too_many_instances=drop or truncate, or data.on_bad=skip)",
            "too many instances",
        )

    def _check_alone(self, sample: Sample, turn: Turn) -> None:
        """Raises DataError for a turn that is too much by itself."""
        where = f"sample {sample.id}: the instruction {turn.instruction[:60]!r}"
        if not self.composition.within_limits(turn):
            raise DataError(
                f"{where} alone has {len(turn.phrases)} phrases and {num_instances(turn)} instances, more than "
                f"composition.max_phrases={self.composition.max_phrases} or "
                f"max_instances={self.composition.max_instances} allow",
                "too many phrases",
            )
        if not self._fit(sample, [turn]):
            raise DataError(f"{where} alone does not fit max_length={self.processor.max_length}", "too long")

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _fit(self, sample: Sample, turns: Sequence[Turn]) -> bool:
        """Do the turns, in this order, fit max_length together, whatever templates they get?"""
        try:
            room = self.processor.max_length
            if sample.image is not None:
                room -= self.processor.vlm_image.num_tokens(sample.height, sample.width)
            return sum(map(self.most_tokens, turns)) <= room or self.num_tokens(turns) <= room
        except ValueError as error:
            raise at(f"sample {sample.id}", error) from error

    def num_tokens(self, turns: Sequence[Turn]) -> int:
        """Tokens of the turns without a picture's; exact where none has a form, else with room for a template."""
        # Without a picture a few markers less, which does not matter here.
        chat = self.processor.chat.encode(0, [ChatTurn.of(turn) for turn in turns], self.independent_turns)
        return len(chat.input_ids) + sum(_added(turn) for turn in turns)

    def most_tokens(self, turn: Turn) -> int:
        """A bound that needs no tokenizer, which would take minutes for a large data set."""
        text = TURN_TOKENS + TOKENS_PER_BYTE * text_bytes(turn) + _added(turn)
        return text + len(turn.phrases) * (self.processor.num_queries + PHRASE_TOKENS)


def within_queries(turn: Turn, most: int, truncate: bool) -> Turn | None:
    """The turn without phrases of more than ``most`` instances, or with the first of these; None if none is left."""
    if all(len(phrase.rles) <= most for phrase in turn.phrases):
        return turn
    if truncate:
        phrases = tuple(dataclasses.replace(phrase, rles=phrase.rles[:most]) for phrase in turn.phrases)
        return dataclasses.replace(turn, phrases=phrases)
    kept = [phrase for phrase in turn.phrases if len(phrase.rles) <= most]
    # Text around phrases has no meaning without one of them: the rest is answered with its phrases alone.
    return dataclasses.replace(turn, phrases=tuple(kept), answer=()) if kept else None


def most_image_tokens(transform: VLMImageTransform) -> int:
    """No picture takes more positions than this, whatever its size."""
    area = transform.factor**2
    # Small pictures grow to min_pixels, each side rounded up; very thin ones are at least a token wide.
    least, aspect = transform.min_pixels / area, math.sqrt(MAX_ASPECT_RATIO)
    grown = least + math.sqrt(least) * (aspect + 1 / aspect) + 1
    return int(max(transform.max_pixels // area, grown, MAX_ASPECT_RATIO))


def _added(turn: Turn) -> int:
    """Tokens that a template may add; a turn made of several has their forms, each in a line of its own."""
    return ADDED_BYTES * len(turn.form.split("\n")) if turn.form else 0


def _together(group: Group) -> Turn:
    """A turn with all that a group will say, to be measured."""
    if len(group) == 1:
        return group[0]
    words = ", ".join(turn.instruction for turn in group)
    forms = "\n".join(turn.form for turn in group)
    return Turn(words, tuple(phrase for turn in group for phrase in turn.phrases), form=forms)
