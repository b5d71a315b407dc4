"""How often an epoch sees each sample of a mixture, and which sample each of its draws is.

A source gives an epoch a fixed number of draws. They are places in an endless stream that goes through the source again
and again, and every epoch takes up where the one before it ended: at the end of any epoch, no sample of a source has
been seen twice more than another. Where an epoch ends in the middle of a pass, each pass has an order of its own.

That order is computed place by place (a Feistel network) and never kept: a permutation of millions of samples in the
memory of every data worker would cost gigabytes, and a simple rule such as (a * k + b) % n would pick samples at equal
distances, which are not independent where a source lists its samples in groups.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def draws_per_epoch(
    lengths: Mapping[str, int],
    repeats: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
    epoch_samples: int | None = None,
) -> dict[str, int]:
    """How many draws each source gives an epoch.

    Args:
        lengths: name -> samples.
        repeats: name -> how often an epoch sees each of them, not necessarily a whole number; 1 where absent. Draws are
            rounded, and at least one where there is a sample.
        weights: name -> relative share of an epoch, of all sources; takes the place of ``repeats``.
        epoch_samples: draws of an epoch of such shares. They add up to it, each within one of its exact share.

    Raises:
        ValueError: a source with a weight has no samples, or its share is not a single draw.
    """
    if not weights:
        return {name: max(1, round(repeats.get(name, 1) * n)) if n else 0 for name, n in lengths.items()}
    assert epoch_samples is not None
    exact = np.array([weights[name] for name in lengths], dtype=np.float64)
    exact *= epoch_samples / exact.sum()
    draws = np.floor(exact).astype(np.int64)
    draws[np.argsort(draws - exact, kind="stable")[: epoch_samples - int(draws.sum())]] += 1
    for (name, length), drawn in zip(lengths.items(), draws.tolist(), strict=True):
        if not length:
            raise ValueError(f"source {name} has a weight but no sample to train on: leave it out")
        if not drawn:
            raise ValueError(f"source {name} is not drawn once an epoch: raise data.epoch_samples={epoch_samples}")
    return dict(zip(lengths, draws.tolist(), strict=True))


class Draws:
    """Which sample each draw of an epoch is; a pure function of the arguments.

    Args:
        lengths: name of a source -> its samples, which are numbered through from 0 in this order.
        draws: name -> what it gives an epoch; 0 where it has no sample.
        seed: of the order of the passes.
    """

    def __init__(self, lengths: Mapping[str, int], draws: Mapping[str, int], seed: int = 0):
        self.names, self.lengths = tuple(lengths), tuple(lengths.values())
        self.draws = tuple(draws[name] for name in lengths)
        self.seed = seed
        self._ends = np.cumsum(self.draws)
        self._firsts = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        """Draws of an epoch."""
        return int(self._ends[-1])

    def at(self, epoch: int, index: int) -> int:
        """The sample of one draw. Raises IndexError outside of the epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"draw {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[part] - self.draws[part])
        return int(self._samples(part, epoch, np.array([place]))[0])

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """(len,) the samples of all draws."""
        return np.concatenate([self._samples(part, epoch, np.arange(n)) for part, n in enumerate(self.draws)])

    def _samples(self, part: int, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those at some places of a source's draws, rising."""
        length, first = self.lengths[part], self._firsts[part]
        if not length or self.draws[part] % length == 0:  # whole passes: their order is the sampler's business
            return first + places % max(length, 1)
        passes, places = np.divmod(epoch * self.draws[part] + places, length)
        name, found = zlib.crc32(self.names[part].encode()), np.empty_like(places)
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            here = slice(*np.searchsorted(passes, [number, number + 1]))
            found[here] = shuffled(places[here], length, (self.seed, name, number))
        return first + found


def shuffled(places: NDArray[np.int64], length: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Where a pseudorandom permutation of 0 … length - 1 puts these places; ``key`` are numbers that choose it.

    A Feistel network permutes the next power of four; what lands outside goes through again until it is inside.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        found[outside] = left << half | right
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits whose every output bit depends on all input bits: multiply, fold, twice (wraps around)."""
    for factor in (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)):
        values = values * factor
        values = values ^ (values >> np.uint64(32))
    return values
