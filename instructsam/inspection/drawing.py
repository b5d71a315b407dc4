"""Random samples of every source as one epoch asks them, to look at and to measure.

From a table they are read directly. A source that is read from its files goes by once, and a random part of it is kept
on the way, each sample as likely as any other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from instructsam.data.asking import Asking
from instructsam.data.augmentation import Augmentation, PictureChange
from instructsam.data.checks import Skips
from instructsam.data.composition import Composition, Group
from instructsam.data.draws import draws_per_epoch
from instructsam.data.leakage import Leakage
from instructsam.data.limits import TOO_MANY, within_queries
from instructsam.data.samples import Samples
from instructsam.data.sources import (
    Source,
    check_files,
    held_out_of,
    limit_of,
    open_tables,
    parse_sources,
    read_source,
)
from instructsam.inspection.statistics import Facts, facts_of
from instructsam.structures import Sample, Turn

T = TypeVar("T")
Progress = Callable[[str, Iterable[Sample]], Iterable[Sample]]


@dataclass
class Asker:
    """Asks samples as the training set does, as far as that needs no model: with its number of queries, but not its
    tokenizer, so that nothing is left out for ``max_length``.

    Args:
        num_queries: instances of a phrase that are not too many; None for any number.
        too_many_instances: what becomes of other phrases. With "raise" their instructions are left out, where training
            stops or, with ``on_bad`` "skip", does the same.
        asking: how the rest is drawn.

    Raises:
        ValueError: another policy.
    """

    num_queries: int | None
    too_many_instances: str
    asking: Asking

    def __post_init__(self) -> None:
        if self.too_many_instances not in TOO_MANY:
            raise ValueError(f"data.too_many_instances={self.too_many_instances!r} is not one of {', '.join(TOO_MANY)}")

    @classmethod
    def of(cls, data: Mapping[str, Any], num_queries: int | None) -> Asker:
        """That of a data configuration. Raises ValueError for settings that cannot work."""
        turns = data.get("turns_per_image", 1)
        if not isinstance(turns, int) or turns < 1:
            raise ValueError(f"data.turns_per_image={turns}: must be at least 1")
        composition = Composition.from_mapping(data.get("composition") or {})
        augmentation = Augmentation.from_mapping(data.get("augmentation") or {})
        asking = Asking(composition, augmentation, turns, data.get("independent_turns", True))
        return cls(num_queries, data.get("too_many_instances") or "raise", asking)

    def usable(self, sample: Sample) -> Sample:
        """The sample with the turns that may be asked, none maybe, within the limits of a phrase and of a turn."""
        turns = [self._limited(turn) for turn in sample.turns]
        composition = self.asking.composition
        kept = tuple(turn for turn in turns if turn is not None and composition.within_limits(turn))
        return dataclasses.replace(sample, turns=kept)

    def _limited(self, turn: Turn) -> Turn | None:
        most = self.num_queries
        if most is None or all(len(phrase.rles) <= most for phrase in turn.phrases):
            return turn
        return (
            None
            if self.too_many_instances == "raise"
            else within_queries(turn, most, self.too_many_instances == "truncate")
        )

    def ask(self, sample: Sample, rng: np.random.Generator) -> tuple[Sample, PictureChange]:
        """The sample with the turns of one epoch, none maybe, as they are worded, and what is done to its picture."""
        usable = self.usable(sample)
        return self.asking.ask(usable, self.asking.groups(usable, rng), rng)

    def facts(self, sample: Sample, rng: np.random.Generator) -> Facts:
        """What one epoch asks of a sample, in its source's own words."""
        usable = self.usable(sample)
        groups = self.asking.groups(usable, rng)
        return facts_of(dataclasses.replace(sample, turns=tuple(map(_together, groups))))


def _together(group: Group) -> Turn:
    """Turns that are asked in one instruction as one turn, to be measured."""
    if len(group) == 1:
        return group[0]
    kinds, forms = ("+".join(dict.fromkeys(getattr(turn, key) for turn in group)) for key in ("kind", "form"))
    words = " ".join(turn.instruction for turn in group)
    return Turn(words, tuple(phrase for turn in group for phrase in turn.phrases), kinds, form=forms)


