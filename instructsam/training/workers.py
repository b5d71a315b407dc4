"""Processes that read data for the training loop: how they start, how their errors come through, how they end."""

from __future__ import annotations

import ctypes
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from instructsam.training.signals import SIGNALS

Batch = dict[str, Any]
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def start_worker(_: int = 0) -> None:
    """What a data worker does first.

    A terminal signals the whole process group, but the step in progress still needs its data: signals are ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return_large_blocks()


def return_large_blocks() -> None:
    """Give the memory of pictures back to the system as soon as they are done with.

    glibc keeps ever larger blocks for later use, up to some 100 MiB a process; a worker's tensors are larger than what
    that is good for. Other C libraries have no such setting.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def next_batch(batches: Iterator[Batch]) -> Batch:
    """The next micro batch. A ValueError of a data worker is raised with its own message, as without workers."""
    try:
        return next(batches)
    except ValueError as error:
        # PyTorch puts the worker's whole traceback into the message; the last line of it starts the original one.
        start = rf"^(?:\w+\.)*{type(error).__name__}: "
        if str(error).startswith("Caught ") and re.search(start, str(error), re.MULTILINE):
            raise type(error)(re.split(start, str(error), flags=re.MULTILINE)[-1].strip()) from error
        raise


def close_data(batches: Iterator[Batch]) -> None:
    """End the data workers, if there are any.

    An exception's traceback would keep the iterator and so its workers alive, and at exit Python would wait for ever
    for processes that ignore its SIGTERM.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)
    if shutdown is None:  # data are read in this process
        return
    shutdown()
    for worker in getattr(batches, "_workers", ()):
        if worker.is_alive():  # in the middle of a picture
            worker.kill()
