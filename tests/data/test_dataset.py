"""Training items: which turns are asked, and how many masks that makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instructsam.data.dataset import InstructionDataset
from instructsam.structures import PhraseTarget, Sample, Turn

RLE = {"size": [4, 4], "counts": "0"}


def sample(name: str, *counts: int) -> Sample:
    """One turn with one phrase for every number of masks."""
    turns = tuple(Turn(f"{name}-{n}", (PhraseTarget("things", (RLE,) * n),), kind=f"kind{n}") for n in counts)
    return Sample(name, Path(f"{name}.png"), 4, 4, turns)


def test_number_of_masks_is_the_mean_over_what_may_be_drawn():
    samples = [sample("a", 1, 2, 3), sample("b", 5), sample("c", 0, 0), sample("d", 4, 0, 0, 4)]
    for turns in (1, 2, 9):
        dataset = InstructionDataset(samples, None, turns_per_image=turns)
        found = dataset.num_masks()
        assert len(found) == len(dataset)
        for index, expected in enumerate(found):
            drawn = [dataset.draw((epoch, index)).turns for epoch in range(400)]
            masks = [sum(len(phrase.rles) for turn in some for phrase in turn.phrases) for some in drawn]
            assert np.mean(masks) == pytest.approx(expected, abs=0.3)


def test_only_the_kinds_that_are_asked_count():
    dataset = InstructionDataset([sample("a", 1, 2), sample("b", 1)], None, turns_per_image=8, kinds=["kind2"])
    assert dataset.num_masks() == [2.0]
