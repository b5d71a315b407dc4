"""Pictures as a camera that is held turned, or mirrors, stores them: other pixels, and an EXIF tag that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

STORED = {  # EXIF orientation -> what a camera held that way has stored
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def save_turned(upright: Image.Image, path: Path, orientation: int, mode: str = "RGB") -> None:
    """Save an upright picture as a camera held that way does, in any of Pillow's modes."""
    turn = STORED[orientation]
    picture = upright if turn is None else upright.transpose(turn)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    picture.save(path, exif=exif_of(orientation))
