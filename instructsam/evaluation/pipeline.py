"""Batches of similar length, and their three stages (read, compute, encode) at the same time.

Neither may show in the records: batches depend on the items alone, never on the number of processes, and every stage
of a batch sees that batch only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
Result = TypeVar("Result")

PENDING = 2  # computed batches that wait to be encoded: they hold the accelerator's memory


def batches(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `batch_size`."""
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


def buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first.

    The longest first: what does not fit into memory shows at once, and the ranks, which take batches in turn, end with
    short ones at about the same time.

    Args:
        lengths: estimated sequence length of every item.
        batch_size: at least 1.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [list(batch) for batch in batches(order, batch_size)]


def overlapped(
    source: Iterable[T],
    read: Callable[[T], Any],
    compute: Callable[[Any], Any],
    encode: Callable[[T, Any], Result],
    workers: int,
) -> Iterator[Result]:
    """``encode(batch, compute(read(batch)))`` of every batch, in order.

    Args:
        read: runs ahead of `compute`, in `workers` threads.
        compute: runs in the calling thread.
        encode: runs behind `compute` in one thread, so that what it writes is written in order.
        workers: 0 = everything in the calling thread, one batch after the other.

    Raises:
        Whatever a stage raises; later batches are given up then.
    """
    if workers == 0:
        for batch in source:
            yield encode(batch, compute(read(batch)))
        return
    batches_left = iter(source)
    reading: deque[tuple[T, Future[Any]]] = deque()
    encoding: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, "read") as readers, ThreadPoolExecutor(1, "encode") as encoder:
        try:
            while True:
                for upcoming in islice(batches_left, workers + 1 - len(reading)):
                    reading.append((upcoming, readers.submit(read, upcoming)))
                if not reading:
                    break
                batch, future = reading.popleft()
                encoding.append(encoder.submit(encode, batch, compute(future.result())))
                while len(encoding) > PENDING:
                    yield encoding.popleft().result()
            while encoding:
                yield encoding.popleft().result()
        finally:
            for waiting in (*(future for _, future in reading), *encoding):
                waiting.cancel()
