"""Sizes of items: what they are estimated from samples' sizes, beside what they turn out to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.data import item_sizes
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.composition import Composition
from instructsam.data.dataset import InstructionDataset
from instructsam.data.limits import Limits
from instructsam.data.samples import Mixture, SampleList, SampleSizes
from instructsam.processing.chat import ChatTurn
from instructsam.processing.images import VLMImageTransform
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn


@pytest.fixture(scope="module")
def processor(checkpoint) -> InstructSAMProcessor:
    return InstructSAMProcessor.from_pretrained(checkpoint)


def sample(*phrases: int, height: int = 64, width: int = 64, words: str = "all the red circles") -> Sample:
    """One turn for every number of phrases."""
    turns = tuple(Turn(words, (PhraseTarget("red circles"),) * number) for number in phrases)
    return Sample("s", Path("a.png"), height, width, turns)


def sizes_of(*samples: Sample) -> SampleSizes:
    return SampleSizes.of(samples)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20))
def test_picture_tokens_are_those_of_the_transform(shapes):
    transform = VLMImageTransform(min_pixels=64 * 1024, max_pixels=900 * 1024)
    samples = [sample(1, height=height, width=width) for height, width in shapes]
    found = item_sizes.picture_tokens(sizes_of(*samples), transform)
    for tokens, (height, width) in zip(found, shapes, strict=True):
        shown = max(height, width) <= 200 * min(height, width)
        assert tokens == (transform.num_tokens(height, width) + item_sizes.PICTURE_TOKENS if shown else 0)


def test_no_picture_takes_no_tokens(processor):
    plain = dataclasses.replace(sample(), image=None, height=0, width=0)
    assert item_sizes.picture_tokens(sizes_of(plain), processor.vlm_image).tolist() == [0]


def test_phrases_are_the_mean_over_what_may_be_drawn(processor, tmp_path):
    samples = SampleList([sample(1), sample(2, 2, 2), sample(3, 3)])
    for turns, expected in ((1, [1, 2, 3]), (2, [1, 4, 6]), (9, [1, 6, 6])):
        dataset = InstructionDataset(samples, processor, turns_per_image=turns)
        assert dataset.num_phrases().tolist() == expected
        for index in range(3):
            drawn = [sum(len(turn.phrases) for turn in dataset.draw((epoch, index)).turns) for epoch in range(5)]
            assert drawn == [expected[index]] * 5
    limited = InstructionDataset(samples, processor, turns_per_image=9, composition={"max_phrases": 4})
    assert limited.num_phrases().tolist() == [1, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("turns_per_image", [1, 3, 10])
@pytest.mark.parametrize("independent", [True, False])
def test_tokens_are_about_those_of_the_items(processor, world, turns_per_image, independent):
    """Never much less than there are, which a budget would be exceeded by."""
    samples = SampleList(read_coco_instructions(world, "train"))
    options = {"turns_per_image": turns_per_image, "independent_turns": independent}
    dataset = InstructionDataset(samples, processor, **options)
    expected = dataset.num_tokens()
    lengths = np.zeros((100, len(dataset)))
    for epoch, index in np.ndindex(*lengths.shape):
        drawn = dataset.draw((epoch, index))
        picture = processor.vlm_image.num_tokens(drawn.height, drawn.width)
        encoded = processor.chat.encode(picture, [ChatTurn.of(turn) for turn in drawn.turns], independent)
        lengths[epoch, index] = len(encoded.input_ids)
    assert lengths[0, 0] == len(dataset[(0, 0)]["input_ids"])
    assert (expected / lengths.mean(0)).min() > 1 and (expected / lengths.mean(0)).max() < 1.15


def test_queries_pictures_words_and_turns_all_count(processor):
    limits = Limits(processor, Composition(), turns_per_image=10)

    def tokens(one: Sample) -> float:
        return float(item_sizes.num_tokens(sizes_of(one), limits)[0])

    base = tokens(sample(1))
    words = len(b"red circles") / item_sizes.BYTES_PER_TOKEN
    assert tokens(sample(2)) - base == pytest.approx(processor.num_queries + 4 + 1 + words)
    assert tokens(sample(1, words="x" * 419)) - base == pytest.approx(100)
    again = len(b"all the red circles") / item_sizes.BYTES_PER_TOKEN
    assert tokens(sample(1, 1)) - base == pytest.approx(processor.num_queries + 4 + words + 7 + again)
    bare = dataclasses.replace(sample(1), turns=(dataclasses.replace(sample(1).turns[0], form="phrase"),))
    assert tokens(bare) - base == item_sizes.TEMPLATE_TOKENS
    (conversation,) = item_sizes.num_tokens(
        sizes_of(sample(1, 1)), dataclasses.replace(limits, independent_turns=False)
    )
    assert conversation - tokens(sample(1, 1)) == 2 * 3
    grown = processor.vlm_image.num_tokens(640, 480) - processor.vlm_image.num_tokens(64, 64)
    assert tokens(sample(1, height=640, width=480)) - base == grown > 0
    assert tokens(sample(*[9] * 400)) <= processor.max_length


def test_all_sizes_follow_the_draws_of_the_epoch(processor):
    """Half of a source in one epoch, the other half in the next."""
    parts = {
        "half": SampleList(sample(*[1] * k, height=32 * k, words="w" * k) for k in range(1, 10)),
        "twice": SampleList([sample(2)]),
    }
    dataset = InstructionDataset(Mixture(parts, {"half": 0.5, "twice": 2}), processor, turns_per_image=20, seed=3)
    whole = InstructionDataset(Mixture(parts), processor, turns_per_image=20)
    assert len(dataset) == 4 + 2
    orders = [dataset.draws.of_epoch(epoch) for epoch in range(3)]
    assert not set(orders[0][:4]) & set(orders[1][:4])
    for epoch, order in enumerate(orders):
        for name in ("num_masks", "num_phrases", "num_tokens"):
            found = getattr(dataset, name)(epoch)
            assert found.shape == (6,) and found.dtype == np.float64
            np.testing.assert_array_equal(found, getattr(whole, name)()[order])
        for index in range(6):
            drawn = dataset.draw((epoch, index)).turns
            assert sum(len(turn.phrases) for turn in drawn) == dataset.num_phrases(epoch)[index]
