"""Concurrent questions gathered into batches for one model, in one thread that alone touches it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from instructsam.inference.model import InstructSAM
from instructsam.inference.questions import Question, answer_each
from instructsam.structures import Prediction


class Overloaded(Exception):
    """More questions wait than may; come again later."""


class Room:
    """Bounds the pixels of pictures that are held at the same time; used by one thread only."""

    def __init__(self, pixels: int):
        self.left = pixels

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Hold a picture of so many pixels meanwhile. Raises Overloaded where they are too many."""
        if pixels > self.left:
            raise Overloaded(f"pictures that wait leave room for {self.left:,} pixels, this one has {pixels:,}")
        self.left -= pixels
        try:
            yield
        finally:
            self.left += pixels


@dataclass
class _Waiting:
    """A question, None once nobody waits for its answer."""

    question: Question | None
    future: Future[tuple[Prediction, int]] = field(default_factory=Future)


class Batcher:
    """Answers questions as they come.

    A batch begins with a question and closes when it is full, or when `max_wait` seconds have passed since.

    Args:
        model: used by the batcher's thread only.
        max_batch: questions in a batch.
        max_waiting: questions that wait or are being answered, further ones are refused.
        max_wait: seconds that the first question of a batch waits for others.
        observe: called after each batch with its size and its seconds, from the batcher's thread.

    Raises:
        ValueError: a limit below 1, a negative wait.
    """

    def __init__(
        self,
        model: InstructSAM,
        max_batch: int = 8,
        max_waiting: int = 64,
        max_wait: float = 0.01,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        if max_batch < 1 or max_waiting < 1 or max_wait < 0:
            raise ValueError(
                f"max_batch={max_batch}, max_waiting={max_waiting}: at least 1; max_wait={max_wait}: 0 or more"
            )
        self.model, self.max_batch, self.max_waiting, self.max_wait = model, max_batch, max_waiting, max_wait
        self.observe = observe
        self._queue: queue.Queue[_Waiting | None] = queue.Queue()
        self._admitted, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._stopped = False

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch at work and refuse all that waits."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Questions that wait or are being answered."""
        return self._admitted

    @property
    def alive(self) -> bool:
        """Whether questions are answered at all."""
        return self._thread.is_alive()

    def admit(self) -> None:
        """Take a place, which `release` gives back. Raises Overloaded where there is none."""
        with self._lock:
            if self._stopped or self._admitted >= self.max_waiting:
                raise Overloaded(f"{self._admitted} questions wait already")
            self._admitted += 1

    def release(self) -> None:
        """Give a place back."""
        with self._lock:
            self._admitted -= 1

    async def answer(self, question: Question) -> tuple[Prediction, int]:
        """The prediction and the size of its batch. A place must have been taken; a cancelled question is not asked.

        Raises:
            ValueError: a question that cannot be answered. Overloaded: the service stops.
        """
        waiting = _Waiting(question)
        self._queue.put(waiting)
        try:
            return await asyncio.wrap_future(waiting.future)
        except asyncio.CancelledError:
            if waiting.future.cancel():  # not at work yet: its picture need not stay until its turn comes
                waiting.question = None
            raise

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            if not first.future.cancelled():
                self._answer(self._gather(first))
        while True:
            try:
                left = self._queue.get_nowait()
            except queue.Empty:
                return
            if left is not None and left.future.set_running_or_notify_cancel():
                left.future.set_exception(Overloaded("the service stops"))

    def _gather(self, first: _Waiting) -> list[_Waiting]:
        batch, closes = [first], time.monotonic() + self.max_wait
        while len(batch) < self.max_batch:
            try:
                one = self._queue.get(timeout=max(0.0, closes - time.monotonic()))
            except queue.Empty:
                break
            if one is None:  # to stop after this batch
                self._queue.put(None)
                break
            if not one.future.cancelled():
                batch.append(one)
        return batch

    def _answer(self, gathered: list[_Waiting]) -> None:
        batch = [one for one in gathered if one.future.set_running_or_notify_cancel()]
        questions = [one.question for one in batch if one.question is not None]
        if not batch:
            return
        began = time.perf_counter()
        try:
            outcomes = answer_each(self.model, questions)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            outcomes = [error if isinstance(error, Exception) else RuntimeError(repr(error))] * len(batch)
        self.observe(len(batch), time.perf_counter() - began)
        for one, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                one.future.set_exception(outcome)
            else:
                one.future.set_result((outcome, len(batch)))
