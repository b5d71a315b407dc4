"""What can be wrong with a record of a data set: one exception, and a name for every kind of fault.

Readers raise it, `instructsam.data.checks.Skips` counts it, `python -m instructsam.validate` reports it by kind.
"""

from __future__ import annotations

from typing import Any

KINDS: dict[str, str] = {
    "json": "is not valid JSON, or not readable as text",
    "field": "a field is missing or of another type",
    "text": "an instruction or a phrase is empty, or holds a reserved token",
    "duplicate": "an id, or an entry of a list of ids, occurs twice",
    "reference": "names an image, annotation or category that is not there",
    "annotation type": "is of a type that the format does not know",
    "markup": "phrases marked in the text and masks do not fit together",
    "image missing": "the picture is not there",
    "image broken": "the picture cannot be read, or only in part",
    "image size": "the picture is not as large as the record says (EXIF orientation counts)",
    "rle form": "is no run-length code: not an object with size and counts, or of other types",
    "rle characters": "compressed counts hold a character that the code does not know",
    "rle truncated": "compressed counts end within a number",
    "rle overrun": "counts sum to more pixels than the mask has",
    "rle short": "counts sum to fewer pixels than the mask has",
    "mask size": "the mask is not as large as the picture",
    "mask empty": "the mask has no pixel",
    "polygon form": "is no list of polygons, or coordinates are no pairs of numbers",
    "polygon points": "a polygon has fewer than three points",
    "polygon nan": "a coordinate of a polygon is NaN or infinite",
    "polygon outside": "a polygon lies outside the picture, or reaches far beyond it",
    "box form": "a box is not four numbers",
    "box nan": "a coordinate of a box is NaN or infinite",
    "box extent": "a box has no width or no height",
    "box outside": "a box lies outside the picture",
    "too many instances": "a phrase has more instances than the model has queries",
    "too many phrases": "a sample has more phrases or instances than the limits allow",
    "too long": "the sample does not fit the longest sequence",
    "leakage": "pictures cannot be told from those of validation and test splits",
    "other": "anything else",
}


class DataError(ValueError):
    """A record that cannot be used.

    Attributes:
        kind: a key of `KINDS`.
    """

    def __init__(self, message: str, kind: str = "other"):
        assert kind in KINDS, f"unknown kind of data error: {kind}"
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:  # so that it comes back whole from another process
        return type(self), (str(self), self.kind)


class Consequence(DataError):
    """A record that is lost only because another one is bad, which has been reported. It is counted, not reported."""


def kind_of(error: Any) -> str:
    """The kind of fault that an exception stands for; "other" where it does not say."""
    return getattr(error, "kind", "other")


def at(place: object, error: Exception) -> DataError:
    """The same fault with its place before the message."""
    return DataError(f"{place}: {error}", kind_of(error))
