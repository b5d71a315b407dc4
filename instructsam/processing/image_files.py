"""Reading image files: any that Pillow knows, whole, upright and in RGB.

Needs no torch, so that processes which only look whether images are sound start at once.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from instructsam.errors import DataError

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image"

MAX_ASPECT_RATIO = 200  # Qwen-VL's processors refuse thinner images

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's decoders are known to raise for broken files."""


def load_image(source: ImageSource) -> Image.Image:
    """Read an image completely and return it upright in RGB.

    The EXIF orientation is applied and its tag removed, so that loading the result again changes nothing. Transparent
    pixels become white (as in Qwen-VL's own utilities), 16-bit grey is scaled to 8 bit, of an animation the first
    frame is taken. A Pillow image that is passed in is left as it was.

    Raises:
        DataError: naming the file and the reason: "image missing", or "image broken" if it is truncated or nothing that
            can be shown as RGB.
    """
    if isinstance(source, Image.Image):
        name = f"image in memory (mode {source.mode}, {source.width}x{source.height})"
    else:
        name = os.fspath(source)
        if not os.path.isfile(name):
            raise DataError(f"{name}: no such image file", "image missing")
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        with Image.open(name) as image:
            return _upright_rgb(image)
    except Image.UnidentifiedImageError:
        message = f"{name}: not an image, broken at its start, or of a format Pillow does not know"
        raise DataError(message, "image broken") from None
    except READ_ERRORS as error:
        message = f"{name}: cannot be read as an image, broken or truncated? ({error})"
        raise DataError(message, "image broken") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # Image.open reads the header only: this is where truncated files show
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range, convert them to 8 bit first")
    if image.mode.startswith("I"):  # 16-bit grey, which older Pillow versions read as 32-bit integers
        grey = np.asarray(image).astype(np.int64) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
