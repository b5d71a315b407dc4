"""One run at a time in an output directory: two that write to the same checkpoints would ruin both."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(folder: str | Path) -> Iterator[int]:
    """Hold the folder for this process; the lock ends with the process, however that ends.

    Gives the lock's file descriptor: a process that inherits it (``pass_fds``) holds the lock too, as long as it lives.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is at work there; wait for it or stop it") from error
        yield file.fileno()
