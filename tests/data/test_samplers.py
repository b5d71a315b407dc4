"""The key stream: epochs see every sample once, any split sees the same stream, a run goes on with another split."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import zlib
from functools import partial
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.data.budgets import Budgets
from instructsam.data.samplers import MEGA_BATCH, DistributedBatchSampler, Key, grouped_permutation

SMALL = st.integers(1, 5)


def sizes_of(length: int, kinds: int = 4, epoch: int = 0) -> np.ndarray:
    return np.random.default_rng([length, epoch]).integers(0, kinds, length).astype(float)


def by_epoch(length: int, kinds: int, epoch: int) -> np.ndarray:
    """Sizes that change with the epoch, as a mixture's with fractional repeats do."""
    return sizes_of(length, kinds, epoch)


@st.composite
def streams(draw) -> tuple[str, dict]:
    """Everything of a sampler but the split; "fixed", "grouped", "budgets" or "both"."""
    kind, length = draw(st.sampled_from(["fixed", "grouped", "budgets", "both"])), draw(st.integers(1, 60))
    options: dict = {"dataset_length": length, "seed": draw(st.integers(0, 9))}
    if kind in ("grouped", "both"):
        options["group_by"] = draw(st.sampled_from([sizes_of(length), partial(by_epoch, length, 4)]))
    if kind in ("budgets", "both"):
        sizes = partial(by_epoch, length, 9), partial(by_epoch, length, 5)
        budgets = draw(st.integers(1, 40)), draw(st.none() | st.integers(1, 12))
        options |= {"budgets": Budgets(*budgets, *sizes), "per_device_batch_size": None}
    return kind, options


def split_of(options: dict, batch: int, world: int, accumulation: int) -> list[DistributedBatchSampler]:
    """The samplers of all ranks."""
    split = {"per_device_batch_size": batch, "world_size": world, "accumulation": accumulation, **options}
    return [DistributedBatchSampler(rank=rank, **split) for rank in range(world)]


def step_of(ranks: list[DistributedBatchSampler], position: int) -> list[list[Key]]:
    """Micro batches of the step that starts there, in the order (micro, rank); all ranks know how many samples."""
    found = [sampler.keys_at(position, m) for m in range(ranks[0].accumulation) for sampler in ranks]
    assert {sampler.samples_in_step(position) for sampler in ranks} == {sum(map(len, found))}
    return found


def stream_of(ranks: list[DistributedBatchSampler], samples: int, position: int = 0) -> list[Key]:
    """At least so many keys from a step's start on, as all ranks together iterate over them."""
    micro_batches: list[list[Key]] = []
    for sampler in ranks:
        sampler.position = position
    iterators = [iter(sampler) for sampler in ranks]
    while sum(map(len, micro_batches)) < samples:
        micro_batches += [next(iterator) for iterator in iterators]
    return [key for keys in micro_batches for key in keys]


# ---- what all streams have in common --------------------------------------------------------------------------------


@given(streams(), SMALL, SMALL, SMALL)
@settings(deadline=None, max_examples=80)
def test_every_epoch_has_every_sample_once(stream, batch, world, accumulation):
    _, options = stream
    length = options["dataset_length"]
    keys = stream_of(split_of(options, batch, world, accumulation), 3 * length)
    for epoch in range(3):
        part = keys[epoch * length : (epoch + 1) * length]
        assert {key[0] for key in part} == {epoch}
        assert sorted(key[1] for key in part) == list(range(length))


