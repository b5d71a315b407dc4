"""Draws of an epoch: shares, passes that see every sample before any is seen again, orders that are reproducible."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.data.draws import Draws, draws_per_epoch, shuffled


@st.composite
def several(draw) -> Draws:
    parts = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=4))
    lengths = {f"part{p}": length for p, (length, _) in enumerate(parts)}
    return Draws(lengths, {f"part{p}": drawn for p, (_, drawn) in enumerate(parts)}, draw(st.integers(0, 99)))


@pytest.mark.slow
@given(several(), st.integers(1, 12))
@settings(deadline=None)
def test_no_sample_is_seen_a_second_time_before_all_were_seen_once(draws, epochs):
    """At the end of any epoch, those of a source have been seen equally often, give or take one."""
    seen = np.zeros(sum(draws.lengths), dtype=int)
    for epoch in range(epochs):
        np.add.at(seen, draws.of_epoch(epoch), 1)
        first = 0
        for length, drawn in zip(draws.lengths, draws.draws, strict=True):
            part = seen[first : first + length]
            assert part.sum() == drawn * (epoch + 1) and part.max() - part.min() <= 1
            assert drawn * (epoch + 1) % length or part.max() == part.min()
            first += length


@pytest.mark.slow
@given(several(), st.integers(0, 9))
@settings(deadline=None)
def test_one_draw_is_that_of_the_whole_epoch(draws, epoch):
    whole = draws.of_epoch(epoch)
    assert len(whole) == len(draws) == sum(draws.draws)
    assert [draws.at(epoch, index) for index in range(len(draws))] == whole.tolist()
    for outside in (-1, len(draws)):
        with pytest.raises(IndexError):
            draws.at(epoch, outside)


def test_whole_passes_keep_the_order_of_the_source():
    draws = Draws({"a": 3, "none": 0, "b": 2}, {"a": 6, "none": 0, "b": 2})
    for epoch in range(3):
        assert draws.of_epoch(epoch).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_passes_sources_and_seeds_have_orders_of_their_own():
    def first(name: str = "a", seed: int = 0, epoch: int = 0) -> list[int]:
        return Draws({name: 100}, {name: 50}, seed).of_epoch(epoch).tolist()

    assert first() == first()
    orders = [first(), first(name="b"), first(seed=1), first(epoch=2)]  # two epochs are a pass
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert not set(first()) & set(first(epoch=1))


def _first_draws(connection, draws: Draws) -> None:
    connection.send(draws.of_epoch(4).tolist())


@pytest.mark.multiprocess
def test_another_process_draws_the_same():
    draws = Draws({"a": 1000, "b": 7}, {"a": 333, "b": 20}, 5)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_first_draws, args=(there, draws))
    process.start()
    assert here.poll(60) and here.recv() == draws.of_epoch(4).tolist()
    process.join()


# ---- the permutation ------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(deadline=None)
def test_shuffled_is_a_permutation(length, key):
    assert sorted(shuffled(np.arange(length), length, (key,)).tolist()) == list(range(length))


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 16, 40])
def test_every_sample_is_as_likely_everywhere(length):
    """Over many keys: in which half a sample comes, and whether together with its neighbour."""
    keys = 2000
    first = np.zeros((keys, length), dtype=bool)
    for key in range(keys):
        first[key, shuffled(np.arange(length // 2), length, (7, key))] = True
    share = (length // 2) / length
    assert np.abs(first.mean(0) - share).max() < 4.5 * np.sqrt(share * (1 - share) / keys)
    both = (first[:, 1:] & first[:, :-1]).mean(0)
    expected = share * (length // 2 - 1) / (length - 1)
    assert np.abs(both - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / keys)


# ---- how many -------------------------------------------------------------------------------------------------------


def test_repeats_are_rounded_and_nothing_is_lost():
    lengths = {"half": 7, "once": 3, "more": 10, "little": 5, "none": 0}
    repeats = {"half": 0.5, "more": 1.55, "little": 0.01, "none": 4}
    assert draws_per_epoch(lengths, repeats) == {"half": 4, "once": 3, "more": 16, "little": 1, "none": 0}


@given(
    st.lists(st.floats(0.05, 100), min_size=1, max_size=9),
    st.integers(20_000, 10**7),
)
def test_weights_give_the_shares(weights, total):
    named = {str(k): weight for k, weight in enumerate(weights)}
    draws = draws_per_epoch(dict.fromkeys(named, 3), {}, named, total)
    assert sum(draws.values()) == total
    for name, weight in named.items():
        assert abs(draws[name] - total * weight / sum(weights)) < 1 + 1e-6


def test_shares_that_draw_nothing_are_errors():
    with pytest.raises(ValueError, match="source b is not drawn once an epoch: raise data.epoch_samples=10"):
        draws_per_epoch({"a": 5, "b": 5}, {}, {"a": 100, "b": 1}, 10)
    with pytest.raises(ValueError, match="source b has a weight but no sample"):
        draws_per_epoch({"a": 5, "b": 0}, {}, {"a": 1, "b": 1}, 10)
    assert draws_per_epoch(Counter(a=1), {}, {"a": 0.1}, 10) == {"a": 10}
