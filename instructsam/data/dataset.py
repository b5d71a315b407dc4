"""Training data: samples from a reader, encoded by the processor, everything random drawn from (seed, epoch, index).

Items are indexed by the sampler's keys (epoch, index), so that no random state has to be saved: a run that resumes
anywhere, with any number of workers, sees the same items.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn

logger = logging.getLogger(__name__)

TOO_MANY = ("raise", "drop", "truncate")


class InstructionDataset(Dataset):
    """Images with some of their turns, newly drawn in every epoch.

    Args:
        samples: from a reader, one per image.
        processor: encodes them.
        turns_per_image: how many of an image's turns are asked at once (all, if it has fewer).
        independent_turns: turns see the image and themselves only (several instructions share one image's tokens), else
            they form one conversation.
        seed: of the draws.
        kinds: keep turns of these kinds only (None = all). Images left without a turn are dropped.
        too_many_instances: what becomes of a phrase with more instances than the processor has queries: "drop" leaves
            it out, "truncate" keeps the first instances, "raise" takes it for a bad record.
        on_bad: a turn with such a phrase, or one that does not fit the processor's max_length even when asked alone,
            is an error ("raise") or left out ("skip").

    Everything that is left out is counted and logged in one line. Turns that fit alone but not together are no bad
    records: the last of a draw are left out until the rest fits.

    Raises:
        ValueError: unknown policies, a bad record (names the sample), nothing is left to train on.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: InstructSAMProcessor,
        turns_per_image: int = 1,
        independent_turns: bool = True,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        too_many_instances: str = "raise",
        on_bad: str = "raise",
    ):
        if turns_per_image < 1:
            raise ValueError(f"turns_per_image={turns_per_image}: must be at least 1")
        if too_many_instances not in TOO_MANY:
            raise ValueError(f"too_many_instances={too_many_instances!r} is not one of {', '.join(TOO_MANY)}")
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
        if kinds is not None:
            samples = [
                dataclasses.replace(sample, turns=tuple(turn for turn in sample.turns if turn.kind in kinds))
                for sample in samples
            ]
        self.processor = processor
        self.turns_per_image = turns_per_image
        self.independent_turns = independent_turns
        self.seed = seed
        self.too_many_instances = too_many_instances
        self.on_bad = on_bad
        self.left_out: Counter[str] = Counter()
        self._first_left_out = ""
        limited = (dataclasses.replace(sample, turns=tuple(self._usable_turns(sample))) for sample in samples)
        self.samples = [sample for sample in limited if sample.turns]
        self.left_out["samples"] = sum(bool(sample.turns) for sample in samples) - len(self.samples)
        self._report()
        if not self.samples:
            raise ValueError("no sample has a turn to train on")

    def __len__(self) -> int:
        return len(self.samples)

    def num_masks(self) -> list[float]:
        """How many masks each item has to match, on average over what `draw` may ask: sizes for the sampler.

        Draws that are too long for max_length count as a whole.
        """
        return [
            sum(len(phrase.rles) for turn in sample.turns for phrase in turn.phrases)
            * min(1.0, self.turns_per_image / len(sample.turns))
            for sample in self.samples
        ]

    def generator(self, key: tuple[int, int]) -> np.random.Generator:
        """The random generator of one item of one epoch."""
        return np.random.default_rng((self.seed, *key))

    def draw(self, key: tuple[int, int]) -> Sample:
        """The sample with the turns that this epoch asks, in random order; the last are left out if all do not fit."""
        sample = self.samples[key[1]]
        rng = self.generator(key)
        chosen = rng.permutation(len(sample.turns))[: self.turns_per_image]
        turns = [sample.turns[k] for k in chosen]
        while len(turns) > 1 and not self._fits(sample, turns):
            turns.pop()
        return dataclasses.replace(sample, turns=tuple(turns))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.processor.encode_sample(self.draw(key), self.independent_turns)

    # ---- limits: queries of a phrase, tokens of a sample ----------------------------------------------------------

    def _usable_turns(self, sample: Sample) -> list[Turn]:
        """The turns of a sample that can be trained on, without what is too much of their phrases."""
        usable = []
        for turn in sample.turns:
            try:
                phrases = tuple(p for p in (self._limited(sample, phrase) for phrase in turn.phrases) if p is not None)
                if turn.phrases and not phrases:
                    self.left_out["turns"] += 1
                    continue
                turn = turn if phrases == turn.phrases else dataclasses.replace(turn, phrases=phrases)
                if not self._fits(sample, [turn]):
                    raise ValueError(
                        f"sample {sample.id}: the instruction {turn.instruction[:60]!r} alone does not fit "
                        f"max_length={self.processor.max_length}"
                    )
            except ValueError as error:
                if self.on_bad == "raise":
                    raise
                self._leave_out("turns", str(error))
                continue
            usable.append(turn)
        longest = sorted(usable, key=self._most_tokens)[-self.turns_per_image :]
        self.left_out["long draws"] += not self._fits(sample, longest)
        return usable

    def _limited(self, sample: Sample, phrase: PhraseTarget) -> PhraseTarget | None:
        """The phrase with no more instances than there are queries; None to leave it out."""
        most = self.processor.num_queries
        if len(phrase.rles) <= most:
            return phrase
        message = (
            f"sample {sample.id}: phrase {phrase.text!r} has {len(phrase.rles)} instances, more than the {most} "
            "queries of a phrase"
        )
        if self.too_many_instances == "raise":
            raise ValueError(f"{message} (data.too_many_instances=drop or truncate, or data.on_bad=skip)")
        if self.too_many_instances == "drop":
            self._leave_out("phrases", message)
            return None
        self._leave_out("truncated phrases", message)
        return dataclasses.replace(phrase, rles=phrase.rles[:most])

    def _room(self, sample: Sample, turns: Sequence[Turn]) -> int:
        """Tokens that max_length leaves to the text. ValueError for a picture that cannot be shown."""
        if not turns:
            return self.processor.max_length
        try:
            return self.processor.max_length - self.processor.vlm_image.num_tokens(sample.height, sample.width)
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def _fits(self, sample: Sample, turns: Sequence[Turn]) -> bool:
        """Do the turns, in this order, fit max_length together?"""
        room = self._room(sample, turns)
        if sum(map(self._most_tokens, turns)) <= room:
            return True
        try:
            return self._num_tokens(turns) <= room
        except ValueError as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def _num_tokens(self, turns: Sequence[Turn]) -> int:
        texts = [(turn.instruction, [phrase.text for phrase in turn.phrases]) for turn in turns]
        return len(self.processor.chat.encode(0, texts, self.independent_turns).input_ids)

    def _most_tokens(self, turn: Turn) -> int:
        """A bound that needs no tokenizer, which would take minutes for a large data set: a token is a byte or more.

        Bytes count three times, as Unicode normalisation may make three of one; markup is 6 tokens a phrase and fewer
        than 32 a turn.
        """
        texts = [turn.instruction, *(phrase.text for phrase in turn.phrases)]
        return 32 + 3 * sum(len(text.encode()) for text in texts) + len(turn.phrases) * (self.processor.num_queries + 6)

    def _leave_out(self, what: str, message: str) -> None:
        self.left_out[what] += 1
        self._first_left_out = self._first_left_out or message

    def _report(self) -> None:
        """One line about everything that is left out."""
        long_draws = self.left_out.pop("long draws", 0)
        self.left_out = +self.left_out
        if self.left_out:
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self.left_out.items()))
            logger.warning("left out: %s; the first: %s", counts, self._first_left_out)
        if long_draws:
            logger.warning(
                "%d samples are too long for max_length=%d when their longest turns (%d at once) are drawn together; "
                "the last turns of such a draw are left out",
                long_draws,
                self.processor.max_length,
                self.turns_per_image,
            )
