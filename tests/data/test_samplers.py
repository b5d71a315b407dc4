"""The key stream: epochs are permutations, any split sees the same global batches, any step can be the first."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.data.samplers import StepSampler, steps_for_epochs

SMALL = st.integers(1, 5)


def global_batch(step: int, length: int, batch: int, world: int, accumulation: int, seed: int = 0) -> list:
    """Keys of a step over all ranks and micro batches, in the order (micro, rank)."""
    ranks = [StepSampler(length, batch, world, rank, accumulation, seed) for rank in range(world)]
    return [key for micro in range(accumulation) for sampler in ranks for key in sampler.keys_at(step, micro)]


@given(length=st.integers(1, 23), batch=SMALL, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_every_epoch_is_a_permutation(length, batch, seed):
    keys = [key for keys in islice(StepSampler(length, batch, seed=seed), 3 * length) for key in keys]
    for epoch in range(3):
        part = keys[epoch * length : (epoch + 1) * length]
        assert {key[0] for key in part} == {epoch}
        assert sorted(key[1] for key in part) == list(range(length))


@given(length=st.integers(1, 23), batch=SMALL, world=SMALL, accumulation=SMALL, step=st.integers(0, 40))
@settings(deadline=None, max_examples=50)
def test_split_does_not_change_the_global_batch(length, batch, world, accumulation, step):
    whole = global_batch(step, length, batch * world * accumulation, 1, 1)
    assert global_batch(step, length, batch, world, accumulation) == whole


@given(length=st.integers(1, 23), batch=SMALL, accumulation=SMALL, start=st.integers(0, 30))
@settings(deadline=None, max_examples=30)
def test_starting_late_equals_skipping(length, batch, accumulation, start):
    late = StepSampler(length, batch, accumulation=accumulation, start_step=start)
    early = StepSampler(length, batch, accumulation=accumulation)
    skipped = islice(early, start * accumulation, start * accumulation + 7)
    assert list(islice(late, 7)) == list(skipped)


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        return [index for _, index in StepSampler(50, 50, seed=seed).keys_at(epoch)]

    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


def test_epoch_of_and_steps_for_epochs():
    sampler = StepSampler(10, 2, world_size=2, accumulation=1)
    assert sampler.global_batch_size == 4 and sampler.epoch_of(5) == 2.0
    assert steps_for_epochs(10, 4) == 3 and steps_for_epochs(10, 4, 2) == 5 and steps_for_epochs(1, 100) == 1
    with pytest.raises(ValueError, match="positive"):
        steps_for_epochs(0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_length": 0}, "empty"),
        ({"per_device_batch_size": 0}, "per_device_batch_size"),
        ({"accumulation": 0}, "accumulation"),
        ({"world_size": 2, "rank": 2}, "rank 2"),
        ({"seed": -1}, "negative"),
        ({"start_step": -1}, "negative"),
    ],
)
def test_nonsense_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"dataset_length": 5, "per_device_batch_size": 1, **arguments})
