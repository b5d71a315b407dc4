"""Masks in all their forms: run-length codes (RLE), polygons and boxes to and from arrays; areas, boxes, IoU, unions.

Everything that comes from outside is checked *before* it reaches pycocotools, whose C code trusts its input: a
truncated string is read beyond its end, counts that do not sum to height x width write beyond the mask (DESIGN
section 16). The check reads the compressed strings with numpy, many at a time. Results are canonical: compressed,
``counts`` a ``str`` (so that they can be written as JSON), and no empty runs within.

Shapes: N masks, H W pixels. Boxes are [x1, y1, x2, y2] in pixels with exclusive ends, so that x2 - x1 is a width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco

from instructsam.errors import DataError, at
from instructsam.structures import RLE

MAX_PIXELS = 2**31 - 1  # the C code counts pixels in 32 bits
_MAX_DIGITS = 7  # base-32 digits (5 bits each) of a number below 2**31, with its sign
_CHUNK_PIXELS = 2**30  # pixels handed to the C encoder at once: it also counts those of a batch in 32 bits
_CHUNK_CHARS = 2**15  # characters checked at once, so that the arrays made of them stay in the cache


# ---- checking ---------------------------------------------------------------------------------------------------


def check_rle(rle: Any, height: int | None = None, width: int | None = None, what: str = "RLE") -> RLE:
    """Check one run-length code; see :func:`check_rles`. ``what`` is its name in error messages."""
    return _check([rle], height, width, lambda _: what)[0]


def check_rles(
    rles: Iterable[Any], height: int | None = None, width: int | None = None, what: str | Callable[[int], str] = "rles"
) -> list[RLE]:
    """Check run-length codes and bring them to canonical form.

    Args:
        rles: dicts with ``size`` [height, width] and ``counts``: a compressed ``str`` or ``bytes``, or a list of run
            lengths (background first, column by column).
        height, width: the size that they must have, in pixels; any size where None.
        what: name of the list in error messages, or a function from an index to the code's name.

    Returns:
        New dicts with a compressed ``str`` as counts and no empty run except possibly the first.

    Raises:
        ValueError: ``what[index]: reason`` for anything malformed.
    """
    return _check(rles, height, width, what if callable(what) else lambda index: f"{what}[{index}]")


def _check(rles: Iterable[Any], height: int | None, width: int | None, name: Callable[[int], str]) -> list[RLE]:
    sizes, strings = _sizes_and_strings(rles, height, width, name)
    canonical = [string for chunk, _, _ in _checked_chunks(sizes, strings, name) for string in chunk]
    return [_rle(size, string) for size, string in zip(sizes, canonical, strict=True)]


def check_runs(
    rles: Iterable[Any], what: Callable[[int], str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Check as :func:`check_rles`, for those who want run lengths: nothing is compressed or read a second time.

    Returns:
        (N, 2) sizes; all run lengths one after another, as listed (empty runs stay); and (N + 1,) where each mask's
        begin (and the last ends).
    """
    sizes, strings = _sizes_and_strings(rles, None, None, what)
    if not sizes:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64)
    chunks = [(counts, starts) for _, counts, starts in _checked_chunks(sizes, strings, what)]
    lengths = np.concatenate([np.diff(starts) for _, starts in chunks])
    counts_flat = np.concatenate([counts for counts, _ in chunks])
    return np.array(sizes, dtype=np.int64), counts_flat, np.concatenate([[0], np.cumsum(lengths)])


def _checked_chunks(
    sizes: list[list[int]], strings: list[bytes], name: Callable[[int], str]
) -> Iterator[tuple[list[bytes], NDArray[np.int64], NDArray[np.int64]]]:
    """Canonical strings, run lengths and their starts of consecutive masks, as many at a time as fit the cache."""
    start = 0
    while start < len(strings):
        stop, chars = start + 1, len(strings[start])
        while stop < len(strings) and chars + len(strings[stop]) <= _CHUNK_CHARS:
            chars += len(strings[stop])
            stop += 1
        yield _check_counts(strings[start:stop], sizes[start:stop], _shifted(name, start))
        start = stop


