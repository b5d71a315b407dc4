"""What a request may bring, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from instructsam.errors import DataError
from instructsam.inference.inputs import open_bytes
from instructsam.processing.image_files import load_image
from instructsam.structures import DEFAULT_THRESHOLD
from instructsam.words import asked_by

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Of pictures (Pillow reads MPO as JPEG). Some others decode, or run a program, as soon as a file is opened."""


class TooLarge(ValueError):
    """A picture beyond the limits."""


@dataclass(frozen=True)
class Limits:
    """Limits of a service or a page.

    Attributes:
        upload_bytes, pixels: of a picture.
        waiting_pixels: of all pictures together that wait to be asked about (3 bytes each).
        text: characters of an instruction or a phrase; phrases: of an answer that is given.
        seconds: that a question may take, waiting included.
        least_threshold: that a request may ask for: every instance costs work and a mask in the answer.

    Raises:
        ValueError: one that is not greater than 0, a picture that Pillow refuses or that may never wait, a least
            threshold that the default does not reach.
    """

    upload_bytes: int = 20 * 2**20
    pixels: int = 40_000_000
    waiting_pixels: int = 400_000_000
    text: int = 1000
    phrases: int = 10
    seconds: float = 60.0
    least_threshold: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "least_threshold" and not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be greater than 0")
        if not 0 <= self.least_threshold <= DEFAULT_THRESHOLD:
            message = f"must be between 0 and {DEFAULT_THRESHOLD}, which is used where a request names none"
            raise ValueError(f"least_threshold={self.least_threshold}: {message}")
        if Image.MAX_IMAGE_PIXELS is not None and self.pixels > 2 * Image.MAX_IMAGE_PIXELS:
            most = f"{2 * Image.MAX_IMAGE_PIXELS:,}"
            raise ValueError(f"pixels={self.pixels}: at most {most}, Pillow opens no picture that has more")
        if self.waiting_pixels < self.pixels:
            raise ValueError(f"waiting_pixels={self.waiting_pixels}: less than one picture may have, {self.pixels}")

    def opened(self, content: bytes) -> Image.Image:
        """The picture in the bytes of a file, of which only the header has been read.

        Raises:
            TooLarge: more bytes or pixels than allowed.
            DataError: no picture in one of `FORMATS`.
        """
        if len(content) > self.upload_bytes:
            raise TooLarge(f"the file has {len(content):,} bytes, more than {self.upload_bytes:,}")
        if not content:
            raise DataError("the file is empty", "image broken")
        try:
            image = open_bytes(content, FORMATS)
        except DataError as error:
            if isinstance(error.__cause__, Image.DecompressionBombError):  # Pillow's limit, which ours does not exceed
                raise TooLarge(f"the picture has more than {self.pixels:,} pixels") from None
            raise
        if image.width * image.height > self.pixels:
            raise TooLarge(f"the picture has {image.width} x {image.height} pixels, more than {self.pixels:,}")
        return image

    def picture(self, content: bytes) -> Image.Image:
        """The picture in the bytes of a file, in RGB and upright. Raises as `opened`, and DataError if it is broken."""
        return load_image(self.opened(content))

    def texts(self, instruction: str | None, phrases: list[str]) -> tuple[str, tuple[str, ...] | None]:
        """Instruction and phrases as a question takes them.

        Raises:
            ValueError: nothing asked, an empty text, one that is too long, too many phrases.
        """
        instruction = (instruction or "").strip()
        said = tuple(phrase.strip() for phrase in phrases)
        if not instruction and not said:
            raise ValueError("nothing is asked: give an instruction or phrases")
        if not all(said):
            raise ValueError("a phrase is empty")
        if len(said) > self.phrases:
            raise ValueError(f"{len(said)} phrases, more than {self.phrases}")
        for text in (instruction, *said):
            if len(text) > self.text:
                raise ValueError(f"a text has {len(text)} characters, more than {self.text}")
        return asked_by(instruction, said), said or None

    def check_threshold(self, threshold: float) -> None:
        """Raise ValueError for one that is lower than allowed."""
        if threshold < self.least_threshold:
            raise ValueError(f"threshold={threshold:g}: must be at least {self.least_threshold:g} here")


def number(values: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A number of a form; its default where it is missing or empty. Raises ValueError for anything else."""
    text = values.get(name)
    if text is None or text == "":
        return default
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={text!r}: must be a number") from None