@pytest.mark.slow
@given(streams(), SMALL, SMALL, SMALL)
@settings(deadline=None, max_examples=80)
def test_the_split_does_not_change_the_stream(stream, batch, world, accumulation):
    """Nor, with budgets, what is in a micro batch. With a fixed size, the step stays as large as it is."""
    kind, options = stream
    whole = split_of(options, batch * world * accumulation, 1, 1)
    ranks = split_of(options, batch, world, accumulation)
    position = 0
    for _ in range(2 * options["dataset_length"] // batch):
        step = step_of(ranks, position)
        if kind in ("fixed", "grouped"):
            assert [key for keys in step for key in keys] == step_of(whole, position)[0]
        else:
            alone = position
            for keys in step:
                assert keys == step_of(whole, alone)[0]
                alone += len(keys)
        position += ranks[0].samples_in_step(position)


@pytest.mark.slow
@given(streams(), SMALL, SMALL, SMALL, st.integers(0, 30))
@settings(deadline=None, max_examples=80)
def test_starting_late_equals_skipping(stream, batch, world, accumulation, skipped):
    ranks = split_of(stream[1], batch, world, accumulation)
    position = 0
    for _ in range(skipped):
        position += ranks[0].samples_in_step(position)
    for sampler in ranks:
        early = list(islice(sampler, skipped * accumulation, skipped * accumulation + 7))
        late = split_of(stream[1], batch, world, accumulation)[sampler.rank]
        late.position = position
        assert list(islice(late, 7)) == early


@pytest.mark.slow
@given(streams(), st.tuples(SMALL, SMALL, SMALL), st.tuples(SMALL, SMALL, SMALL), st.integers(0, 12))
@settings(deadline=None, max_examples=120)
def test_a_run_goes_on_with_another_split(stream, before, after, steps):
    """Another number of ranks, another accumulation, another batch size: exactly the samples that the run had left."""
    options = stream[1]
    first, others = split_of(options, *before), split_of(options, *after)
    for _ in range(steps):
        for sampler in first:
            sampler.position += sampler.samples_in_step(sampler.position)
    state = json.loads(json.dumps(first[0].state_dict()))
    for sampler in others:
        sampler.plan(0)  # a trainer may ask for something before it loads
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state
    consumed, more = state["samples"], 2 * options["dataset_length"]
    went_on = stream_of(others, more, consumed)[:more]
    assert went_on == stream_of(first, consumed + more)[consumed:][:more]


def _take(connection, sampler: DistributedBatchSampler) -> None:
    connection.send(list(islice(sampler, 40)))


@pytest.mark.multiprocess
@pytest.mark.parametrize("spawned", [False, True])
def test_another_process_sees_the_same(spawned):
    sizes = partial(by_epoch, 50, 6)
    sampler = DistributedBatchSampler(50, None, 2, 1, group_by=sizes, budgets=Budgets(20, 9, sizes, sizes))
    sampler.position = sampler.samples_in_step(0)
    expected = list(islice(sampler, 40))
    if not spawned:
        assert list(islice(pickle.loads(pickle.dumps(sampler)), 40)) == expected
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_take, args=(there, sampler))
    process.start()
    assert here.poll(60) and here.recv() == expected
    process.join()


def test_reading_ahead_does_not_move_the_position():
    sampler = DistributedBatchSampler(10, 2, 2)
    batches = iter(sampler)
    ahead = [next(batches) for _ in range(5)]
    assert sampler.position == 0 and sampler.state_dict()["samples"] == 0
    sampler.position += sampler.samples_in_step(sampler.position)
    assert next(iter(sampler)) == ahead[1]


def test_a_few_plans_are_kept():
    asked = []

    def sizes(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return np.ones(4)

    sampler = DistributedBatchSampler(4, 1, group_by=sizes)
    stream_of([sampler], 40)
    assert asked == list(range(10)) and len(sampler._plans) < 4
    sampler.keys_at(36)
    assert len(asked) == 10


# ---- how far, how long ----------------------------------------------------------------------------------------------


def test_epochs_and_steps():
    sampler = DistributedBatchSampler(10, 2, world_size=2, accumulation=1)
    assert (
        sampler.global_batch_size == sampler.samples_per_step == sampler.samples_in_step(12) == 4
        and sampler.epoch_of(20) == 2.0
    )
    assert [sampler.total_samples(epochs) for epochs in (1, 2, 0.01, 0.8)] == [10, 20, 1, 8]
    for epochs in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="epochs must be above 0"):
            sampler.total_samples(epochs)


@given(st.integers(1, 200), st.integers(5, 60), SMALL, SMALL)
@settings(deadline=None, max_examples=40)
def test_steps_of_budgets_are_those_of_the_first_epoch(length, budget, world, accumulation):
    sizes = partial(by_epoch, length, 5)
    sampler = DistributedBatchSampler(length, None, world, 0, accumulation, budgets=Budgets(budget, None, sizes))
    position = steps = 0
    while position < length:
        position += sampler.samples_in_step(position)
        steps += 1
    assert steps == np.ceil(round(length / sampler.samples_per_step, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_length": 0}, "empty"),
        ({"per_device_batch_size": 0}, "per_device_batch_size"),
        ({"accumulation": 0}, "accumulation"),
        ({"world_size": 2, "rank": 2}, "rank 2"),
        ({"seed": -1}, "negative"),
        ({"group_by": [1.0, 2.0]}, "one finite number for each of the 5 samples"),
        ({"group_by": [1.0, 2.0, 3.0, 4.0, float("nan")]}, "got 4 in an array"),
        ({"per_device_batch_size": None}, "either per_device_batch_size or budgets"),
        ({"budgets": Budgets(5, num_tokens=sizes_of)}, "either per_device_batch_size or budgets"),
    ],
)
def test_nonsense_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistributedBatchSampler(**{"dataset_length": 5, "per_device_batch_size": 1, **arguments})


