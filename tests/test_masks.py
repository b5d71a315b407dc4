"""Masks: every way in and out, checked against plain numpy, and everything malformed named before C code sees it."""

from __future__ import annotations

import json
import re

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from instructsam import masks

# pycocotools' own decoder, used for comparison here, is not quite up to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

quick = settings(deadline=None, max_examples=60)

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def stacks(max_count: int = 5):
    """Boolean stacks (N, H, W); blocks of equal pixels arise often enough through hypothesis' shrinking fill."""
    return SIZES.flatmap(
        lambda size: hnp.arrays(np.bool_, st.integers(0, max_count).map(lambda n: (n, *size)), elements=st.booleans())
    )


def plain_counts(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask by definition: column by column, background first."""
    runs, value = [0], False
    for pixel in mask.ravel(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


# ---- round trips ------------------------------------------------------------------------------------------------


@quick
@given(stacks())
def test_encode_and_decode_are_inverse(stack):
    rles = masks.encode_batch(stack)
    assert rles == [masks.encode(mask) for mask in stack]
    assert np.array_equal(masks.decode_batch(rles, *stack.shape[1:]), stack)
    for rle, mask in zip(rles, stack, strict=True):
        decoded = masks.decode(rle)
        assert decoded.dtype == np.bool_ and decoded.flags["C_CONTIGUOUS"] and np.array_equal(decoded, mask)
        assert np.array_equal(coco.decode(rle).astype(bool), mask)


def test_rles_can_be_written_as_json():
    rle = masks.encode(disc(20, 30, 8, 9, 5))
    assert json.loads(json.dumps(rle)) == rle and isinstance(rle["counts"], str)


@quick
@given(stacks())
def test_every_form_of_counts_becomes_the_same_code(stack):
    size = list(stack.shape[1:])
    expected = masks.encode_batch(stack)
    uncompressed = [{"size": size, "counts": plain_counts(mask)} for mask in stack]
    as_bytes = [{"size": tuple(size), "counts": rle["counts"].encode()} for rle in expected]
    assert masks.check_rles(uncompressed, *size) == expected
    assert masks.check_rles(as_bytes, *size) == expected
    assert masks.check_rles(expected, *size) == expected


@quick
@given(SIZES, st.data())
def test_empty_runs_are_merged(size, data):
    pixels = size[0] * size[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, pixels), max_size=8)))
    counts = np.diff([0, *cuts, pixels]).tolist()
    rle = masks.check_rle({"size": list(size), "counts": counts})
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    mask = values.reshape(size[1], size[0]).T
    assert rle == masks.encode(mask)
    # The same counts in compressed form, which pycocotools writes as they are.
    sloppy = coco.frPyObjects({"size": list(size), "counts": counts}, *size)
    assert masks.check_rle(sloppy) == rle
    assert masks.bbox(sloppy) == masks.bbox(rle)


def test_long_runs_and_large_differences():
    """Numbers of several characters, with both signs, among strings of other lengths."""
    rng = np.random.default_rng(0)
    stack = np.repeat(rng.random((7, 600, 1)) < 0.5, 700, axis=2)
    stack[1], stack[2] = False, True
    stack[3, :, 350:] = disc(600, 350, 300, 100, 80)
    rles = masks.encode_batch(stack)
    assert masks.check_rles(rles) == rles
    assert np.array_equal(masks.decode_batch(rles, 600, 700), stack)


def test_encode_takes_zeros_and_ones_of_any_type_and_nothing_else():
    mask = disc(9, 7, 4, 3, 2)
    for dtype in (np.uint8, np.int64, np.float32):
        assert masks.encode(mask.astype(dtype)) == masks.encode(mask)
    with pytest.raises(ValueError, match="zeros and ones"):
        masks.encode(mask.astype(np.uint8) * 255)
    with pytest.raises(ValueError, match="zeros and ones"):
        masks.encode(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        masks.encode(mask[0])
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        masks.encode_batch(mask)
    with pytest.raises(ValueError, match="0x5"):
        masks.encode(np.zeros((0, 5), bool))


def test_batches_larger_than_a_chunk(monkeypatch):
    stack = np.random.default_rng(1).random((7, 5, 6)) < 0.5
    expected = masks.encode_batch(stack)
    monkeypatch.setattr(masks, "_CHUNK_PIXELS", 70)
    assert masks.encode_batch(stack) == expected


# ---- measures ---------------------------------------------------------------------------------------------------


@quick
@given(stacks(), st.data())
def test_measures_equal_numpy(stack, data):
    count, height, width = stack.shape
    rles = masks.encode_batch(stack)
    assert masks.areas(rles).tolist() == stack.sum(axis=(1, 2)).tolist()
    assert [masks.area(rle) for rle in rles] == masks.areas(rles).tolist()
    for mask, box in zip(stack, masks.bboxes(rles), strict=True):
        rows, columns = np.nonzero(mask)
        expected = [0] * 4 if not mask.any() else [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == expected
    split = data.draw(st.integers(0, count))
    a, b = stack[:split, None], stack[None, split:]
    inter, total = (a & b).sum((2, 3)), (a | b).sum((2, 3))
    expected = np.divide(inter, total, out=np.zeros(inter.shape), where=total > 0)
    assert np.array_equal(masks.pairwise_iou(rles[:split], rles[split:]), expected)
    assert masks.union(rles, height, width) == masks.encode(stack.any(axis=0))


def test_measures_of_nothing():
    rle = masks.encode(np.eye(3, dtype=bool))
    assert masks.pairwise_iou([], [rle]).shape == (0, 1) and masks.pairwise_iou([rle], []).shape == (1, 0)
    assert masks.areas([]).shape == (0,) and masks.bboxes([]).shape == (0, 4)
    assert masks.decode_batch([], 4, 5).shape == (0, 4, 5)
    assert masks.check_rles([]) == []
    assert not masks.decode(masks.union([], 4, 5)).any()
    assert masks.empty_rle(4, 5) == masks.encode(np.zeros((4, 5), bool))


def test_masks_of_other_sizes_are_not_compared():
    a, b = masks.empty_rle(4, 5), masks.empty_rle(5, 4)
    with pytest.raises(ValueError, match="4x5, 5x4"):
        masks.pairwise_iou([a], [b])
    with pytest.raises(ValueError, match=r"rles\[1\].*5x4.*expected 4x5"):
        masks.union([a, b], 4, 5)


# ---- malformed codes --------------------------------------------------------------------------------------------

GOOD = {"size": [4, 5], "counts": [3, 4, 13]}


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        (None, "expected a dict with size and counts, got NoneType"),
        ({"size": [4, 5]}, "has no counts"),
        ({}, "has no size and no counts"),
        ({"size": [4], "counts": [20]}, "size must be two integers"),
        ({"size": [4.5, 5], "counts": [20]}, "size must be two integers"),
        ({"size": "45", "counts": [20]}, "size must be two integers"),
        ({"size": [True, 5], "counts": [5]}, "size must be two integers"),
        ({"size": [0, 5], "counts": [0]}, "size 0x5"),
        ({"size": [-4, -5], "counts": [20]}, "size -4x-5"),
        ({"size": [70000, 70000], "counts": [4900000000]}, "size 70000x70000"),
        ({"size": [4, 5], "counts": []}, "counts is empty"),
        ({"size": [4, 5], "counts": ""}, "counts is empty"),
        ({"size": [4, 5], "counts": 20}, "counts must be a compressed string or a list"),
        ({"size": [4, 5], "counts": [3, 4, 12]}, "counts sum to 19, but 4x5 has 20 pixels"),
        ({"size": [4, 5], "counts": [3, 4, 14]}, "counts sum to 21, but 4x5 has 20 pixels"),
        ({"size": [4, 5], "counts": [3, -4, 21]}, "run outside 0...20: -4...21"),
        ({"size": [4, 5], "counts": [3.0, 4.0, 13.0]}, "flat list of integers"),
        ({"size": [4, 5], "counts": [[3, 4], [13]]}, "flat list of integers"),
        ({"size": [4, 5], "counts": [2**70]}, "flat list of integers"),
        ({"size": [4, 5], "counts": "34"}, "counts sum to 7, but 4x5 has 20 pixels"),
        ({"size": [4, 5], "counts": "34é"}, "not ASCII"),
        ({"size": [4, 5], "counts": "3 4"}, "character ' ' at position 1"),
        ({"size": [4, 5], "counts": b"34\xff"}, "character"),
        ({"size": [4, 5], "counts": "34d"}, "truncated"),
        ({"size": [4, 5], "counts": "3N"}, "run 1 has length -2"),
        ({"size": [4, 5], "counts": "d0"}, None),  # 20 = one number of two characters: fine
        ({"size": [4, 5], "counts": "34PPPPPPPPPPP0"}, "number too long"),
        ({"size": [4, 5], "counts": "PPPPPP1"}, "run 0 has length 1073741824"),
    ],
)
def test_malformed_codes_are_named(rle, reason):
    if reason is None:
        assert masks.decode(rle).shape == (4, 5)
        return
    with pytest.raises(ValueError, match="^gt_rles" + re.escape("[1]: ") + ".*" + re.escape(reason)):
        masks.check_rles([GOOD, rle], what="gt_rles")
    with pytest.raises(ValueError, match="^annotation 7: .*" + re.escape(reason)):
        masks.check_rle(rle, what="annotation 7")
    for function in (masks.decode, masks.area, masks.bbox):
        with pytest.raises(ValueError, match=re.escape(reason)):
            function(rle)


def test_many_codes_are_checked_in_chunks(monkeypatch):
    stack = np.random.default_rng(2).random((9, 6, 5)) < 0.5
    rles = masks.encode_batch(stack)
    for chunk in (1, 25, 60):
        monkeypatch.setattr(masks, "_CHUNK_CHARS", chunk)
        assert (
            masks.check_rles([{**rle, "counts": plain_counts(mask)} for rle, mask in zip(rles, stack, strict=True)])
            == rles
        )
        broken = [*rles[:7], {"size": [6, 5], "counts": "1"}, rles[8]]
        with pytest.raises(ValueError, match=r"^rles\[7\]: counts sum to 1"):
            masks.check_rles(broken)
        with pytest.raises(ValueError, match="^the eighth: counts sum to 1"):
            masks.check_rles(broken, what=lambda index: {7: "the eighth"}[index])


def test_size_must_be_the_image_s():
    assert masks.check_rle(GOOD, 4, 5) == masks.check_rle(GOOD) == masks.check_rle(GOOD, width=5)
    with pytest.raises(ValueError, match=r"4x5 \(height x width\), expected 5x4"):
        masks.check_rle(GOOD, 5, 4)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=[chr(code) for code in range(46, 114)], max_size=12), st.integers(1, 6), st.integers(1, 6))
def test_no_string_passes_that_does_not_fill_its_mask(text, height, width):
    """Whatever is let through decodes to exactly height x width, in our decoder and in pycocotools'."""
    rle = {"size": [height, width], "counts": text}
    try:
        checked = masks.check_rle(rle)
    except ValueError:
        return
    ours = masks.decode(rle)
    assert ours.shape == (height, width)
    assert np.array_equal(coco.decode(checked), ours) and masks.encode(ours) == checked


@quick
@given(stacks(max_count=3).filter(len), st.data())
def test_a_cut_string_is_always_found(stack, data):
    rle = masks.encode_batch(stack)[-1]
    cut = data.draw(st.integers(0, len(rle["counts"]) - 1))
    with pytest.raises(ValueError):
        masks.check_rle({**rle, "counts": rle["counts"][:cut]})


# ---- polygons and boxes -----------------------------------------------------------------------------------------


def test_polygons_of_one_instance_are_united():
    square, other = [2, 3, 6, 3, 6, 8, 2, 8], [[10, 1], [12, 1], [12, 4], [10, 4]]
    expected = np.zeros((10, 15), bool)
    expected[3:8, 2:6] = expected[1:4, 10:12] = True
    rle = masks.polygons_to_rle([square, other], 10, 15)
    assert np.array_equal(masks.decode(rle), expected)
    assert masks.segmentation_to_rle([square, other], 10, 15) == rle
    assert masks.segmentation_to_rle(masks.encode(expected), 10, 15) == rle


def test_polygons_are_cut_at_the_border():
    rle = masks.polygons_to_rle([[-5, -4, 4, -4, 4, 3, -5, 3]], 10, 15)
    expected = np.zeros((10, 15), bool)
    expected[:3, :4] = True
    assert np.array_equal(masks.decode(rle), expected)


@pytest.mark.parametrize(
    "polygon", [[15, 1, 20, 1, 20, 5], [-5, 1, 0, 1, 0, 5], [1, 10, 5, 10, 5, 14], [1, -4, 5, -4, 5, 0]]
)
def test_of_a_polygon_that_touches_the_border_from_outside_nothing_is_left(polygon):
    assert masks.polygons_to_rle([polygon], 10, 15) == masks.empty_rle(10, 15)


@quick
@given(SIZES, st.lists(st.tuples(st.floats(-1, 2), st.floats(-1, 2)), min_size=3, max_size=8))
def test_any_admitted_polygon_becomes_a_canonical_code(size, points):
    height, width = size
    polygon = [[x * width, y * height] for x, y in points]
    try:
        rle = masks.polygons_to_rle([polygon], height, width)
    except ValueError as error:
        assert "outside" in str(error) or "beyond" in str(error)
        return
    assert masks.encode(masks.decode(rle)) == rle


@pytest.mark.parametrize(
    ("polygons", "reason"),
    [
        ([], "polygons: expected a list with at least one polygon"),
        (None, "polygons: expected a list with at least one polygon, got None"),
        ([[1, 1, 5, 5]], "polygons[0]: has 2 points"),
        ([[1, 1, 5, 1, 5, 5], []], "polygons[1]: has 0 points"),
        ([[1, 1, 5, 1, 5, 5, 3]], "polygons[0]: expected [x1, y1"),
        ([1, 1, 5, 1, 5, 5], "polygons[0]: expected [x1, y1"),
        ([[1, 1, 5, 1, 5, float("nan")]], "NaN"),
        ([[1, 1, 5, 1, 5, float("inf")]], "NaN or infinite"),
        ([["a", 1, 5, 1, 5, 5]], "polygons[0]: expected a list of numbers"),
        ([["1", "1", "5", "1", "5", "5"]], "polygons[0]: expected a list of numbers"),
        ([[1, 1, 5, 1, 5, 10**400]], "polygons[0]: expected a list of numbers"),
        ([[True, False, True, True, False, True]], "polygons[0]: expected a list of numbers"),
        ([[20, 1, 25, 1, 25, 5]], "lies outside the image"),
        ([[1, -9, 5, -9, 5, -2]], "lies outside the image"),
        ([[1, 1, 5e6, 1, 5, 5]], "far beyond the image"),
        ([[1, 1, 5, -50, 5, 5]], "far beyond the image"),
    ],
)
def test_malformed_polygons_are_named(polygons, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        masks.polygons_to_rle(polygons, 10, 15)
    with pytest.raises(ValueError, match=re.escape(reason)):
        masks.segmentation_to_rle(polygons, 10, 15, what="polygons")


@quick
@given(SIZES, st.data())
def test_whole_boxes_round_trip(size, data):
    height, width = size
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    rle = masks.box_to_rle([x1, y1, x2, y2], height, width)
    assert rle == masks.encode(mask)
    assert masks.bbox(rle) == (x1, y1, x2, y2)
    assert np.array_equal(masks.box_to_mask((x1, y1, x2, y2), height, width), mask)


@quick
@given(SIZES, st.data())
def test_fractional_boxes_hold_the_pixels_whose_centres_they_hold(size, data):
    height, width = size
    coordinate = st.floats(-3, 15, allow_nan=False)
    x1, x2 = sorted(data.draw(st.tuples(coordinate, coordinate)))
    y1, y2 = sorted(data.draw(st.tuples(coordinate, coordinate)))
    if x1 == x2 or y1 == y2 or x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        with pytest.raises(ValueError):
            masks.box_to_rle([x1, y1, x2, y2], height, width)
        return
    mask = masks.box_to_mask([x1, y1, x2, y2], height, width)
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    inside = np.outer((rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2))
    assert mask.any()
    if inside.any():
        assert np.array_equal(mask, inside)


@pytest.mark.parametrize("edge", [2.5, 3.0, 3.25])
def test_boxes_side_by_side_share_no_pixel_and_leave_none_out(edge):
    """A centre on the edge belongs to the box that begins there."""
    for left, right, both in (
        ([0.5, 1, edge, 4], [edge, 1, 5.5, 4], [0.5, 1, 5.5, 4]),
        ([1, 0.5, 4, edge], [1, edge, 4, 5.5], [1, 0.5, 4, 5.5]),
    ):
        halves = [masks.box_to_mask(box, 7, 7).astype(int) for box in (left, right)]
        assert np.array_equal(sum(halves), masks.box_to_mask(both, 7, 7))
    assert masks.bbox(masks.box_to_rle([1.5, 2.5, 3.5, 4.5], 7, 7)) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([1, 1, 5], "expected four numbers"),
        ("abcd", "expected four numbers"),
        (["1", "1", "4", "5"], "expected four numbers"),
        ([1, 1, 4, 10**400], "expected four numbers"),
        ([1, 1, float("nan"), 5], "NaN"),
        ([5, 1, 1, 5], "has no extent"),
        ([1, 5, 4, 5], "has no extent"),
        ([15, 1, 18, 5], "lies outside the image"),
        ([-4, 1, 0, 5], "lies outside the image"),
    ],
)
def test_malformed_boxes_are_named(box, reason):
    with pytest.raises(ValueError, match="^box 3: .*" + re.escape(reason)):
        masks.box_to_rle(box, 10, 15, what="box 3")
