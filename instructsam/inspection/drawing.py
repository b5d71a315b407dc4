"""Random samples of every source, to look at and to measure; and what one epoch would ask of a sample.

From a table they are read directly. A source that is read from its files goes by once, and a random part of it is kept
on the way, each sample as likely as any other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from instructsam.data.checks import Skips
from instructsam.data.composition import Composition
from instructsam.data.leakage import held_out_images
from instructsam.data.samples import Samples
from instructsam.data.sources import Source, check_files, open_tables, parse_sources, read_source
from instructsam.data.wording import word, word_joint
from instructsam.inspection.statistics import Facts, facts_of
from instructsam.structures import Sample

T = TypeVar("T")
Progress = Callable[[str, Iterable[Sample]], Iterable[Sample]]


@dataclass
class Drawn:
    """What was drawn of a source.

    Attributes:
        total: how many samples it has.
        shown: random samples, in the order of the source.
        facts: of all samples, or of a random part of them.
        left_out: bad entries of each sort.
    """

    source: Source
    total: int
    shown: list[Sample]
    facts: list[Facts]
    left_out: Counter[str]

    @property
    def weight(self) -> float:
        """How often an epoch sees a sample that was measured."""
        return self.total * self.source.repeats / max(len(self.facts), 1)


def draw(
    data: Mapping[str, Any], num: int, limit: int, seed: int, progress: Progress = lambda name, samples: samples
) -> list[Drawn]:
    """Random samples of every source of a data configuration.

    Args:
        data: as `instructsam.data.sources.open_sources` takes it. Bad entries are left out, with a count.
        num: samples to show, the same number of each source, and at least one.
        limit: so many samples of each source are measured at most.
        progress: goes around the samples of a source while they are read.

    Raises:
        ValueError: settings that cannot work, files or tables that are missing, a source that cannot be read.
    """
    sources = parse_sources(data["sources"])
    shares = [num // len(sources) + (number < num % len(sources)) for number in range(len(sources))]
    generators = [np.random.default_rng((seed, number)) for number in range(len(sources))]
    plan = [(source, max(share, 1), rng) for source, share, rng in zip(sources, shares, generators, strict=True)]
    most = data.get("limit")
    if data.get("prepared"):
        tables = open_tables(sources, data)
        return [
            _from_table(*one, table, limit, most, partial(progress, one[0].name))
            for one, table in zip(plan, tables, strict=True)
        ]
    check_files(sources)
    held_out = held_out_images(data.get("held_out") or ()) if any(s.held_out for s in sources) else frozenset()
    drawn = []
    for source, share, rng in plan:
        skips = Skips("skip", report=lambda problem: None)  # `validate` tells what is wrong with them
        samples = progress(source.name, islice(read_source(source, skips, held_out), most))
        drawn.append(_from_stream(source, share, rng, samples, limit, skips.counts))
    return drawn


def _from_table(
    source: Source,
    share: int,
    rng: np.random.Generator,
    table: Samples,
    limit: int,
    most: int | None,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]],
) -> Drawn:
    total = min(len(table), most or len(table))
    shown = np.sort(rng.choice(total, min(share, total), replace=False)).tolist()
    measured = np.sort(rng.choice(total, min(limit, total), replace=False)).tolist()
    facts = [facts_of(sample) for sample in progress(table[row] for row in measured)]
    return Drawn(source, total, [table[row] for row in shown], facts, Counter())


def _from_stream(
    source: Source,
    share: int,
    rng: np.random.Generator,
    samples: Iterable[Sample],
    limit: int,
    left_out: Counter[str],
) -> Drawn:
    shown, facts = Reservoir[Sample](share, rng), Reservoir[Facts](limit, rng)
    total = 0
    for sample in samples:
        total += 1
        if shown.wants_next():
            shown.put(sample)
        if facts.wants_next():
            facts.put(facts_of(sample))
    return Drawn(source, total, shown.kept(), facts.kept(), left_out)


class Reservoir(Generic[T]):
    """A uniform random part, of a fixed size, of things that come one after another and are not counted before."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng, self.seen = size, rng, 0
        self._kept: list[tuple[int, T]] = []
        self._place = 0

    def wants_next(self) -> bool:
        """Whether the next one is to be handed to `put`, maybe in place of another. To be asked once for each."""
        self._place = self.seen if self.seen < self.size else int(self.rng.integers(self.seen + 1))
        self.seen += 1
        return self._place < self.size

    def put(self, thing: T) -> None:
        """The one that was wanted."""
        self._kept[self._place : self._place + 1] = [(self.seen, thing)]

    def kept(self) -> list[T]:
        """In the order in which they came."""
        return [thing for _, thing in sorted(self._kept, key=lambda item: item[0])]


def as_asked(sample: Sample, composition: Composition, rng: np.random.Generator) -> Sample:
    """The sample with the turns of one epoch: composed, and in the words of a template."""
    groups: Sequence[Any] = composition.draw(sample, rng)
    turns = [word_joint(group, rng) if len(group) > 1 else word(group[0], rng) for group in groups]
    return dataclasses.replace(sample, turns=tuple(turns))
