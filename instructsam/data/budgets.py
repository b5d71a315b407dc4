"""Micro batches of as many samples as fit: a budget of tokens and of phrases, in place of a number of samples.

A micro batch is padded to its longest sample, so it costs that length times its samples; its masks cost memory by the
phrase. Batches that fill the same budget do about the same work, whatever their samples are, so no rank waits long for
another. Sizes are estimates (`instructsam.data.item_sizes`): leave some memory free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from instructsam.data.checks import is_whole

Sizes = Callable[[int], NDArray[np.float64]]
"""Epoch -> a size of each of its samples."""

SORTED_TOGETHER = 512
"""With grouping, so many samples are sorted by size before they are cut into batches, and never more than a quarter of
an epoch: the more, the less padding, but the oftener the same samples meet. 20,000 samples of about 1,240 tokens in
batches of 16,384: 2.7 % padding, and 1.1 % of the neighbours in a batch are so again in the next epoch; with 2,048
sorted together 0.8 % and 5.0 %, with 128 8.1 % and 0.3 %."""


@dataclass(frozen=True)
class Plan:
    """The micro batches of an epoch.

    Attributes:
        order: (samples,) int64, each sample once.
        ends: (batches,) int64, rising: where in ``order`` each batch ends; the last is the number of samples.
        oversized: samples that are beyond a budget by themselves, each a batch of its own.
    """

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    oversized: int = 0


@dataclass(frozen=True)
class Budgets:
    """What a micro batch may hold; sizes are rounded up to whole numbers.

    Args:
        tokens_per_batch: the longest sample's tokens times the samples are at most this (None: any number).
        phrases_per_batch: the sum of phrases is at most this (None: any number).
        num_tokens, num_phrases: of an epoch's samples; needed where there is a budget.

    Raises:
        ValueError: no budget, one that is no whole number of at least 1, or without sizes.
    """

    tokens_per_batch: int | None = None
    phrases_per_batch: int | None = None
    num_tokens: Sizes | None = None
    num_phrases: Sizes | None = None

    def __post_init__(self) -> None:
        pairs = [
            ("tokens_per_batch", self.tokens_per_batch, self.num_tokens),
            ("phrases_per_batch", self.phrases_per_batch, self.num_phrases),
        ]
        if all(budget is None for _, budget, _ in pairs):
            raise ValueError("give tokens_per_batch, phrases_per_batch or both")
        for name, budget, sizes in pairs:
            if budget is not None and not is_whole(budget):
                raise ValueError(f"{name} must be a whole number of at least 1, or null, got {budget!r}")
            if budget is not None and sizes is None:
                raise ValueError(f"{name}={budget} needs the sizes of samples, which this data set does not give")

    def plan(
        self, generator: np.random.Generator, length: int, epoch: int, group_by: NDArray[np.float64] | None = None
    ) -> Plan:
        """Shuffle an epoch of `length` samples and cut it into batches, each filled before the next is begun.

        Args:
            group_by: (length,) sizes; samples of similar size are then planned together (`SORTED_TOGETHER`), and the
                batches are shuffled. Without, they stay in the order of the permutation.
        """
        order = generator.permutation(length)
        if group_by is not None:
            block = np.arange(length) // max(1, min(SORTED_TOGETHER, length // 4))
            rising = 1 - 2 * (block % 2)  # the next block falls again: no batch has both ends of the sizes
            order = order[np.lexsort((rising * group_by[order], block))]
        tokens = _whole(self.num_tokens, epoch, length, self.tokens_per_batch)
        phrases = _whole(self.num_phrases, epoch, length, self.phrases_per_batch)
        most_tokens, most_phrases = (budget or np.inf for budget in (self.tokens_per_batch, self.phrases_per_batch))
        oversized = int(((tokens > most_tokens) | (phrases > most_phrases)).sum())
        ends = cut(tokens[order], phrases[order], most_tokens, most_phrases)
        if group_by is not None:
            order, ends = _shuffle_batches(generator, order, ends)
        return Plan(order, ends, oversized)


def cut(
    tokens: NDArray[np.int64], phrases: NDArray[np.int64], most_tokens: float, most_phrases: float
) -> NDArray[np.int64]:
    """(batches,) where batches end that hold as many of the samples, in their order, as the budgets allow.

    A loop over plain numbers: 5 million samples take a second or two, and no array operation says the same.
    """
    ends: list[int] = []
    start = longest = total = 0
    for place, (length, number) in enumerate(zip(tokens.tolist(), phrases.tolist(), strict=True)):
        total += number
        if length > longest:
            longest = length
        if (longest * (place + 1 - start) > most_tokens or total > most_phrases) and place > start:
            ends.append(place)
            start, longest, total = place, length, number
    return np.array([*ends, len(tokens)], dtype=np.int64)


def _whole(sizes: Sizes | None, epoch: int, length: int, budget: int | None) -> NDArray[np.int64]:
    """Sizes rounded up; nothing where there is no budget for them."""
    if sizes is None or budget is None:
        return np.zeros(length, dtype=np.int64)
    return np.ceil(checked(sizes(epoch), length, "sizes for a budget")).astype(np.int64)


def checked(sizes: Sequence[float] | NDArray[np.float64], length: int, what: str) -> NDArray[np.float64]:
    """Sizes as float64. Raises ValueError if they are not one finite number a sample."""
    array = np.asarray(sizes, dtype=np.float64)
    if array.shape != (length,) or not np.isfinite(array).all():
        raise ValueError(
            f"{what} must hold one finite number for each of the {length} samples, got "
            f"{int(np.isfinite(array).sum())} in an array of shape {array.shape}"
        )
    return array


def _shuffle_batches(
    generator: np.random.Generator, order: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.diff(ends, prepend=0)
    batches = generator.permutation(len(ends))
    new_ends = np.cumsum(lengths[batches])
    moved = np.repeat((ends - lengths)[batches] - (new_ends - lengths[batches]), lengths[batches])
    return order[moved + np.arange(len(order))], new_ends
