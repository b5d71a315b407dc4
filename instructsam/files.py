"""Files that must never be seen half written, and what is read from such as a person may have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Another path to write to, whose file takes the place of `path` at the end: what a kill cuts off never does.

    Folders that are missing are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    temporary.replace(path)


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file so that there is always the old or the new one, also after the machine has gone down.

    Folders that are missing are made.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def json_object(text: str | bytes, where: object, expected: str = "an object") -> dict[str, Any]:
    """The object that a JSON text is.

    Args:
        where: it stands, for messages; expected: what kind of object it should be.

    Raises:
        ValueError: not valid JSON, or anything else than an object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of brackets within brackets without end
        raise ValueError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected {expected}, got {type(found).__name__}")
    return found
