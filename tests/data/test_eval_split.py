"""What readers of benchmarks share: forms of masks, sizes, ids, pictures that are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instructsam import masks
from instructsam.data.checks import Place, Skips
from instructsam.data.eval_split import Collector, MissingImage, as_phrase, instance_rles, turn_of, union_rles

HEIGHT, WIDTH = 12, 20
A = np.zeros((HEIGHT, WIDTH), dtype=bool)
A[2:6, 3:8] = True
B = np.zeros((HEIGHT, WIDTH), dtype=bool)
B[7:11, 10:19] = True
HERE, THERE = Place("here"), Place("there")
RLE_A, RLE_B = dict(masks.encode(A)), dict(masks.encode(B))
POLYGON_A = [3, 2, 8, 2, 8, 6, 3, 6]
POLYGON_B = [10, 7, 19, 7, 19, 11, 10, 11]
LIST_A = {"size": [HEIGHT, WIDTH], "counts": [3 * 12 + 2, *([4, 8] * 4), 4, 240 - 38 - 4 * 12 - 4]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ([], []),
        (RLE_A, [A]),
        (LIST_A, [A]),
        ([RLE_A], [A]),
        ([RLE_A, RLE_B], [A, B]),
        (POLYGON_A, [A]),
        ([POLYGON_A], [A]),
        ([POLYGON_A, POLYGON_B], [A | B]),
        ([[POLYGON_A]], [A]),
        ([[POLYGON_A], [POLYGON_B]], [A, B]),
        ([[POLYGON_A, POLYGON_B]], [A | B]),
        ([RLE_B, [POLYGON_A]], [B, A]),
    ],
)
def test_every_form_of_masks(value, expected):
    rles = instance_rles(value, HEIGHT, WIDTH)
    assert len(rles) == len(expected)
    np.testing.assert_array_equal(masks.decode_batch(rles, HEIGHT, WIDTH), np.reshape(expected, (-1, HEIGHT, WIDTH)))
    joined = union_rles(value, HEIGHT, WIDTH)
    assert len(joined) == min(1, len(expected))
    if expected:
        np.testing.assert_array_equal(masks.decode(joined[0]), np.any(expected, axis=0))


def test_masks_without_a_pixel_are_no_target_only_where_a_format_has_it_so():
    empty = dict(masks.empty_rle(HEIGHT, WIDTH))
    for value in (empty, [empty, empty]):
        assert instance_rles(value, HEIGHT, WIDTH, empty_is_none=True) == []
        assert union_rles(value, HEIGHT, WIDTH, empty_is_none=True) == []
        for read in (instance_rles, union_rles):
            with pytest.raises(ValueError, match=r"mask\[0\]: the mask is empty"):
                read(value, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("garbage", "mask: expected an RLE, polygons"),
        (7, "mask: expected an RLE, polygons"),
        ({"size": [HEIGHT, WIDTH]}, "mask: has no counts"),
        ({"size": [WIDTH, HEIGHT], "counts": RLE_A["counts"]}, "size is 20x12 .*expected 12x20"),
        ({"size": [HEIGHT, WIDTH], "counts": RLE_A["counts"][:-1]}, "mask: counts"),
        ([RLE_A, {"size": [HEIGHT, WIDTH], "counts": [1]}], r"mask\[1\]: counts sum to 1"),
        ([RLE_A, None], r"mask\[1\]: expected a list"),
        ([RLE_A, []], r"mask\[1\]: expected a list with at least one polygon"),
        ([RLE_A, dict(masks.empty_rle(HEIGHT, WIDTH))], r"mask\[1\]: the mask is empty"),
        ([[1, 1, 2, 2]], r"mask\[0\]: has 2 points"),
        ([[]], r"mask\[0\]: has 0 points"),
        ([[[3, 2], [8, 2], [8, 6]]], r"mask\[0\]\[0\]: has 1 points"),
        ([[30, 1, 35, 1, 35, 8]], "outside the image"),
        ([1, 2, float("nan"), 4, 5, 6], "mask"),
        ([True, False], "mask"),
    ],
)
def test_bad_masks_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        instance_rles(value, HEIGHT, WIDTH)


def test_phrases_are_expressions_without_capital_and_period():
    assert [as_phrase(text) for text in ("The left cup.", " a cup ", "U.S. flag", "", "A")] == [
        "the left cup",
        "a cup",
        "u.S. flag",
        "",
        "a",
    ]


def collector(root: Path, on_bad="raise", max_bad=None) -> Collector:
    return Collector("set", "val", root / "file.json", root, Skips(on_bad, max_bad))


def picture(path: Path, orientation: int | None = None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)


def test_sizes_come_from_the_record_then_the_masks_then_the_picture(tmp_path):
    picture(tmp_path / "a.jpg")
    gathers = collector(tmp_path)
    assert gathers.size_of("no.jpg", {"height": 3, "width": 4}, RLE_A) == (3, 4)
    assert gathers.size_of("no.jpg", {}, None, [RLE_A]) == (HEIGHT, WIDTH)
    assert gathers.size_of("a.jpg", {}, [POLYGON_A]) == (HEIGHT, WIDTH)
    with pytest.raises(MissingImage):
        gathers.size_of("no.jpg", {}, [POLYGON_A])
    with pytest.raises(ValueError, match=r"width must be a positive number of pixels, got None"):
        gathers.size_of("a.jpg", {"height": 3})
    with pytest.raises(ValueError, match=r"height must be a positive number of pixels, got '3'"):
        gathers.size_of("a.jpg", {"height": "3", "width": 4})
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be opened"):
        gathers.size_of("b.jpg", {})


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_sizes_are_those_of_the_upright_picture(tmp_path, orientation, turned):
    picture(tmp_path / "a.jpg", orientation)
    size = collector(tmp_path).size_of("a.jpg", {})
    assert size == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))


def test_instructions_are_gathered_by_picture_under_unique_ids(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.jpg")
    gathers = collector(tmp_path)
    for identity, image in (("1", "a.jpg"), ("2", "b.jpg"), ("3", "a.jpg")):
        gathers.add(HERE, image, (HEIGHT, WIDTH), turn_of(identity, f" text {identity} ", []))
    with pytest.raises(ValueError, match="id '3' is that of here too"):
        gathers.add(THERE, "b.jpg", (HEIGHT, WIDTH), turn_of("3", "again", []))
    with pytest.raises(ValueError, match="image a.jpg is 20x12 .* here, 12x20 before"):
        gathers.add(THERE, "a.jpg", (WIDTH, HEIGHT), turn_of("4", "other size", []))
    with pytest.raises(ValueError, match="the instruction is empty"):
        gathers.add(THERE, "a.jpg", (HEIGHT, WIDTH), turn_of("4", " \n", []))
    samples = gathers.finish().samples
    assert [[(turn.id, turn.instruction) for turn in sample.turns] for sample in samples] == [
        [("set/val/1", "text 1"), ("set/val/3", "text 3")],
        [("set/val/2", "text 2")],
    ]


def test_a_picture_that_had_to_be_opened_is_named_with_the_other_missing_ones(tmp_path):
    picture(tmp_path / "a.jpg")

    def gathered(**options) -> Collector:
        gathers = collector(tmp_path, **options)
        for number, (image, given) in enumerate([("a.jpg", {}), ("b.jpg", {"height": 12, "width": 20}), ("c.jpg", {})]):
            with gathers.entry(f"[{number}]"):
                size = gathers.size_of(image, given)
                gathers.add(f"[{number}]", image, size, turn_of(number, "text", []), masks.encode(A))
        return gathers

    with pytest.raises(ValueError, match=r"file\.json: 2 of 3 pictures are not in .*: b\.jpg, c\.jpg$"):
        gathered().finish()
    read = gathered(on_bad="skip").finish()
    assert [sample.image.name for sample in read.samples] == ["a.jpg"]
    assert read.skipped == {"images": 2, "instructions": 2} and list(read.ignore_rles) == ["set/val/0"]
    with pytest.raises(ValueError, match="more than the 1 allowed"):
        gathered(on_bad="skip", max_bad=1).finish()


def test_many_missing_pictures_are_counted_and_some_named(tmp_path):
    gathers = collector(tmp_path)
    for number in range(30):
        gathers.add(HERE, f"{number}.jpg", (3, 4), turn_of(number, "text", []))
    with pytest.raises(ValueError, match=r"30 of 30 pictures are not in .*: 0\.jpg, .* 9\.jpg, \.\.\.$"):
        gathers.finish()


def test_nothing_to_ask_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no usable instruction for set/val"):
        collector(tmp_path, "skip").finish()


def test_another_policy_is_refused():
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'ignore'"):
        Skips("ignore", None)  # type: ignore[arg-type]


def test_the_masks_survive_json():
    assert json.loads(json.dumps(instance_rles([RLE_A], HEIGHT, WIDTH))) == [RLE_A]
