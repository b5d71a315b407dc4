"""Outlines run around the pixels of a mask, exactly."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from instructsam.inference.contours import outlines
from instructsam.masks import decode, polygons_to_rle


def test_a_square():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    assert outlines(mask) == [[[2.0, 1.0], [5.0, 1.0], [5.0, 3.0], [2.0, 3.0]]]


def test_nothing():
    assert outlines(np.zeros((3, 3), bool)) == []


def test_pixels_that_touch_at_a_corner_are_two():
    assert len(outlines(np.eye(3, dtype=bool))) == 3


def area(points) -> float:
    x, y = np.array(points).T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_filled_they_give_the_mask_back(mask):
    labels, count = ndimage.label(mask)
    pieces = [ndimage.binary_fill_holes(labels == k) for k in range(1, count + 1)]
    found = outlines(mask)
    assert [area(points) for points in found] == [piece.sum() for piece in pieces]
    for points, piece in zip(found, pieces, strict=True):
        corners = np.array(points)
        steps = np.diff(corners, axis=0, append=corners[:1])
        assert ((steps != 0).sum(1) == 1).all(), "along the edges of pixels"
        assert ((steps[:, 0] != 0) != (np.roll(steps[:, 0], -1) != 0)).all(), "corners only"
        flat = [value for point in points for value in point]
        np.testing.assert_array_equal(decode(polygons_to_rle([flat], *mask.shape)), piece)
