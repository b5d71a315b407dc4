"""Pickles of data sets, read without running what they hold: plain containers and values only (DESIGN section 16).

A pickle is a program that may call anything by name. The refs of the RefCOCO family need no names at all (lists, dicts,
strings and numbers have instructions of their own), so every name but those of harmless containers is refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from instructsam.data.checks import read_bytes

_ADMITTED = {
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),  # Python 3 and 2
    ("collections", "OrderedDict"),
}
_ENCODINGS = ("utf-8", "latin-1")  # of the byte strings in a pickle of Python 2; every byte is valid in the second


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only plain containers are admitted")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Any:
    """The value in a pickle, if that is made of plain containers, strings, numbers and None.

    Raises:
        ValueError: naming the file: it cannot be read, is truncated or no pickle, or asks for anything else by name.
    """
    data = read_bytes(path)
    for encoding in _ENCODINGS:
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as error:
            if encoding == _ENCODINGS[-1]:
                raise ValueError(f"{path}: is no readable pickle ({error})") from error
        except Exception as error:  # garbage makes the unpickler raise nearly anything
            raise ValueError(f"{path}: is no readable pickle ({error or type(error).__name__})") from error
    raise AssertionError("one of the encodings returns or raises")
