"""Training data: samples from a reader, encoded by the processor, everything random drawn from (seed, epoch, index).

Items are indexed by the sampler's keys (epoch, index), so that no random state has to be saved: a run that resumes
anywhere, with any number of workers, sees the same items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample


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

    Raises:
        ValueError: nothing is left to train on.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: InstructSAMProcessor,
        turns_per_image: int = 1,
        independent_turns: bool = True,
        seed: int = 0,
        kinds: Sequence[str] | None = None,
    ):
        if turns_per_image < 1:
            raise ValueError(f"turns_per_image={turns_per_image}: must be at least 1")
        if kinds is not None:
            samples = [
                dataclasses.replace(sample, turns=tuple(turn for turn in sample.turns if turn.kind in kinds))
                for sample in samples
            ]
        self.samples = [sample for sample in samples if sample.turns]
        if not self.samples:
            raise ValueError("no sample has a turn to train on")
        self.processor = processor
        self.turns_per_image = turns_per_image
        self.independent_turns = independent_turns
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def num_masks(self) -> list[float]:
        """How many masks each item has to match, on average over what `draw` may ask: sizes for the sampler."""
        return [
            sum(len(phrase.rles) for turn in sample.turns for phrase in turn.phrases)
            * min(1.0, self.turns_per_image / len(sample.turns))
            for sample in self.samples
        ]

    def generator(self, key: tuple[int, int]) -> np.random.Generator:
        """The random generator of one item of one epoch."""
        return np.random.default_rng((self.seed, *key))

    def draw(self, key: tuple[int, int]) -> Sample:
        """The sample with the turns that this epoch asks, in random order."""
        sample = self.samples[key[1]]
        rng = self.generator(key)
        chosen = rng.permutation(len(sample.turns))[: self.turns_per_image]
        return dataclasses.replace(sample, turns=tuple(sample.turns[k] for k in chosen))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.processor.encode_sample(self.draw(key), self.independent_turns)
