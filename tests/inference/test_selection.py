"""Which instances are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.inference.selection import select
from instructsam.masks import encode, pairwise_iou
from instructsam.structures import Instance


def square(x: int, score: float, phrase: int = 0, side: int = 4) -> Instance:
    mask = np.zeros((8, 16), bool)
    mask[:side, x : x + side] = True
    return Instance(encode(mask), score, (x, 0, x + side, side), f"phrase {phrase}", phrase)


instances = st.lists(
    st.builds(square, st.integers(0, 11), st.floats(0, 1), st.integers(0, 2), st.integers(1, 4)), max_size=8
)


def test_thresholds_are_exclusive():
    some = [square(0, 0.3), square(5, 0.31)]
    assert select(some, 0.3) == (some[1],)
    assert select(some, np.nextafter(0.3, 0)) == tuple(some)


@pytest.mark.parametrize(("common", "iou"), [(8, 1 / 2), (4, 1 / 4), (12, 3 / 4), (16, 1.0)])
def test_an_overlap_that_equals_the_limit_is_allowed(common, iou):
    """Only one above it is removed; float64 holds these IoUs exactly."""
    part = np.arange(16).reshape(4, 4) < common
    best = Instance(encode(np.ones((4, 4), bool)), 0.9, (0, 0, 4, 4), "x", 0)
    worse = Instance(encode(part), 0.8, (0, 0, 4, 4), "x", 0)
    for some in ((best, worse), (worse, best)):
        assert select(some, nms_iou=iou) == some
        assert select(some, nms_iou=np.nextafter(iou, 0)) == (best,)
    if iou < 1:
        assert select((best, worse), nms_iou=np.nextafter(iou, 1)) == (best, worse)


def test_the_highest_scores_are_counted_after_suppression():
    """Of equal scores the first; a suppressed one takes no place."""
    row = [square(0, 0.9), square(0, 0.8), square(5, 0.7), square(10, 0.7)]
    for top_k in range(1, 6):
        assert select(row, top_k=top_k) == tuple(row[:top_k])
    assert select(row, top_k=2, nms_iou=0.5) == (row[0], row[2])
    assert select(row[::-1], top_k=3, threshold=0.7) == (row[1], row[0])


def test_of_two_alike_the_better_one_stays():
    worse, better, apart, other = square(0, 0.5), square(1, 0.8), square(8, 0.4), square(0, 0.3, phrase=1)
    assert select([worse, better, apart, other], nms_iou=0.5) == (better, apart, other)
    assert select([worse, better, apart, other], nms_iou=0.7) == (worse, better, apart, other)  # their IoU is 0.6


def test_a_suppressed_one_suppresses_none():
    """Each overlaps its neighbour: the middle one goes, and the last one stays."""
    row = [square(0, 0.9), square(1, 0.8), square(2, 0.7)]
    assert select(row, nms_iou=0.5) == (row[0], row[2])


@given(instances, st.floats(0, 1), st.none() | st.integers(1, 5), st.none() | st.floats(0.05, 1))
def test_what_holds_for_all(some, threshold, top_k, nms_iou):
    kept = select(some, threshold, top_k, nms_iou)
    places = [next(k for k, one in enumerate(some) if one is instance) for instance in kept]
    assert places == sorted(places) and all(one.score > threshold for one in kept)
    assert top_k is None or len(kept) <= top_k
    if nms_iou is not None:
        for phrase in range(3):
            masks = [one.rle for one in kept if one.phrase_index == phrase]
            overlaps = np.triu(pairwise_iou(masks, masks), 1)
            assert not (overlaps > nms_iou).any()
    left = [one for one in some if one.score > threshold and not any(one is other for other in kept)]
    if nms_iou is None and top_k is None:
        assert not left
    elif nms_iou is None and kept:
        assert all(one.score <= min(other.score for other in kept) for one in left)


@pytest.mark.parametrize(
    "choice", [{"threshold": 1.1}, {"threshold": None}, {"threshold": True}, {"top_k": 0}, {"top_k": 1.5}]
    + [{"nms_iou": 0}, {"nms_iou": 1.2}, {"threshold": float("nan")}],
)  # fmt: skip
def test_choices_that_cannot_be(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        select([], **choice)