def test_sizes_of_a_later_epoch_are_checked_too():
    sampler = DistributedBatchSampler(5, 5, group_by=lambda epoch: np.ones(5 - epoch))
    sampler.keys_at(0)
    with pytest.raises(ValueError, match="group_by must hold one finite number for each of the 5 samples"):
        sampler.keys_at(5)


def test_states_of_other_runs_are_refused():
    sizes = partial(sizes_of, 9)
    budgets = {"per_device_batch_size": None, "budgets": Budgets(9, None, sizes)}
    runs = {
        "fixed": DistributedBatchSampler(9, 2),
        "grouped": DistributedBatchSampler(9, 2, group_by=sizes_of(9)),
        "budgets": DistributedBatchSampler(9, **budgets),
        "more": DistributedBatchSampler(9, **{**budgets, "budgets": Budgets(10, None, sizes)}),
    }
    for name, sampler in runs.items():
        for other, saved in runs.items():
            if name == other:
                sampler.load_state_dict(saved.state_dict())
                continue
            with pytest.raises(ValueError, match=r"data\.group_by" if {name, other} == {"fixed", "grouped"} else "had"):
                sampler.load_state_dict(saved.state_dict())


def test_a_position_between_micro_batches_is_an_error():
    sampler = DistributedBatchSampler(9, None, budgets=Budgets(3, None, lambda epoch: np.ones(9)))
    assert sampler.samples_in_step(3) == 3
    with pytest.raises(ValueError, match="no micro batch starts at sample 4"):
        sampler.samples_in_step(4)


# ---- the fixed batch size -------------------------------------------------------------------------------------------


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        return [index for _, index in DistributedBatchSampler(50, 50, seed=seed).keys_at(50 * epoch)]

    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


@pytest.mark.parametrize(("grouped", "checksum"), [(False, 3994881153), (True, 140082286)])
def test_the_stream_is_what_it_always_was(grouped, checksum):
    """Recorded losses belong to these very keys."""
    sizes = np.random.default_rng(7).integers(0, 9, 37).astype(float) if grouped else None
    ranks = [DistributedBatchSampler(37, 2, 3, rank, 2, 11, group_by=sizes) for rank in range(3)]
    keys = [batch for step in range(40) for batch in step_of(ranks, 12 * step)]
    assert zlib.crc32(json.dumps(keys).encode()) == checksum


def test_a_new_split_keeps_the_groups_of_the_first():
    """The step gets larger, its groups stay those of the epoch's order: two of them."""
    sizes = sizes_of(200, 50)
    first, other = (DistributedBatchSampler(200, 4, world, group_by=sizes) for world in (1, 2))
    first.position = 40
    other.plan(0)
    other.load_state_dict(first.state_dict())
    assert (other.group, other.global_batch_size) == (4, 8)
    step = stream_of([other, DistributedBatchSampler(200, 4, 2, 1, group_by=sizes)], 1, 40)
    assert step[:4] == first.keys_at(40)


# ---- grouped by size ------------------------------------------------------------------------------------------------


@given(length=st.integers(20, 400), batch=st.integers(2, 6), kinds=st.integers(1, 5), mega=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_steps_hold_samples_of_one_size_but_for_few(length, batch, kinds, mega):
    """A sorted mega batch has at most kinds - 1 places where the size changes, so at most as many mixed groups."""
    sizes = sizes_of(length, kinds)
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
    sampler = DistributedBatchSampler(length, batch, group_by=sizes)
    epochs = [
        [[i for _, i in sampler.keys_at(start)] for start in range(e * length, (e + 1) * length, batch)] for e in (0, 1)
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
    sampler = DistributedBatchSampler(length, batch, group_by=sizes)
    shared = sampler.keys_at(length // batch * batch)
    assert {epoch for epoch, _ in shared} == {0, 1}
    assert max(sizes[index] for _, index in shared) < batch


def test_grouping_depends_on_the_seed():
    sizes = sizes_of(50)
    first, second = (DistributedBatchSampler(50, 50, seed=seed, group_by=sizes).keys_at(0) for seed in (0, 1))
    assert first != second