def _sizes_and_strings(
    rles: Iterable[Any], height: int | None, width: int | None, name: Callable[[int], str]
) -> tuple[list[list[int]], list[bytes]]:
    """Sizes, and compressed counts that have not been looked into yet."""
    sizes: list[list[int]] = []
    strings: list[bytes] = []
    for index, rle in enumerate(rles):
        try:
            size, counts = _fields(rle, height, width)
            sizes.append(sizes[-1] if sizes and sizes[-1] == size else size)  # fewer objects for the collector to visit
            strings.append(counts if isinstance(counts, bytes) else _compress(_run_lengths(counts, size), size))
        except ValueError as error:
            raise at(name(index), error) from None
    return sizes, strings


def _shifted(name: Callable[[int], str], start: int) -> Callable[[int], str]:
    return lambda index: name(start + index)


def _check_counts(
    strings: list[bytes], sizes: list[list[int]], name: Callable[[int], str]
) -> tuple[list[bytes], NDArray[np.int64], NDArray[np.int64]]:
    """The strings in canonical form, if every one fills its size; and what `_read_counts` read."""
    counts_flat, starts = _read_counts(strings, name)
    pixels = np.array([size[0] * size[1] for size in sizes], dtype=np.int64)
    pixels_flat = np.repeat(pixels, np.diff(starts))
    wrong = (counts_flat < 0) | (counts_flat > pixels_flat)
    if wrong.any():
        at = int(wrong.argmax())
        index = _segment(starts, at)
        raise DataError(
            f"{name(index)}: run {at - starts[index]} has length {counts_flat[at]}, "
            f"which does not fit {_times(sizes[index])} = {pixels[index]} pixels",
            "rle overrun",
        )
    totals = np.add.reduceat(counts_flat, starts[:-1], dtype=np.int64)
    if (totals != pixels).any():
        index = int((totals != pixels).argmax())
        raise DataError(
            f"{name(index)}: counts sum to {totals[index]}, but {_times(sizes[index])} has {pixels[index]} pixels",
            "rle overrun" if totals[index] > pixels[index] else "rle short",
        )
    # The C code takes an empty run after the first for pixels when it looks for a mask's box.
    empty_runs = counts_flat == 0
    empty_runs[starts[:-1]] = False
    if empty_runs.any():
        strings = list(strings)
        for index in {_segment(starts, at) for at in np.flatnonzero(empty_runs).tolist()}:
            runs = _without_empty_runs(counts_flat[starts[index] : starts[index + 1]])
            strings[index] = _compress(runs, sizes[index])
    return strings, counts_flat, starts


def _fields(rle: Any, height: int | None, width: int | None) -> tuple[list[int], Any]:
    """Size and counts of something that should be an RLE; textual counts come as bytes."""
    if type(rle) is not dict and not isinstance(rle, Mapping):  # the first test is the fast one
        raise DataError(f"expected a dict with size and counts, got {type(rle).__name__}", "rle form")
    try:
        size, counts = rle["size"], rle["counts"]
    except KeyError:
        missing = [key for key in ("size", "counts") if key not in rle]
        raise DataError(f"has no {' and no '.join(missing)}", "rle form") from None
    # Tuples of types, since a union is made anew at every call.
    if not isinstance(size, (list, tuple, np.ndarray)) or len(size) != 2 or not all(map(_is_integer, size)):
        raise DataError(f"size must be two integers [height, width], got {size!r}", "rle form")
    rows, columns = int(size[0]), int(size[1])
    _check_size(rows, columns)
    if height not in (None, rows) or width not in (None, columns):
        raise DataError(
            f"size is {_times((rows, columns))} (height x width), expected {height or 'any'}x{width or 'any'}",
            "mask size",
        )
    if isinstance(counts, str):
        if not counts.isascii():
            raise DataError("counts holds characters that are not ASCII", "rle characters")
        counts = counts.encode("ascii")
    elif not isinstance(counts, (bytes, list, tuple, np.ndarray)):
        raise DataError(
            f"counts must be a compressed string or a list of run lengths, got {type(counts).__name__}", "rle form"
        )
    if len(counts) == 0:
        raise DataError("counts is empty", "rle truncated")
    return [rows, columns], counts


