"""What a training set is made of: samples by number, and what must be known of all of them without reading any.

`SampleList` holds samples in memory, `instructsam.data.table.SampleTable` reads them from disk one by one, `Mixture`
joins several of either and knows how often an epoch sees them. All three are `Samples`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from instructsam.data.checks import is_number, is_whole
from instructsam.data.draws import Draws, draws_per_epoch
from instructsam.structures import Sample, Turn


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of samples, each (samples,) int32, for limits and samplers.

    Attributes:
        turns: instructions.
        phrases: phrases of all turns.
        masks: instances of all phrases.
        most: instances of the phrase that has most.
        fewest: a limit of so many instances a phrase leaves a turn to ask (0: always).
        text_bytes: bytes (UTF-8) of all instructions, phrases and answers.
        bare: instructions of bare words, which get a template around them (`Turn.form`).
        height, width: of the picture in pixels; 0 where there is none.
        turn_phrases: phrases of the turn that has most.
        turn_masks: instances of the turn that has most.
    """

    turns: NDArray[np.int32]
    phrases: NDArray[np.int32]
    masks: NDArray[np.int32]
    most: NDArray[np.int32]
    fewest: NDArray[np.int32]
    text_bytes: NDArray[np.int32]
    bare: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    turn_phrases: NDArray[np.int32]
    turn_masks: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.turns)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> SampleSizes:
        """Measure samples one after another."""
        rows = np.array([measure(sample) for sample in samples], dtype=np.int32).reshape(-1, len(SIZES))
        return cls(*np.ascontiguousarray(rows.T))

    @classmethod
    def join(cls, parts: Sequence[SampleSizes]) -> SampleSizes:
        """Those of several sets, one after another."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in SIZES))

    def take(self, rows: NDArray[np.int64]) -> SampleSizes:
        """Those of some samples."""
        return SampleSizes(*(getattr(self, name)[rows] for name in SIZES))


SIZES = tuple(field.name for field in fields(SampleSizes))


def measure(sample: Sample) -> tuple[int, ...]:
    """The sizes of one sample, in the order of `SIZES`."""
    counts = [[len(phrase.rles) for phrase in turn.phrases] for turn in sample.turns]
    flat = [count for turn in counts for count in turn]
    return (
        len(sample.turns),
        len(flat),
        sum(flat),
        max(flat, default=0),
        min((min(turn, default=0) for turn in counts), default=0),
        sum(map(text_bytes, sample.turns)),
        sum(bool(turn.form) for turn in sample.turns),
        *((0, 0) if sample.image is None else (sample.height, sample.width)),
        max(map(len, counts), default=0),
        max(map(sum, counts), default=0),
    )


def text_bytes(turn: Turn) -> int:
    """Bytes (UTF-8) of a turn's instruction, phrases and answer."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in turn.texts)


class Samples(Protocol):
    """Samples by their number, in a fixed order."""

    @property
    def sizes(self) -> SampleSizes: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleList:
    """Samples in memory."""

    def __init__(self, samples: Iterable[Sample]):
        self._samples = list(samples)
        self.sizes = SampleSizes.of(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class Mixture:
    """Several sets of samples, one after another, and how often an epoch sees each: by repeats, or by weights.

    As `Samples` every sample is there once; `draws` says what an epoch makes of them.

    Args:
        parts: name -> samples.
        repeats: name -> how often an epoch sees each sample, not necessarily a whole number; 1 where absent.
        weights: name -> relative share of an epoch, of all parts or of none; takes the place of ``repeats``.
        epoch_samples: samples of an epoch, with weights.

    Raises:
        ValueError: no parts, an empty part, numbers of unknown parts or that are not positive, weights without
            epoch_samples or of some parts only.
    """

    def __init__(
        self,
        parts: Mapping[str, Samples],
        repeats: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        epoch_samples: int | None = None,
    ):
        repeats, weights = dict(repeats or {}), dict(weights or {})
        if not parts:
            raise ValueError("a mixture needs at least one source")
        for what, given in (("repeats", repeats), ("weights", weights)):
            if unknown := set(given) - set(parts):
                raise ValueError(f"{what} of unknown sources: {', '.join(sorted(unknown))}")
            for name, number in given.items():
                if not is_number(number) or not 0 < number < math.inf:
                    raise ValueError(f"source {name}: {what} must be a number above 0, got {number!r}")
        if empty := [name for name, part in parts.items() if not len(part)]:
            raise ValueError(f"source {empty[0]} has no samples")
        if weights and (without := [name for name in parts if name not in weights]):
            raise ValueError(f"all sources need a weight, or none; without: {', '.join(without)}")
        if bool(weights) != (epoch_samples is not None):
            raise ValueError(f"data.epoch_samples={epoch_samples}: goes with the weights of sources, and they with it")
        if epoch_samples is not None and not is_whole(epoch_samples):
            raise ValueError(f"data.epoch_samples={epoch_samples}: must be a whole number of at least 1")
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self.repeats = {name: repeats.get(name, 1) for name in parts}
        self.weights = weights
        self.epoch_samples = epoch_samples
        self._ends = np.cumsum([len(part) for part in self.parts])

    def draws(self, rows: NDArray[np.int64] | None = None, seed: int = 0) -> Draws:
        """What an epoch draws of the samples ``rows`` (rising; all by default), as numbers of these.

        Raises:
            ValueError: a source with a weight has none of them, or too small a share to be drawn.
        """
        upto = self._ends if rows is None else np.searchsorted(rows, self._ends)
        lengths = dict(zip(self.names, np.diff(upto, prepend=0).tolist(), strict=True))
        return Draws(lengths, draws_per_epoch(lengths, self.repeats, self.weights, self.epoch_samples), seed)

    @cached_property
    def sizes(self) -> SampleSizes:
        return SampleSizes.join([part.sizes for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[str, int]:
        """The source of a sample, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.names[part], int(index) - (int(self._ends[part - 1]) if part else 0)

    def __getitem__(self, index: int) -> Sample:
        name, row = self.locate(index)
        return self.parts[self.names.index(name)][row]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "sizes"}  # workers need none
