"""What a user may give for a picture, and for what is asked about it, brought to one form."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from instructsam.errors import DataError
from instructsam.processing.chat import ChatTurn
from instructsam.processing.image_files import READ_ERRORS, load_image
from instructsam.words import are_phrases, asked_by, fault_of

ADDRESSES = ("http://", "https://", "ftp://", "s3://", "gs://", "data:")


def read_picture(source: Any) -> Image.Image:
    """A picture in RGB, upright.

    Args:
        source: path, bytes of an image file, PIL image; numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); torch
            tensor (3, H, W) or (1, H, W). Arrays and tensors hold uint8 in 0…255, or floats in 0…1.

    Raises:
        DataError: no such file, bytes that are no picture, an array of another shape, type or range; says which.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return load_image(open_bytes(bytes(source)))
    if isinstance(source, str) and source.lower().startswith(ADDRESSES):
        raise DataError(f"{source[:80]}: nothing is downloaded here, give a file or its bytes", "image missing")
    if isinstance(source, (str, os.PathLike, Image.Image)):
        return load_image(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if hasattr(source, "detach") and hasattr(source, "ndim"):  # a tensor, without importing torch here
        if source.ndim != 3 or source.shape[0] not in (1, 3):
            raise DataError(f"tensor of shape {tuple(source.shape)}: expected (3, H, W) or (1, H, W)", "image broken")
        pixels = source.detach().cpu()
        pixels = pixels.float() if pixels.is_floating_point() else pixels  # numpy knows no bfloat16
        return _from_array(pixels.numpy().transpose(1, 2, 0), "tensor")
    raise DataError(
        f"a picture cannot be a {type(source).__name__}: give a path, bytes, a PIL image, a numpy array or a tensor",
        "image broken",
    )


def check_source(source: Any) -> None:
    """Raise DataError for a path without a file, so that it is found before others are answered."""
    if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
        read_picture(source)  # says why


def open_bytes(content: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The picture in the bytes of a file, of which only the header has been read.

    Args:
        formats: those that it may have, by Pillow's names; None = whatever Pillow knows.

    Raises:
        DataError: no such picture.
    """
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except Image.UnidentifiedImageError:
        known = "a format Pillow knows" if formats is None else f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise DataError(f"{len(content)} bytes that are no picture in {known}", "image broken") from None
    except READ_ERRORS as error:
        raise DataError(f"{len(content)} bytes: cannot be read as an image ({error})", "image broken") from error


def _from_array(array: np.ndarray, what: str) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (3, 4)) or not array.size:
        raise DataError(f"{what} of shape {shape}: expected (H, W), (H, W, 3) or (H, W, 4)", "image broken")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            message = f"{what} of floats outside 0…1 (or not finite): scale them, or convert them to uint8"
            raise DataError(message, "image broken")
        array = np.rint(array * 255)
    elif array.dtype == bool:
        array = array * 255
    elif array.dtype != np.uint8:
        raise DataError(f"{what} of {array.dtype}: expected uint8 in 0…255 or floats in 0…1", "image broken")
    return load_image(Image.fromarray(np.ascontiguousarray(array.astype(np.uint8))))


def name_of(source: Any, index: int) -> str:
    """What exports call a picture: its file name, or ``image_0``."""
    return os.path.basename(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"image_{index}"


@dataclass(frozen=True)
class Job:
    """One question: the index of its picture, an instruction, and the phrases of its answer or None."""

    image: int
    instruction: str
    phrases: tuple[str, ...] | None

    @property
    def turns(self) -> list[ChatTurn]:
        """The conversation that it is."""
        return [ChatTurn(self.instruction, self.phrases)]


def make_jobs(num_images: int, single: bool, instruction: Any, phrases: Any) -> list[Job]:
    """The jobs of one call.

    Args:
        num_images: number of pictures; single: whether they were given as one, not as a list.
        instruction: one for all pictures, or a list: one for each picture, or several about a single one.
        phrases: a list of words for all jobs, or a list of such lists, one for each job.

    Raises:
        ValueError: nothing asked, something empty or no text, lists of different lengths; says which.
    """
    if instruction is None and phrases is None:
        raise ValueError("nothing is asked: give an instruction, phrases, or both")
    words = _phrase_lists(phrases)
    asked = list(instruction) if isinstance(instruction, (list, tuple)) else [instruction]
    if not asked:
        raise ValueError("the list of instructions is empty")
    for index, text in enumerate(asked):
        if text is not None and (fault := fault_of(text)):
            raise ValueError(f"{f'instruction {index}' if len(asked) > 1 else 'the instruction'} {fault}")
    count = max(len(asked), len(words)) if single else num_images
    for name, values in (("instructions", asked), ("lists of phrases", words)):
        if len(values) not in (1, count):
            about = "1 picture" if single else f"{num_images} pictures"
            raise ValueError(f"{len(values)} {name} for {about}: give one, or one for each")
    jobs = []
    for k in range(count):
        said, text = words[k % len(words)], asked[k % len(asked)]
        jobs.append(Job(0 if single else k, asked_by(text, said), said))
    return jobs


def _phrase_lists(phrases: Any) -> list[tuple[str, ...] | None]:
    if phrases is None:
        return [None]
    if isinstance(phrases, str):
        phrases = [phrases]
    if not isinstance(phrases, (list, tuple)):
        raise ValueError(f"phrases must be a list of words, got {phrases!r}")
    lists: Sequence[Any] = list(phrases)
    if not lists or all(isinstance(phrase, str) for phrase in lists):
        lists = [lists]
    for index, group in enumerate(lists):
        where = f"phrases {index}" if len(lists) > 1 else "phrases"
        if not are_phrases(group):
            raise ValueError(f"{where} must be a list of words without an empty one, got {group!r}")
    return [tuple(group) for group in lists]
