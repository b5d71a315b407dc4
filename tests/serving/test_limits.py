"""What may be sent: formats, sizes, texts, thresholds."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from instructsam.errors import DataError
from instructsam.serving.limits import FORMATS, Limits, TooLarge
from instructsam.structures import DEFAULT_THRESHOLD


def written(format: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A header that announces so many pixels, and none of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_are_taken(format):
    picture = Limits().picture(written(format))
    assert (picture.mode, picture.size) == ("RGB", (48, 32))


def test_a_phones_file_of_several_pictures():
    content = written("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert Limits().picture(content).size == (48, 32)


@pytest.mark.parametrize("format", ["ICO", "ICNS", "EPS", "PPM", "TGA", "JPEG2000"])
def test_formats_that_are_not_taken(format):
    """Some of them decode at opening, before the size is known, and EPS runs another program."""
    if format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow was built without it")
    content = written(format)
    assert Image.open(io.BytesIO(content)).format == format
    with pytest.raises(DataError, match=rf"{len(content)} bytes that are no picture in PNG, JPEG, .* or GIF"):
        Limits().picture(content)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_cut_short(format):
    content = written(format)
    with pytest.raises(DataError):
        Limits().picture(content[: len(content) // 2])


def test_pictures_are_upright_and_opaque():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert Limits().picture(written("JPEG", exif=exif)).size == (32, 48)
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "PNG")
    assert Limits().picture(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (30_000, 30_000, "the picture has more than 40,000,000 pixels"),  # Pillow does not even open it
        (8_000, 6_000, "8000 x 6000 pixels, more than 40,000,000"),
    ],
)
def test_pictures_with_too_many_pixels(width, height, message):
    with pytest.raises(TooLarge, match=message):
        Limits().picture(png_of_size(width, height))


def test_our_bound_is_the_one_that_counts():
    """Were it above Pillow's, a picture within it would be refused."""
    most = 2 * Image.MAX_IMAGE_PIXELS
    assert Limits(pixels=most).pixels == most
    with pytest.raises(ValueError, match=f"pixels={most + 1}: at most 178,956,970, Pillow opens no picture"):
        Limits(pixels=most + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "seconds=0: must be greater than 0"),
        ({"seconds": float("nan")}, "seconds=nan: must be greater than 0"),
        ({"pixels": 1000, "waiting_pixels": 999}, "waiting_pixels=999: less than one picture may have, 1000"),
        ({"least_threshold": -0.1}, "least_threshold=-0.1: must be between 0 and 0.3"),
        ({"least_threshold": 0.4}, "least_threshold=0.4: must be between 0 and 0.3, which is used where"),
    ],
)
def test_limits_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Limits(**settings)


def test_pictures_of_exactly_the_limits():
    content = written("PNG")
    for limits in (Limits(upload_bytes=len(content)), Limits(pixels=48 * 32, waiting_pixels=48 * 32)):
        assert limits.picture(content).size == (48, 32)
    for limits in (Limits(upload_bytes=len(content) - 1), Limits(pixels=48 * 32 - 1)):
        with pytest.raises(TooLarge):
            limits.picture(content)


def test_texts_of_exactly_the_limits():
    """Counted without the blanks around them; each text for itself."""
    texts = Limits(text=5, phrases=2).texts
    assert texts("abcde", []) == texts(" abcde\n", []) == ("abcde", None)
    assert texts("abcde", ["fghij", " klmno "]) == ("abcde", ("fghij", "klmno"))
    assert texts(None, ["fghij"]) == ("fghij", ("fghij",))
    for instruction, phrases in [
        ("abcdef", []),
        ("abcdef", ["a"]),
        (None, ["abcdef"]),
        ("a", ["a", "abcdef"]),
        ("a", ["a", "b", "c"]),
        (None, ["a", "a", "a"]),
    ]:
        with pytest.raises(ValueError):
            texts(instruction, phrases)


def test_the_least_threshold():
    Limits(least_threshold=0.1).check_threshold(0.1)
    with pytest.raises(ValueError, match=r"threshold=0.09: must be at least 0.1 here"):
        Limits(least_threshold=0.1).check_threshold(0.09)
    with pytest.raises(ValueError):
        Limits(least_threshold=0.1).check_threshold(math.nextafter(0.1, 0))
    Limits(least_threshold=DEFAULT_THRESHOLD).check_threshold(DEFAULT_THRESHOLD)
    Limits(least_threshold=0).check_threshold(0.0)