@dataclass
class Drawn:
    """What was drawn of a source.

    Attributes:
        total: how many samples it has.
        shown: random samples, in the order of the source.
        facts: of all samples as one epoch asks them, or of a random part of them; a sample that has nothing to ask is
            there without a turn.
        left_out: bad entries of each sort.
        aside: sound entries that cannot be used, and samples held out, of each sort.
        epoch: how many samples an epoch draws of it.
    """

    source: Source
    total: int
    shown: list[Sample]
    facts: list[Facts]
    left_out: Counter[str] = field(default_factory=Counter)
    aside: Counter[str] = field(default_factory=Counter)
    epoch: int = 0

    @property
    def weight(self) -> float:
        """How often an epoch sees a sample that was measured."""
        return self.epoch / max(len(self.facts), 1)

    @property
    def silent(self) -> int:
        """How many of the measured samples have nothing to ask."""
        return sum(not facts.turns for facts in self.facts)


def draw(
    data: Mapping[str, Any],
    num: int,
    limit: int,
    seed: int,
    asker: Asker,
    progress: Progress = lambda name, samples: samples,
) -> list[Drawn]:
    """Random samples of every source of a data configuration.

    Args:
        data: as `instructsam.data.sources.open_sources` takes it. Bad entries are left out, with a count.
        num: samples to show, the same number of each source, and at least one.
        limit: so many samples of each source are measured at most.
        asker: how they are asked; samples that have nothing to ask are not shown.
        progress: goes around the samples of a source while they are read.

    Raises:
        ValueError: settings that cannot work, files or tables that are missing, a source that cannot be read.
    """
    sources = parse_sources(data["sources"])
    shares = [num // len(sources) + (number < num % len(sources)) for number in range(len(sources))]
    places = [_Places(asker, max(share, 1), limit, (seed, number)) for number, share in enumerate(shares)]
    most = limit_of(data)
    if data.get("prepared"):
        tables = open_tables(sources, data)
        drawn = [
            _from_table(source, wanted, table, most, partial(progress, source.name))
            for source, wanted, table in zip(sources, places, tables, strict=True)
        ]
    else:
        check_files(sources)
        held_out, drawn = held_out_of(sources, data), []
        for source, wanted in zip(sources, places, strict=True):
            skips, leakage = Skips("skip", report=lambda problem: None), Leakage()  # `validate` tells what is wrong
            read = islice(read_source(source, skips, held_out, leakage), most)
            drawn.append(_from_stream(source, wanted, progress(source.name, read)))
            drawn[-1].left_out, drawn[-1].aside = skips.counts, skips.aside
            if leakage.samples:
                drawn[-1].aside["samples held out"] += leakage.samples
            if leakage.unknown:
                drawn[-1].aside["samples kept that cannot be told from held-out ones"] += leakage.unknown
    lengths = {one.source.name: one.total for one in drawn}
    weights = {source.name: source.weight for source in sources if source.weight is not None}
    repeats = {source.name: source.repeats for source in sources}
    epoch = draws_per_epoch(lengths, repeats, weights, data.get("epoch_samples"))
    for one in drawn:
        one.epoch = epoch[one.source.name]
    return drawn


class _Places:
    """How many samples of a source are wanted, and the random numbers for choosing and for asking them."""

    def __init__(self, asker: Asker, share: int, limit: int, seed: Sequence[int]):
        self.asker, self.share, self.limit = asker, share, limit
        self.rng = np.random.default_rng(seed)
        self._asking = np.random.default_rng([*seed, 1])

    def facts(self, sample: Sample) -> Facts:
        return self.asker.facts(sample, self._asking)

    def is_asked(self, sample: Sample) -> bool:
        return bool(self.asker.usable(sample).turns)


def _from_table(
    source: Source,
    places: _Places,
    table: Samples,
    most: int | None,
    progress: Callable[[Iterable[Sample]], Iterable[Sample]],
) -> Drawn:
    total, rng = min(len(table), most or len(table)), places.rng
    shown: dict[int, Sample] = {}
    for row in rng.permutation(total).tolist():
        if len(shown) == min(places.share, total):
            break
        if places.is_asked(sample := table[row]):
            shown[row] = sample
    measured = np.sort(rng.choice(total, min(places.limit, total), replace=False)).tolist()
    facts = [places.facts(sample) for sample in progress(table[row] for row in measured)]
    return Drawn(source, total, [shown[row] for row in sorted(shown)], facts)


def _from_stream(source: Source, places: _Places, samples: Iterable[Sample]) -> Drawn:
    shown, facts = Reservoir[Sample](places.share, places.rng), Reservoir[Facts](places.limit, places.rng)
    total = 0
    for sample in samples:
        total += 1
        if places.is_asked(sample) and shown.wants_next():
            shown.put(sample)
        if facts.wants_next():
            facts.put(places.facts(sample))
    return Drawn(source, total, shown.kept(), facts.kept())


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
