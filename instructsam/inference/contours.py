"""Outlines of masks: polygons that run along the edges of pixels.

Coordinates are those of pixel corners: pixel (x, y) covers x…x+1 and y…y+1. Filling the polygons gives the mask back,
but for its holes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Steps along pixel edges with the mask on the right hand, clockwise as a picture is seen: right, down, left, up.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def outlines(mask: NDArray[np.bool_]) -> list[list[list[float]]]:
    """One polygon [[x, y], …] for each piece of a mask (H, W), holes filled, in reading order.

    Pieces that touch at a corner only are two.
    """
    labels, _ = ndimage.label(mask)
    found = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        piece = ndimage.binary_fill_holes(labels[rows, columns] == k)
        found.append([[x + columns.start, y + rows.start] for x, y in _outline(piece)])
    return found


def _outline(piece: NDArray[np.bool_]) -> list[list[float]]:
    """Walk once around a piece that is connected by edges and has no holes; corners only."""
    padded = np.pad(piece, 1)
    y, x = np.argwhere(piece)[0].tolist()  # the first pixel in reading order: its top edge is on the outline
    start, direction = (x, y), 0
    position, points = start, [[float(x), float(y)]]
    while True:
        position = (position[0] + _STEPS[direction][0], position[1] + _STEPS[direction][1])
        ahead_left, ahead_right = _pixels_ahead(padded, position, direction)
        if not ahead_right:
            turn = 1  # the mask ends: around its corner
        elif ahead_left:
            turn = -1
        else:
            turn = 0
        if position == start and (direction + turn) % 4 == 0:
            return points
        if turn:
            points.append([float(position[0]), float(position[1])])
        direction = (direction + turn) % 4


def _pixels_ahead(padded: NDArray[np.bool_], corner: tuple[int, int], direction: int) -> tuple[bool, bool]:
    """Whether the pixels left and right of the next edge belong to the piece; `padded` by one pixel all around."""
    x, y = corner
    upper_left, upper_right = padded[y, x], padded[y, x + 1]
    lower_left, lower_right = padded[y + 1, x], padded[y + 1, x + 1]
    left, right = (
        (upper_right, lower_right),
        (lower_right, lower_left),
        (lower_left, upper_left),
        (upper_left, upper_right),
    )[direction]
    return bool(left), bool(right)
