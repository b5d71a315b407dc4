"""Large JSON files item by item: the memory in use is that of a few items, however long the file is.

    {"images": [{...}, ...], "annotations": [{...}, ...], "info": {...}}        items of several lists, by key
    [{...}, {...}, ...]                                                        items of one list

The text is read in a window that slides over the file and grows, twofold each time, while an item does not fit in it.
NaN and Infinity are read as Python's json module reads them; what they mean is judged by who asked for the item.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from instructsam.data.checks import Place
from instructsam.errors import DataError, at

ENCODINGS = ("utf-8", "cp1252")
_BLANKS = re.compile(r"[ \t\n\r]*")
_CUT = 16
"""An error so close to the window's end may come from the text being cut there: '-Infinit', 'tru', '\\u12'."""
_NUMBER_CUT = 4
"""So close to the window's end, a number may be the beginning of a longer one: '1', '1.', '1e+'."""


def stream_json(
    path: Path | str, encoding: str = "utf-8", chunk_bytes: int = 2**20, max_item: int = 2**28
) -> Iterator[tuple[str, int, Any]]:
    """The items of a JSON file one after another, as (key, index, item).

    A list on top has the key "". Of an object on top, each list is gone through by itself, in the order of the file,
    and any other value comes as (key, -1, value).

    Args:
        encoding: "utf-8" (a byte order mark may come first) or "cp1252".
        chunk_bytes: bytes read at once, more where an item is longer.
        max_item: characters that an item may have; longer ones are an error, so that memory stays bounded.

    Raises:
        DataError: of kind "json", naming file, item and byte, where the file is malformed, ends too early, holds bytes
            of another encoding, an item that is too long or a key that occurs twice. What stands after the fault
            cannot be read; all items before it have been handed out.
        ValueError: no such encoding; the file cannot be opened.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding={encoding!r} is none of {', '.join(ENCODINGS)}")
    try:
        with open(path, "rb") as file:
            yield from _Window(path, file, encoding, chunk_bytes, max_item).items()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def stream_records(path: Path | str, encoding: str = "utf-8") -> Iterator[tuple[int, Any]]:
    """The items of a JSON file that is one list, as (index, item).

    Raises:
        DataError: of kind "field" for an object in place of the list; else as `stream_json`.
        ValueError: as there.
    """
    for key, index, record in stream_json(path, encoding):
        if key or index < 0:
            raise DataError(f"{path}: expected a list of records, got an object with the key {key!r}", "field")
        yield index, record


def stream_json_lines(path: Path | str, max_line: int = 2**28) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON-lines file that are not blank, as (number from 1, bytes without blanks around them).

    Raises:
        DataError: of kind "json" for a line of more than ``max_line`` bytes.
        ValueError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(max_line + 1):
                number += 1
                if len(line) > max_line:
                    raise at(Place(path, str(number)), DataError(f"is longer than {max_line} bytes", "json"))
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


class _Window:
    """A part of the file as text, and how far it has been understood (``pos``)."""

    def __init__(self, path: Path | str, file: BinaryIO, encoding: str, chunk_bytes: int, max_item: int):
        self.path, self.file, self.encoding = path, file, encoding
        self.chunk_bytes, self.max_item = max(chunk_bytes, 1), max_item
        self.text, self.pos = "", 0
        self.key, self.index = "", -1  # of the item being read, for messages
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._raw_decode = json.JSONDecoder().raw_decode
        self._fault: DataError | None = None  # bytes that are no text; raised once all that is before them is read
        self._ended = False
        head = file.read(len(codecs.BOM_UTF8))
        self._start = self._read = 0  # bytes of the file before the window's text, and all that were read
        if head == codecs.BOM_UTF8:
            self._start = self._read = len(head)
        else:
            self._take(head)

    # ---- text ---------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Put bytes behind the window's text."""
        pending = len(self._decoder.getstate()[0])  # first bytes of a character whose rest was not there yet
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode(self.encoding)
            hint = " (encoding: cp1252, if that is what it is)" if self.encoding == "utf-8" else ""
            byte = self._read - pending + error.start
            self._fault = self._error(f"is not {self.encoding} at byte {byte}: {error.reason}{hint}")
        self._read += len(data)
        self._ended = not data

    def more(self) -> bool:
        """Read on, letting go of what is understood; False at the end of the file."""
        if self._fault is not None:
            raise at(self._place(), self._fault)
        if self._ended:
            return False
        left = len(self.text) - self.pos
        if left > self.max_item:
            raise self.error(f"is longer than {self.max_item} characters")
        self._start = self._byte(self.pos)
        self.text, self.pos = self.text[self.pos :], 0
        # As much again as there is: a long item is then read a few times, not once for every chunk of it.
        self._take(self.file.read(max(self.chunk_bytes, left)))
        return True

    def _byte(self, pos: int) -> int:
        """The place in the file of a place in the text."""
        return self._start + (pos if self.text.isascii() else len(self.text[:pos].encode(self.encoding)))

    # ---- faults -------------------------------------------------------------------------------------------------

    def _place(self) -> Place:
        return Place(self.path, self.key + (f"[{self.index}]" if self.index >= 0 else ""))

    @staticmethod
    def _error(reason: str) -> DataError:
        return DataError(f"{reason}; nothing from there on can be read", "json")

    def error(self, reason: str, pos: int | None = None) -> DataError:
        """The fault at a place in the text (by default where the window is)."""
        return at(self._place(), self._error(f"at byte {self._byte(self.pos if pos is None else pos)}: {reason}"))

    # ---- JSON ---------------------------------------------------------------------------------------------------

    def peek(self) -> str:
        """Go to the next character that is no blank; "" at the end of the file."""
        if (found := self.text[self.pos : self.pos + 1]) > " ":  # the usual case, and the fast one
            return found
        while True:
            self.pos = _BLANKS.match(self.text, self.pos).end()  # type: ignore[union-attr]  # matches anything
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self.more():
                return ""

    def expect(self, wanted: str) -> str:
        """Go past the next character, which is one of ``wanted``."""
        found = self.peek()
        if not found or found not in wanted:
            named = " or ".join(map(repr, wanted))
            raise self.error(
                f"expected {named}, got {found!r}" if found else f"the file ends where {named} is expected"
            )
        self.pos += 1
        return found

    def value(self) -> Any:
        """The value that begins at the next character."""
        self.peek()
        while True:
            try:
                value, end = self._raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _CUT
                if cut and self.more():
                    continue
                ends = ", the file ends there" if cut else ""
                raise self.error(f"is not valid JSON ({error.msg}{ends})", error.pos) from None
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets within brackets
                raise self.error(f"cannot be read ({error})") from None
            if end > len(self.text) - _NUMBER_CUT and self._may_go_on(value, end) and self.more():
                continue
            if end - self.pos > self.max_item:
                raise self.error(f"is longer than {self.max_item} characters")
            self.pos = end
            return value

    def _may_go_on(self, value: Any, end: int) -> bool:
        """Whether a value that was read near the window's end may be the beginning of a longer number."""
        return isinstance(value, int | float) and self.text[end : end + 1] in ("", ".", "e", "E")

    def items(self) -> Iterator[tuple[str, int, Any]]:
        """All items of the file."""
        if self.expect("[{") == "[":
            yield from self._list("")
        else:
            yield from self._object()
        self.key, self.index = "", -1
        if found := self.peek():
            raise self.error(f"the value ends here, but {found!r} follows")

    def _list(self, key: str) -> Iterator[tuple[str, int, Any]]:
        """The items of a list whose bracket is open."""
        self.key, self.index = key, 0
        if self.peek() == "]":
            self.pos += 1
            return
        while True:
            yield key, self.index, self.value()
            if self.expect(",]") == "]":
                return
            self.index += 1

    def _object(self) -> Iterator[tuple[str, int, Any]]:
        """The members of an object whose bracket is open."""
        seen: set[str] = set()
        more = self.peek() != "}"
        if not more:
            self.pos += 1
        while more:
            self.key, self.index = "", -1
            if self.peek() != '"':
                raise self.error("expected a key in quotation marks")
            key = self.value()
            if key in seen:
                raise self.error(f"the key {key!r} occurs a second time")
            seen.add(key)
            self.key = key
            self.expect(":")
            if self.peek() == "[":
                self.pos += 1
                yield from self._list(key)
            else:
                yield key, -1, self.value()
            more = self.expect(",}") == ","