def _run_lengths(counts: ArrayLike, size: list[int]) -> NDArray[np.int64]:
    """An uncompressed list of run lengths as an array, fit to be compressed; its sum is checked afterwards."""
    try:
        array = np.asarray(counts)
    except ValueError:
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError("counts must be a flat list of integers", "rle form")
    if array.min() < 0 or array.max() > size[0] * size[1]:
        raise DataError(
            f"counts holds a run outside 0...{size[0] * size[1]}: {int(array.min())}...{int(array.max())}",
            "rle overrun",
        )
    return array.astype(np.int64)


def _read_counts(strings: Sequence[bytes], name: Callable[[int], str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read compressed counts, all strings in one go.

    A number is a run of characters of 6 bits (offset 48): 5 bits of the number, lowest first, and one bit that says
    whether more follow; the last character's highest number bit is the sign. From the fourth number on, each is the
    difference to the number two before.

    Returns:
        All run lengths one after another, and (N + 1,) where each string's begin (and the last ends).
    """
    char_starts = np.concatenate([[0], np.cumsum([len(string) for string in strings])])
    chars = np.frombuffer(b"".join(strings), dtype=np.uint8) - np.uint8(48)  # smaller ones wrap around to large ones
    if chars.max() > 63:
        at = int((chars > 63).argmax())
        index = _segment(char_starts, at)
        raise DataError(
            f"{name(index)}: counts holds the character {chr((int(chars[at]) + 48) % 256)!r} at position "
            f"{at - char_starts[index]}, which the compressed form does not know",
            "rle characters",
        )
    is_last = chars < 0x20
    if not is_last[char_starts[1:] - 1].all():
        index = int(is_last[char_starts[1:] - 1].argmin())
        raise DataError(f"{name(index)}: counts is truncated, its last number is incomplete", "rle truncated")
    lasts = np.flatnonzero(is_last)
    starts = np.concatenate([[0], np.searchsorted(lasts, char_starts[1:] - 1) + 1])
    extra = np.diff(lasts, prepend=-1) - 1  # digits after the first
    most = int(extra.max())
    if most >= _MAX_DIGITS:
        index = _segment(starts, int(extra.argmax()))
        raise DataError(f"{name(index)}: counts holds a number too long for any image", "rle overrun")
    values = ((chars[lasts] & 0x1F) ^ 0x10).astype(np.int64) - 0x10  # the last digit, with its sign
    if most:
        longer = np.flatnonzero(extra)
        ends, places, numbers = lasts[longer], extra[longer], values[longer]
        for place in range(1, most + 1):
            still = slice(None) if place == 1 else np.flatnonzero(places >= place)
            numbers[still] = (numbers[still] << 5) | (chars[ends[still] - place] & 0x1F)
        values[longer] = numbers
    return _undo_differences(values, starts), starts


def _undo_differences(values: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers 1, 3, 5, ... and 2, 4, 6, ... of every string are running sums; number 0 stands alone."""
    # Every string begins a row of two columns, so that one sum down the columns does both for all strings.
    lengths = np.diff(starts)
    rows = np.concatenate([[0], np.cumsum((lengths + 1) // 2)])
    at = np.arange(len(values)) + np.repeat(2 * rows[:-1] - starts[:-1], lengths)
    paired = np.zeros((rows[-1], 2), dtype=np.int64)
    flat = paired.reshape(-1)
    flat[at] = values
    flat[2 * rows[:-1]] = 0
    totals = np.add.reduceat(paired, rows[:-1], axis=0)
    paired[rows[1:-1]] -= totals[:-1]  # begin each string anew
    np.cumsum(paired, axis=0, out=paired)
    flat[2 * rows[:-1]] = values[starts[:-1]]
    return flat[at]


def _without_empty_runs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    values = np.arange(len(counts)) % 2
    values, counts = values[counts > 0], counts[counts > 0]
    begins = np.flatnonzero(np.diff(values, prepend=-1))
    merged = np.add.reduceat(counts, begins)
    return np.concatenate([[0], merged]) if values[0] == 1 else merged


def _compress(counts: NDArray[np.int64], size: list[int]) -> bytes:
    return cast(bytes, coco.frPyObjects({"size": size, "counts": counts.tolist()}, *size)["counts"])


def _rle(size: Sequence[int], counts: bytes) -> RLE:
    return {"size": [int(size[0]), int(size[1])], "counts": counts.decode("ascii")}


def _is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _segment(starts: NDArray[np.int64], position: int) -> int:
    """Which of the segments that begin at ``starts`` a position lies in."""
    return int(np.searchsorted(starts, position, side="right")) - 1


def _times(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _check_size(height: int, width: int) -> None:
    if height <= 0 or width <= 0 or height * width > MAX_PIXELS:
        raise DataError(f"size {height}x{width} (height x width) is not that of an image", "rle form")


# ---- arrays -----------------------------------------------------------------------------------------------------


def encode(mask: ArrayLike) -> RLE:
    """Encode a mask (H, W), boolean or of zeros and ones.

    Raises:
        ValueError: for another shape, or other values (threshold logits or grey values first).
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"a mask must have shape (H, W), got {array.shape}")
    return encode_batch(array[None])[0]


def encode_batch(masks: ArrayLike) -> list[RLE]:
    """Encode masks (N, H, W), boolean or of zeros and ones; raises as :func:`encode`."""
    array = np.asarray(masks)
    if array.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {array.shape}")
    if array.dtype != np.bool_:
        if not ((array == 0) | (array == 1)).all():
            raise ValueError("masks must be boolean or hold zeros and ones only: threshold them first")
        array = array.astype(np.bool_)
    count, height, width = array.shape
    _check_size(height, width)
    rles: list[RLE] = []
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, count, step):
        # The C code wants (H, W, N) in Fortran order, which is (N, W, H) in memory.
        columns = np.ascontiguousarray(array[start : start + step].transpose(0, 2, 1)).view(np.uint8)
        rles.extend(_rle(rle["size"], rle["counts"]) for rle in coco.encode(columns.transpose(2, 1, 0)))
    return rles


def decode(rle: Any, height: int | None = None, width: int | None = None) -> NDArray[np.bool_]:
    """Decode an RLE to a boolean mask (H, W). Raises ValueError where malformed or not of the size given."""
    checked = check_rle(rle, height, width)
    return decode_batch([checked], checked["size"][0], checked["size"][1], checked=True)[0]


def decode_batch(rles: Iterable[Any], height: int, width: int, checked: bool = False) -> NDArray[np.bool_]:
    """Decode RLEs of one size to boolean masks (N, H, W); N may be 0. Raises ValueError as :func:`check_rles`."""
    codes = list(rles) if checked else check_rles(rles, height, width)
    if not codes:
        return np.zeros((0, height, width), dtype=np.bool_)
    counts, starts = _read_counts([code["counts"].encode("ascii") for code in codes], str)
    values = (np.arange(len(counts)) - np.repeat(starts[:-1], np.diff(starts))) % 2 == 1
    flat = np.repeat(values, counts)
    return np.ascontiguousarray(flat.reshape(len(codes), width, height).transpose(0, 2, 1))


# ---- measures ---------------------------------------------------------------------------------------------------
# ``checked=True`` says that the codes come from this module and all have one size: they are not looked at again.


def areas(rles: Iterable[Any], checked: bool = False) -> NDArray[np.int64]:
    """Areas (N,) in pixels."""
    codes = list(rles) if checked else check_rles(rles)
    return np.asarray(coco.area(codes), dtype=np.int64).reshape(len(codes))


def area(rle: Any) -> int:
    """Area of one mask in pixels."""
    return int(areas([rle])[0])


def bboxes(rles: Iterable[Any], checked: bool = False) -> NDArray[np.float64]:
    """Tight boxes (N, 4) as [x1, y1, x2, y2] in pixels with exclusive ends; zeros for an empty mask."""
    codes = list(rles) if checked else check_rles(rles)
    if not codes:
        return np.zeros((0, 4))
    boxes = np.array(coco.toBbox(codes), dtype=np.float64).reshape(len(codes), 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def bbox(rle: Any) -> tuple[float, float, float, float]:
    """Tight box of one mask; see :func:`bboxes`."""
    x1, y1, x2, y2 = bboxes([rle])[0].tolist()
    return x1, y1, x2, y2


def pairwise_iou(rles_a: Iterable[Any], rles_b: Iterable[Any], checked: bool = False) -> NDArray[np.float64]:
    """IoU of every mask of one list with every mask of another, all of one size.

    Returns:
        (A, B) in 0...1. Two empty masks have IoU 0: an instance without pixels matches nothing.

    Raises:
        ValueError: for a malformed code, or sizes that differ.
    """
    codes_a, codes_b = list(rles_a), list(rles_b)
    if not checked:
        codes_a, codes_b = check_rles(codes_a, what="rles_a"), check_rles(codes_b, what="rles_b")
        sizes = {_times(code["size"]) for code in (*codes_a, *codes_b)}
        if len(sizes) > 1:
            raise ValueError(f"masks of different sizes cannot be compared: {', '.join(sorted(sizes))}")
    if not codes_a or not codes_b:
        return np.zeros((len(codes_a), len(codes_b)))
    return np.array(coco.iou(codes_a, codes_b, [0] * len(codes_b)), dtype=np.float64, order="C")


def union(rles: Iterable[Any], height: int, width: int, checked: bool = False) -> RLE:
    """Union of masks of size (height, width); of none, the empty mask. Raises ValueError as :func:`check_rles`."""
    codes = list(rles) if checked else check_rles(rles, height, width)
    if not codes:
        return empty_rle(height, width)
    merged = coco.merge(codes, intersect=False)
    return _rle(merged["size"], merged["counts"])


def empty_rle(height: int, width: int) -> RLE:
    """The mask of size (height, width) without any pixel."""
    _check_size(height, width)
    return _rle((height, width), _compress(np.array([height * width]), [height, width]))


# ---- polygons and boxes -----------------------------------------------------------------------------------------


def polygons_to_rle(polygons: Any, height: int, width: int, what: str = "polygons") -> RLE:
    """Rasterise the polygons of one instance (their union), as COCO does.

    Args:
        polygons: list of polygons, each flat [x1, y1, x2, y2, ...] or a list of points, in pixels. What reaches over
            the image's border is cut off.
        height, width: size of the image in pixels.
        what: name of the polygons in error messages.

    Raises:
        ValueError: for an empty list, fewer than three points, an odd number of coordinates, NaN or infinite ones,
            and a polygon that lies outside the image or reaches more than an image's size beyond it (its coordinates
            belong to another size).
    """
    _check_size(height, width)
    if not isinstance(polygons, list | tuple | np.ndarray) or len(polygons) == 0:
        raise DataError(f"{what}: expected a list with at least one polygon, got {_short(polygons)}", "polygon form")
    flat = [_check_polygon(polygon, height, width, f"{what}[{index}]") for index, polygon in enumerate(polygons)]
    merged = coco.merge(coco.frPyObjects(flat, height, width), intersect=False)
    return _rle(merged["size"], merged["counts"])


def _check_polygon(polygon: Any, height: int, width: int, name: str) -> list[float]:
    points = _numbers(polygon)
    if points is None:
        raise DataError(f"{name}: expected a list of numbers, got {_short(polygon)}", "polygon form")
    if points.ndim == 1 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise DataError(
            f"{name}: expected [x1, y1, x2, y2, ...] or a list of points, got {_short(polygon)}", "polygon form"
        )
    if len(points) < 3:
        raise DataError(f"{name}: has {len(points)} points, a polygon needs at least 3", "polygon points")
    if not np.isfinite(points).all():
        raise DataError(f"{name}: holds a coordinate that is NaN or infinite", "polygon nan")
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.array([width, height], dtype=np.float64)
    if (high < 0).any() or (low > extent).any():
        raise DataError(f"{name}: lies outside the image (width {width}, height {height})", "polygon outside")
    if (low < -extent).any() or (high > 2 * extent).any():
        raise DataError(
            f"{name}: reaches from {low.tolist()} to {high.tolist()}, far beyond the image (width {width}, "
            f"height {height})",
            "polygon outside",
        )
    return points.ravel().tolist()


def box_to_rle(box: ArrayLike, height: int, width: int, what: str = "box") -> RLE:
    """A filled box [x1, y1, x2, y2] (pixels, exclusive ends) as a mask of size (height, width), cut at the border.

    A pixel belongs to the box if its centre does; a box too thin to hold a centre gets the pixels that its own
    middle lies in, so that no box inside the image becomes an empty mask.

    Raises:
        ValueError: for NaN or infinite coordinates, x2 <= x1, y2 <= y1, or a box outside the image.
    """
    _check_size(height, width)
    edges = _numbers(box)
    if edges is None or edges.shape != (4,):
        raise DataError(f"{what}: expected four numbers [x1, y1, x2, y2], got {_short(box)}", "box form")
    if not np.isfinite(edges).all():
        raise DataError(f"{what}: holds a coordinate that is NaN or infinite", "box nan")
    if edges[2] <= edges[0] or edges[3] <= edges[1]:
        raise DataError(f"{what}: has no extent, [x1, y1, x2, y2] = {edges.tolist()}", "box extent")
    if edges[0] >= width or edges[1] >= height or edges[2] <= 0 or edges[3] <= 0:
        raise DataError(
            f"{what}: {edges.tolist()} lies outside the image (width {width}, height {height})", "box outside"
        )
    left, right = _covered(edges[0], edges[2], width)
    top, bottom = _covered(edges[1], edges[3], height)
    # Column by column: background above the box, the box's pixels, background down to the next column's.
    inside = np.tile([bottom - top, height - (bottom - top)], right - left)
    inside[-1] = height * width - (left * height + top) - inside[:-1].sum()
    counts = np.concatenate([[left * height + top], inside])
    return _rle((height, width), _compress(_without_empty_runs(counts), [height, width]))


def box_to_mask(box: ArrayLike, height: int, width: int) -> NDArray[np.bool_]:
    """A filled box as a boolean mask (H, W); see :func:`box_to_rle`."""
    return decode(box_to_rle(box, height, width))


def _covered(low: float, high: float, length: int) -> tuple[int, int]:
    """First and one past the last pixel of 0...length whose centre lies in [low, high); at least one."""
    low, high = max(low, 0.0), min(high, float(length))
    first, stop = int(np.ceil(low - 0.5)), int(np.ceil(high - 0.5))
    if stop <= first:
        first = min(int((low + high) / 2), length - 1)
        stop = first + 1
    return first, stop


def segmentation_to_rle(segmentation: Any, height: int, width: int, what: str = "segmentation") -> RLE:
    """A COCO ``segmentation`` of one instance (RLE of either kind, or a list of polygons) as a checked RLE.

    Raises:
        ValueError: naming ``what`` and the reason; see :func:`check_rle` and :func:`polygons_to_rle`.
    """
    if isinstance(segmentation, Mapping):
        return check_rle(segmentation, height, width, what)
    return polygons_to_rle(segmentation, height, width, what)


def _numbers(values: Any) -> NDArray[np.float64] | None:
    """Nested lists of numbers as an array; None for anything else: text, ragged lists, integers beyond 64 bits."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
