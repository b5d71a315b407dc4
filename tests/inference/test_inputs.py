"""Whatever a picture is given as, the same pixels come out; what cannot be is said in plain words."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from instructsam.errors import DataError
from instructsam.inference.inputs import Job, make_jobs, name_of, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    image.save(path)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [path, str(path), png(image), bytearray(png(image)), image, PIXELS, PIXELS / 255, tensor, tensor / 255]
    forms += [
        PIXELS.astype(np.float32) / 255,
        tensor.double() / 255,
        (tensor / 255).half(),
        np.dstack([PIXELS, np.full((7, 9), 255, np.uint8)]),
    ]
    for form in forms:
        found = read_picture(form)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), PIXELS)


def test_grey_pictures():
    grey = PIXELS[..., 0]
    for form in (grey, grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(np.asarray(read_picture(form)), np.dstack([grey] * 3))
    np.testing.assert_array_equal(np.asarray(read_picture(grey > 99))[..., 0], np.where(grey > 99, 255, 0))


def test_an_array_is_left_alone():
    before = PIXELS.copy()
    picture = read_picture(PIXELS)
    picture.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(PIXELS, before)


def test_bytes_are_turned_upright():
    image, buffer = Image.fromarray(PIXELS), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "PNG", exif=exif)
    assert read_picture(buffer.getvalue()).size == (7, 9)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "nowhere.png: no such image file"),
        ("https://example.org/a.png", "https://example.org/a.png: nothing is downloaded here"),
        (b"words", "5 bytes that are no picture"),
        (b"", "0 bytes that are no picture"),
        (png(Image.fromarray(PIXELS))[:60], "cannot be read as an image"),
        (PIXELS.astype(np.int64), "array of int64: expected uint8 in 0…255 or floats in 0…1"),
        (PIXELS.astype(np.float64), "array of floats outside 0…1"),
        (np.full((4, 4), np.nan), "array of floats outside 0…1"),
        (PIXELS[None], "array of shape (1, 7, 9, 3): expected (H, W)"),
        (PIXELS[:0], "array of shape (0, 9, 3)"),
        (PIXELS[..., :2], "array of shape (7, 9, 2)"),
        (torch.zeros(7, 9, 3), "tensor of shape (7, 9, 3): expected (3, H, W) or (1, H, W)"),
        (torch.full((3, 4, 4), 2.0), "tensor of floats outside 0…1"),
        (3, "a picture cannot be a int"),
        (None, "a picture cannot be a NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_picture(source, message):
    with pytest.raises(DataError) as caught:
        read_picture(source)
    assert message in str(caught.value)


def test_names():
    assert name_of("folder/a.png", 3) == "a.png" and name_of(PIXELS, 3) == "image_3"


def test_jobs_of_one_picture():
    assert make_jobs(1, True, "a", None) == [Job(0, "a", None)]
    assert make_jobs(1, True, ["a", "b"], None) == [Job(0, "a", None), Job(0, "b", None)]
    assert make_jobs(1, True, None, ["x", "y"]) == [Job(0, "x and y", ("x", "y"))]
    assert make_jobs(1, True, None, "x") == [Job(0, "x", ("x",))]
    assert make_jobs(1, True, "a", ["x"]) == [Job(0, "a", ("x",))]
    assert make_jobs(1, True, None, [["x"], ["y", "z"]]) == [Job(0, "x", ("x",)), Job(0, "y and z", ("y", "z"))]


def test_jobs_of_several_pictures():
    assert make_jobs(2, False, "a", None) == [Job(0, "a", None), Job(1, "a", None)]
    assert make_jobs(2, False, ["a", "b"], None) == [Job(0, "a", None), Job(1, "b", None)]
    assert make_jobs(2, False, None, ["x", "y"]) == [Job(0, "x and y", ("x", "y")), Job(1, "x and y", ("x", "y"))]
    assert make_jobs(2, False, None, [["x"], ["y"]]) == [Job(0, "x", ("x",)), Job(1, "y", ("y",))]
    assert make_jobs(1, False, ["a"], None) == [Job(0, "a", None)]


@pytest.mark.parametrize(
    ("count", "single", "instruction", "phrases", "message"),
    [
        (1, True, None, None, "nothing is asked: give an instruction, phrases, or both"),
        (1, True, "  ", None, "the instruction is empty"),
        (1, True, 5, None, "the instruction is no text: 5"),
        (1, True, [], None, "the list of instructions is empty"),
        (1, True, None, 5, "phrases must be a list of words, got 5"),
        (1, True, None, [["x"], 5], "phrases 1 must be a list of words"),
        (1, True, ["a", ""], None, "instruction 1 is empty"),
        (1, True, ["a", 5], None, "instruction 1 is no text: 5"),
        (2, False, ["a", "b", "c"], None, "3 instructions for 2 pictures: give one, or one for each"),
        (1, False, ["a", "b"], None, "2 instructions for 1 pictures"),
        (2, False, None, [["x"], ["y"], ["z"]], "3 lists of phrases for 2 pictures"),
        (1, True, None, [], "phrases must be a list of words without an empty one"),
        (1, True, None, ["x", " "], "phrases must be a list of words without an empty one"),
        (1, True, None, [["x"], "y"], "phrases 1 must be a list of words"),
        (1, True, None, [["x"], []], "phrases 1 must be a list of words"),
    ],
)
def test_what_cannot_be_asked(count, single, instruction, phrases, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_jobs(count, single, instruction, phrases)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_tensors_have_one_or_three_channels(channels):
    with pytest.raises(DataError, match=r"expected \(3, H, W\) or \(1, H, W\)"):
        read_picture(torch.zeros(channels, 7, 9))
