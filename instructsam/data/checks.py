"""What every reader does about bad entries: raise, or leave them out with a count (DESIGN section 16); small checks."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, TypeGuard

from instructsam import masks
from instructsam.errors import Consequence, DataError, at, kind_of

logger = logging.getLogger(__name__)

OnBad = Literal["raise", "skip"]
_LARGEST = sys.float_info.max
_LOGGED = 20
"""So many skipped entries are logged one by one; all of them are counted."""


@dataclass(frozen=True)
class Place:
    """Where an entry stands: a file or folder, and its place in it ("12" is a line, else as in "annotations[3]")."""

    file: Path | str
    index: str = ""

    def __str__(self) -> str:
        separator = "" if not self.index else ":" if self.index.isdigit() else ": "
        return f"{self.file}{separator}{self.index}"

    def within(self, index: str) -> Place:
        """A place inside of this one."""
        return Place(self.file, f"{self.index} {index}".strip())


@dataclass(frozen=True)
class Problem:
    """A bad entry, as a report lists it: kind of fault (`instructsam.errors.KINDS`), place and reason."""

    kind: str
    place: Place
    reason: str


@dataclass
class Skips:
    """What to do about bad entries: raise, or count and log them up to a limit.

    Args:
        on_bad: "raise" or "skip".
        max_bad: with "skip", more bad entries than this are an error; None for any number.
        report: with "skip", is handed every bad entry, which is then not logged. Entries that are lost only because
            another one is bad (`instructsam.errors.Consequence`) are counted, but neither logged nor handed over.

    Attributes:
        counts: bad entries by their sort.
        aside: sound entries that are left out because they cannot be used, by their sort. No limit counts them.

    Raises:
        ValueError: another ``on_bad``.
    """

    on_bad: OnBad = "raise"
    max_bad: int | None = None
    report: Callable[[Problem], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    aside: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad must be 'raise' or 'skip', got {self.on_bad!r}")

    def bad(self, what: str, place: Place, error: Exception) -> None:
        """One bad entry of the sort ``what`` ("images", "instructions"). Raises DataError as configured."""
        message = f"{place}: {error}"
        if self.on_bad == "raise":
            raise DataError(message, kind_of(error))
        self.counts[what] += 1
        total = self.counts.total()
        if isinstance(error, Consequence):
            pass
        elif self.report is not None:
            self.report(Problem(kind_of(error), place, str(error)))
        elif total <= _LOGGED:
            logger.warning("skipped: %s", message)
        if self.max_bad is not None and total > self.max_bad:
            raise DataError(f"{message}; that makes {total} bad entries, more than the {self.max_bad} allowed")

    @contextmanager
    def entry(self, what: str, place: Place) -> Iterator[None]:
        """A ValueError inside is that of a bad entry of the sort ``what`` at ``place``."""
        try:
            yield
        except ValueError as error:
            self.bad(what, place, error)

    def summarise(self, source: Path | str, left: str) -> None:
        """Log how many entries were left out and what is left, if any were."""
        if self.counts:
            summary = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
            logger.warning("%s: skipped %s; %s are left", source, summary, left)


def read_bytes(path: Path) -> bytes:
    """A file's contents. Raises ValueError, naming the file, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ValueError, naming the file, where it cannot be read or is not valid JSON."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except DataError as error:
        raise at(path, error) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises DataError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({error})", "json") from error


def is_id(value: Any) -> bool:
    """A number or a string, as ids are."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A number, NaN and infinite ones included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 1) -> TypeGuard[int]:
    """A whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_probability(value: Any) -> bool:
    """A number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite, and not beyond what a float holds."""
    return is_number(value) and -_LARGEST <= value <= _LARGEST


def is_size(value: Any) -> bool:
    """A positive number of pixels."""
    return is_whole(value)


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """Height and width of a picture. Raises DataError for what is no size, or more pixels than a mask can have."""
    for name, value in (("height", height), ("width", width)):
        if not is_size(value):
            raise DataError(f"{name} must be a positive number of pixels, got {short(value)}", "field")
    if height * width > masks.MAX_PIXELS:
        raise DataError(f"{short(height)}x{short(width)} pixels are more than a mask can have", "field")
    return height, width


def check_four(box: Any, what: str = "bbox") -> list[float]:
    """A box as a list of four numbers, whatever they are. Raises DataError for anything else."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise DataError(f"{what} must be four numbers, got {short(box)}", "box form")
    return box
