"""The key stream: epochs are permutations, any split sees the same global batches, any step can be the first."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.data.samplers import MEGA_BATCH, StepSampler, grouped_permutation, steps_for_epochs

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
        ({"group_by": [1.0, 2.0]}, "one finite number for each of the 5 samples"),
        ({"group_by": [1.0, 2.0, 3.0, 4.0, float("nan")]}, "got 4 in an array"),
    ],
)
def test_nonsense_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"dataset_length": 5, "per_device_batch_size": 1, **arguments})


# ---- grouped by size ------------------------------------------------------------------------------------------------


def sizes_of(length: int, kinds: int = 4) -> list[float]:
    return np.random.default_rng(length).integers(0, kinds, length).astype(float).tolist()


@given(length=st.integers(1, 60), batch=SMALL, world=SMALL, accumulation=SMALL, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_grouped_epochs_are_permutations_too_whatever_the_split(length, batch, world, accumulation, seed):
    total = batch * world * accumulation
    sizes = sizes_of(length)
    whole = StepSampler(length, total, seed=seed, group_by=sizes)
    steps = -(-3 * length // total)
    stream = [key for step in range(steps) for key in whole.keys_at(step)]
    for epoch in range(3):
        part = stream[epoch * length : (epoch + 1) * length]
        assert {key[0] for key in part} == {epoch}
        assert sorted(key[1] for key in part) == list(range(length))
    ranks = [StepSampler(length, batch, world, rank, accumulation, seed, group_by=sizes) for rank in range(world)]
    split = [
        key
        for step in range(steps)
        for micro in range(accumulation)
        for sampler in ranks
        for key in sampler.keys_at(step, micro)
    ]
    assert split == stream


@given(length=st.integers(1, 60), batch=SMALL, accumulation=SMALL, start=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_grouped_starting_late_equals_skipping(length, batch, accumulation, start):
    options = {"accumulation": accumulation, "group_by": sizes_of(length)}
    late = StepSampler(length, batch, start_step=start, **options)
    early = StepSampler(length, batch, **options)
    skipped = islice(early, start * accumulation, start * accumulation + 7)
    assert list(islice(late, 7)) == list(skipped)


@given(length=st.integers(20, 400), batch=st.integers(2, 6), kinds=st.integers(1, 5), mega=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_steps_hold_samples_of_one_size_but_for_few(length, batch, kinds, mega):
    """A sorted mega batch has at most kinds - 1 places where the size changes, so at most as many mixed groups."""
    sizes = np.asarray(sizes_of(length, kinds))
    for head in (0, 1, batch - 1):
        order = grouped_permutation(np.random.default_rng(length), sizes, batch, head, mega)
        groups = sizes[order[head : head + (length - head) // batch * batch]].reshape(-1, batch)
        mixed = int((groups.min(1) != groups.max(1)).sum())
        assert mixed <= -(-len(groups) // mega) * (kinds - 1)
        assert (np.diff(groups, axis=1) >= 0).all()


def test_grouping_keeps_the_order_of_steps_random():
    """Steps of small and of large samples alternate, and neighbours change from epoch to epoch."""
    length, batch = 4 * MEGA_BATCH * 4, 4
    sizes = sizes_of(length, 10)
    sampler = StepSampler(length, batch, group_by=sizes)
    epochs = [
        [[i for _, i in sampler.keys_at(s)] for s in range(e * length // batch, (e + 1) * length // batch)]
        for e in (0, 1)
    ]
    means = np.asarray([[sizes[i] for i in step] for step in epochs[0]]).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    assert means.std() > 2  # of about 2.9 for single samples: the groups really differ
    neighbours = [{frozenset(pair) for step in epoch for pair in zip(step, step[1:], strict=False)} for epoch in epochs]
    assert len(neighbours[0] & neighbours[1]) < 0.05 * len(neighbours[0])


def test_the_step_that_two_epochs_share_has_small_samples_of_both():
    length, batch = 50, 8
    sizes = [float(k) for k in range(length)]
    sampler = StepSampler(length, batch, group_by=sizes)
    shared = sampler.keys_at(length // batch)
    assert {epoch for epoch, _ in shared} == {0, 1}
    assert max(sizes[index] for _, index in shared) < batch


def test_grouping_depends_on_the_seed():
    sizes = sizes_of(50)
    first, second = (StepSampler(50, 50, seed=seed, group_by=sizes).keys_at(0) for seed in (0, 1))
    assert first != second
