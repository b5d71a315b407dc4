"""Sizes of samples, and sets of samples that are joined."""

from __future__ import annotations

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
    assert measure(sample(*turns)) == expected


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


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4))
def test_a_mixture_is_its_parts_as_often_as_they_are_repeated(shapes):
    parts = {
        f"part{p}": SampleList(sample((p, k), name=f"{p}/{k}") for k in range(length))
        for p, (length, _) in enumerate(shapes)
    }
    mixture = Mixture(parts, {f"part{p}": repeats for p, (_, repeats) in enumerate(shapes)})
    expected = [(f"part{p}", k) for p, (n, repeats) in enumerate(shapes) for _ in range(repeats) for k in range(n)]
    assert len(mixture) == len(mixture.sizes) == len(expected)
    assert [mixture.locate(index) for index in range(len(mixture))] == expected
    whole = [parts[name][row] for name, row in expected]
    assert [mixture[index] for index in range(len(mixture))] == whole
    for name in SIZES:
        np.testing.assert_array_equal(getattr(mixture.sizes, name), getattr(SampleSizes.of(whole), name))
    for outside in (-1, len(mixture)):
        with pytest.raises(IndexError):
            mixture[outside]


def test_parts_are_once_in_an_epoch_unless_told_otherwise():
    mixture = Mixture({"a": SampleList([sample((1,))] * 2), "b": SampleList([sample((2,))])}, {"b": 3})
    assert mixture.repeats == (1, 3) and len(mixture) == 5


@pytest.mark.parametrize(
    ("parts", "repeats", "reason"),
    [
        ({}, {}, "at least one source"),
        ({"a": 1}, {"b": 2}, "unknown sources: b"),
        ({"a": 1}, {"a": 0}, "source a: repeats must be a whole number of at least 1, got 0"),
        ({"a": 1}, {"a": 1.5}, "got 1.5"),
        ({"a": 1}, {"a": True}, "got True"),
        ({"a": 1, "b": 0}, {}, "source b has no samples"),
    ],
)
def test_mixtures_that_cannot_be(parts, repeats, reason):
    with pytest.raises(ValueError, match=reason):
        Mixture({name: SampleList([sample((1,))] * number) for name, number in parts.items()}, repeats)
