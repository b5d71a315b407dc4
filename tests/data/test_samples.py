"""Sizes of samples, and sets of samples that are joined."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.data.samples import SIZES, Mixture, SampleList, SampleSizes, measure, text_bytes
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

ONE: RLE = {"size": [1, 1], "counts": "01"}


def sample(*turns: tuple[int, ...], name: str = "s") -> Sample:
    """One with turns of phrases with so many instances each."""
    return Sample(
        name, None, 0, 0, tuple(Turn("q", tuple(PhraseTarget("p", (ONE,) * n) for n in turn)) for turn in turns)
    )


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([], (0, 0, 0, 0, 0, 0)),
        ([()], (1, 0, 0, 0, 0, 1)),
        ([(3,)], (1, 1, 3, 3, 3, 2)),
        ([(3, 5)], (1, 2, 8, 5, 3, 3)),
        ([(3, 5), (4,)], (2, 3, 12, 5, 3, 5)),
        ([(7,), (4,)], (2, 2, 11, 7, 4, 4)),
        ([(3,), ()], (2, 1, 3, 3, 0, 3)),
        ([(3,), (0,)], (2, 2, 3, 3, 0, 4)),
    ],
)
def test_measure(turns, expected):
    plain = sample(*turns)
    most = max(map(len, turns), default=0), max(map(sum, turns), default=0)
    assert measure(plain) == (*expected, 0, 0, 0, *most)
    pictured = dataclasses.replace(plain, image=Path("a.png"), height=480, width=640)
    assert measure(pictured) == (*expected, 0, 480, 640, *most)
    bare = tuple(dataclasses.replace(turn, form="phrase") for turn in plain.turns[1:])
    assert measure(dataclasses.replace(plain, turns=(*plain.turns[:1], *bare)))[6:9] == (len(bare), 0, 0)


@given(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4), st.integers(0, 6))
def test_fewest_says_whether_a_limit_leaves_a_turn(turns, limit):
    """A phrase above the limit is left out, and a turn with it that has no other."""
    left = any(not turn or min(turn) <= limit for turn in turns)
    fewest = dict(zip(SIZES, measure(sample(*map(tuple, turns))), strict=True))["fewest"]
    assert (fewest <= limit) == left


def test_text_is_counted_in_bytes():
    turn = Turn("zwölf", (PhraseTarget("Äpfel"),), "kind", "id", "", ("Es sind ", "."))
    assert text_bytes(turn) == 6 + 6 + 8 + 1


def test_sizes_are_joined_and_taken():
    samples = [sample((k, 1), (2,)) for k in range(6)]
    whole = SampleSizes.of(samples)
    assert len(whole) == 6 and whole.most.dtype == np.int32
    assert whole.masks.tolist() == [k + 3 for k in range(6)]
    joined = SampleSizes.join([SampleSizes.of(samples[:2]), SampleSizes.of([]), SampleSizes.of(samples[2:])])
    rows = np.array([4, 0])
    for name in SIZES:
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(whole.take(rows), name), getattr(whole, name)[rows])


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 5))
def test_a_mixture_is_its_parts_as_often_as_they_are_repeated(shapes, epoch):
    parts = {
        f"part{p}": SampleList(sample((p, k), name=f"{p}/{k}") for k in range(length))
        for p, (length, _) in enumerate(shapes)
    }
    mixture = Mixture(parts, {f"part{p}": repeats for p, (_, repeats) in enumerate(shapes)})
    once = [(f"part{p}", k) for p, (n, _) in enumerate(shapes) for k in range(n)]
    assert len(mixture) == len(mixture.sizes) == len(once)
    assert [mixture.locate(index) for index in range(len(mixture))] == once
    whole = [parts[name][row] for name, row in once]
    assert [mixture[index] for index in range(len(mixture))] == whole
    for name in SIZES:
        np.testing.assert_array_equal(getattr(mixture.sizes, name), getattr(SampleSizes.of(whole), name))
    for outside in (-1, len(mixture)):
        with pytest.raises(IndexError):
            mixture[outside]
    draws = mixture.draws()
    expected = [(f"part{p}", k) for p, (n, repeats) in enumerate(shapes) for _ in range(repeats) for k in range(n)]
    assert [once[number] for number in draws.of_epoch(epoch)] == expected
    assert [once[draws.at(epoch, index)] for index in range(len(draws))] == expected


@given(st.data(), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=4))
def test_repeats_are_those_of_the_samples_that_are_left(data, shapes):
    """Samples are left out before they are repeated, as if the source had never had them."""
    parts = {f"{p}": SampleList([sample((p,))] * length) for p, (length, _) in enumerate(shapes)}
    mixture = Mixture(parts, {f"{p}": repeats for p, (_, repeats) in enumerate(shapes)})
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(mixture), max_size=len(mixture))))
    found = [mixture.locate(row)[0] for row in rows[mixture.draws(rows).of_epoch(3)]] if len(rows) else []
    kept = [mixture.locate(row)[0] for row in rows]
    assert found == [name for name in mixture.names for _ in range(kept.count(name) * int(mixture.repeats[name]))]


def test_parts_are_once_in_an_epoch_unless_told_otherwise():
    mixture = Mixture({"a": SampleList([sample((1,))] * 2), "b": SampleList([sample((2,))])}, {"b": 3})
    assert mixture.repeats == {"a": 1, "b": 3} and len(mixture.draws()) == 5


def test_weights_are_shares_of_an_epoch_whatever_is_left_out():
    parts = {"a": SampleList([sample((1,))] * 50), "b": SampleList([sample((2,))] * 4)}
    mixture = Mixture(parts, weights={"a": 1, "b": 3}, epoch_samples=20)
    for rows in (None, np.array([3, 4, 5, 50, 53])):
        numbers = mixture.draws(rows).of_epoch(1)
        names = [mixture.locate(number if rows is None else rows[number])[0] for number in numbers]
        assert (names.count("a"), names.count("b")) == (5, 15)
    with pytest.raises(ValueError, match="source b has a weight but no sample to train on"):
        mixture.draws(np.array([3, 4]))


def test_a_mixture_goes_to_workers_without_its_sizes():
    mixture = Mixture({"a": SampleList([sample((1,))] * 2)}, {"a": 1.5})
    assert len(mixture.sizes) == 2
    copy = pickle.loads(pickle.dumps(mixture))
    assert "sizes" not in vars(copy) and len(copy.sizes) == 2 and len(copy.draws()) == 3


@pytest.mark.parametrize(
    ("parts", "settings", "reason"),
    [
        ({}, {}, "at least one source"),
        ({"a": 1}, {"repeats": {"b": 2}}, "repeats of unknown sources: b"),
        ({"a": 1}, {"weights": {"b": 2}}, "weights of unknown sources: b"),
        ({"a": 1}, {"repeats": {"a": 0}}, "source a: repeats must be a number above 0, got 0"),
        ({"a": 1}, {"repeats": {"a": float("nan")}}, "got nan"),
        ({"a": 1}, {"repeats": {"a": float("inf")}}, "got inf"),
        ({"a": 1}, {"repeats": {"a": True}}, "got True"),
        ({"a": 1}, {"repeats": {"a": "2"}}, "got '2'"),
        ({"a": 1}, {"weights": {"a": -1}}, "source a: weights must be a number above 0, got -1"),
        ({"a": 1, "b": 0}, {}, "source b has no samples"),
        ({"a": 1, "b": 1}, {"weights": {"a": 1}, "epoch_samples": 5}, "all sources need a weight, or none; without: b"),
        ({"a": 1}, {"weights": {"a": 1}}, "data.epoch_samples=None: goes with the weights"),
        ({"a": 1}, {"epoch_samples": 5}, "data.epoch_samples=5: goes with the weights"),
        ({"a": 1}, {"weights": {"a": 1}, "epoch_samples": 0}, "epoch_samples=0: must be a whole number of at least 1"),
        ({"a": 1}, {"weights": {"a": 1}, "epoch_samples": 1.5}, "epoch_samples=1.5: must be a whole"),
    ],
)
def test_mixtures_that_cannot_be(parts, settings, reason):
    with pytest.raises(ValueError, match=reason):
        Mixture({name: SampleList([sample((1,))] * number) for name, number in parts.items()}, **settings)
