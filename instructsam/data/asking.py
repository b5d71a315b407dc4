"""From a sample to what one item asks of it: some of its turns, composed, with the picture changed, in words.

The training set (`instructsam.data.dataset`) and `instructsam.inspect`, which shows what it asks, draw in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from instructsam.data.augmentation import Augmentation, PictureChange, flip_sample
from instructsam.data.composition import Composition, Group, is_dialogue
from instructsam.data.wording import word, word_joint
from instructsam.structures import Sample


@dataclass(frozen=True)
class Asking:
    """How items are drawn; see `instructsam.data.dataset.InstructionDataset` for the arguments."""

    composition: Composition
    augmentation: Augmentation
    turns_per_image: int = 1
    independent_turns: bool = True

    def groups(self, sample: Sample, rng: np.random.Generator) -> list[Group]:
        """What is asked this time, the turns of a group in one instruction.

        A dialogue is asked from its beginning; of one whose turns do not see each other, the first turn alone.
        """
        first = self.independent_turns and is_dialogue(sample)
        return self.composition.draw(sample, rng)[: 1 if first else self.turns_per_image]

    def ask(self, sample: Sample, groups: Sequence[Group], rng: np.random.Generator) -> tuple[Sample, PictureChange]:
        """The sample with these groups as its turns, worded, and what has to be done to its picture for that."""
        asked = dataclasses.replace(sample, turns=tuple(turn for group in groups for turn in group))
        change = self.augmentation.draw(asked, rng)
        if change.flip:
            asked = flip_sample(asked)
        turns = iter(asked.turns)
        together = [list(islice(turns, len(group))) for group in groups]
        worded = tuple(word(group[0], rng) if len(group) == 1 else word_joint(group, rng) for group in together)
        return dataclasses.replace(asked, turns=worded), change
