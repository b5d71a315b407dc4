"""Opens pictures in several processes: is each there, whole, and upright as large as its record says?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

from instructsam.data.checks import Place, Problem, is_whole
from instructsam.errors import kind_of
from instructsam.processing.image_files import MAX_ASPECT_RATIO, load_image

_BATCH = 32
_WAITING = 4
"""Batches a worker that may wait, so that reading does not run ahead of checking."""


class Picture(NamedTuple):
    """A picture as a sample states it; ``sample`` is its id."""

    path: str
    height: int
    width: int
    sample: str


def check_picture(picture: Picture) -> Problem | None:
    """What is wrong with a picture, if anything: "image missing", "image broken", "image size" or "other"."""
    place = Place(picture.path, picture.sample)
    try:
        found = load_image(picture.path)
    except Exception as error:  # decoders of broken files raise what they like
        kind = kind_of(error) if isinstance(error, ValueError) else "image broken"
        return Problem(kind, place, str(error).removeprefix(f"{picture.path}: ") or type(error).__name__)
    if (found.height, found.width) != (picture.height, picture.width):
        reason = (
            f"the picture is {found.height}x{found.width} (height x width, upright), "
            f"the record says {picture.height}x{picture.width}"
        )
        return Problem("image size", place, reason)
    if max(found.size) > MAX_ASPECT_RATIO * min(found.size):
        reason = f"{found.height}x{found.width} (height x width) is thinner than 1:{MAX_ASPECT_RATIO}"
        return Problem("other", place, reason)
    return None


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number_of_workers(given: Any, least: int) -> int:
    """The setting ``workers``: a number, or None for one a core. Raises ValueError for anything else."""
    workers = available_cores() if given is None else given
    if not is_whole(workers, least):
        raise ValueError(f"workers={given}: must be a whole number of at least {least}, or null for one a core")
    return workers


class PictureChecks:
    """Pictures go in one by one, their problems come out later, in the same order whatever the number of workers.

    Args:
        workers: processes; 0 to check in this one.

    Raises:
        RuntimeError: a worker died (of a picture that is too large for the memory, for instance); names the pictures
            that it may have been.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._batch: list[Picture] = []
        self._running: deque[tuple[list[Picture], Future[list[Problem]]]] = deque()

    def __enter__(self) -> PictureChecks:
        if self._workers:
            # Started anew rather than forked, as forking a process that has threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_quietly)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def add(self, picture: Picture) -> Iterator[Problem]:
        """Have a picture checked; problems of earlier ones, as far as they are known."""
        self._batch.append(picture)
        if len(self._batch) == _BATCH:
            self._submit()
            yield from self._finished(self._workers * _WAITING)

    def finish(self) -> Iterator[Problem]:
        """The problems of all pictures that were added."""
        self._submit()
        yield from self._finished(0)

    def _submit(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        done: Future[list[Problem]]
        if self._pool is None:
            done = Future()
            done.set_result(_check_pictures(batch))
        else:
            try:
                done = self._pool.submit(_check_pictures, batch)
            except BrokenProcessPool as error:
                raise self._died(batch) from error
        self._running.append((batch, done))

    def _finished(self, waiting: int) -> Iterator[Problem]:
        """Results of the oldest batches, until so many are left."""
        while len(self._running) > waiting:
            batch, done = self._running.popleft()
            try:
                yield from done.result()
            except BrokenProcessPool as error:
                raise self._died(batch) from error

    def _died(self, batch: Sequence[Picture]) -> RuntimeError:
        pictures = [picture.path for one in (batch, *(other for other, _ in self._running)) for picture in one]
        named = ", ".join(islice(pictures, _BATCH)) + (", ..." if len(pictures) > _BATCH else "")
        return RuntimeError(
            f"a process that opens pictures died (out of memory?); it was at one of these {len(pictures)}: {named}"
        )


def _check_pictures(pictures: Sequence[Picture]) -> list[Problem]:
    return [problem for problem in map(check_picture, pictures) if problem is not None]


def _quietly() -> None:
    """Workers leave Ctrl-C to the process that started them, and do not print what Pillow thinks of a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
