"""What a training set is made of: samples by number, and what must be known of all of them without reading any.

`SampleList` holds samples in memory, `instructsam.data.table.SampleTable` reads them from disk one by one, `Mixture`
joins several of either. All three are `Samples`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
    """

    turns: NDArray[np.int32]
    phrases: NDArray[np.int32]
    masks: NDArray[np.int32]
    most: NDArray[np.int32]
    fewest: NDArray[np.int32]
    text_bytes: NDArray[np.int32]

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
    )


def text_bytes(turn: Turn) -> int:
    """Bytes (UTF-8) of a turn's instruction, phrases and answer."""
    texts = (turn.instruction, *turn.answer, *(phrase.text for phrase in turn.phrases))
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


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
    """Several sets of samples as one; a set with repeats occurs that often in every epoch.

    Args:
        parts: name -> samples.
        repeats: name -> how often, a whole number; 1 where absent.

    Raises:
        ValueError: no parts, an empty part, repeats of an unknown part, repeats below 1 or that are no whole number.
    """

    def __init__(self, parts: Mapping[str, Samples], repeats: Mapping[str, int] | None = None):
        repeats = dict(repeats or {})
        if not parts:
            raise ValueError("a mixture needs at least one source")
        if unknown := set(repeats) - set(parts):
            raise ValueError(f"repeats of unknown sources: {', '.join(sorted(unknown))}")
        self.names = tuple(parts)
        self.parts = tuple(parts.values())
        for name, part in parts.items():
            number = repeats.setdefault(name, 1)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"source {name}: repeats must be a whole number of at least 1, got {number!r}")
            if not len(part):
                raise ValueError(f"source {name} has no samples")
        self.repeats = tuple(repeats[name] for name in self.names)
        lengths = [len(part) * number for part, number in zip(self.parts, self.repeats, strict=True)]
        self._ends = np.cumsum(lengths)
        repeated = [part.sizes for part, number in zip(self.parts, self.repeats, strict=True) for _ in range(number)]
        self.sizes = SampleSizes.join(repeated)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[str, int]:
        """The source of a sample, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        return self.names[part], (index - first) % len(self.parts[part])

    def __getitem__(self, index: int) -> Sample:
        name, row = self.locate(index)
        return self.parts[self.names.index(name)][row]
