"""What a benchmark is: which instructions it asks, in which words, how its figures are to be read (DESIGN section 10).

Everything about a benchmark stands in `configs/benchmark/NAME.yaml`; a new one is such a file, and a reader in
`instructsam.data` if its format is new. Groups of benchmarks are configurations that hold others as ``members``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructsam.data.checks import Skips
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.eval_split import EvalSplit
from instructsam.data.gseval import read_gseval
from instructsam.data.reader_options import reader_options
from instructsam.data.reasonseg import read_reasonseg
from instructsam.data.referring import read_referring
from instructsam.data.release_eval import read_release_eval
from instructsam.data.saco import read_saco
from instructsam.evaluation.runner import EvalItem, spread

logger = logging.getLogger(__name__)

ALL = "all"
"""As a split: every one that the benchmark lists."""


@dataclass(frozen=True)
class Benchmark:
    """One split of a benchmark, and what must be said beside its figures.

    Attributes:
        name, title, split: as configured.
        threshold: score that an instance needs to be kept, as published.
        inclusive: instances with a score of exactly ``threshold`` are kept too.
        min_area: unions of fewer pixels count as an empty prediction; 0 = off.
        headline: keys of the figures that the benchmark is known by, as in ``metrics["overall"]``.
        conventions: how the figures are computed, in words.
        published: figures of others on this split: {system, figure, value}, and ``kind`` where it is of one kind of
            instructions only. Values have the scale of ours, 0...1.
        settings: the configuration.
    """

    name: str
    title: str
    split: str
    threshold: float
    inclusive: bool
    min_area: int
    headline: tuple[str, ...]
    conventions: dict[str, str]
    published: tuple[dict[str, Any], ...]
    settings: dict[str, Any]

    @property
    def keep_above(self) -> float:
        """The ``threshold`` for a segmenter, which keeps score > threshold: just below it where it is inclusive."""
        return float(np.nextafter(np.float32(self.threshold), np.float32(0))) if self.inclusive else self.threshold


def _read_own(root: Path | str, split: str, name: str, skips: Skips | None = None) -> EvalSplit:
    """Own data and the tiny world; ids are those of the file."""
    return EvalSplit(read_coco_instructions(root, split, skips))


READERS: dict[str, Callable[..., EvalSplit]] = {
    "coco_instructions": _read_own,
    "referring": read_referring,
    "release_eval": read_release_eval,
    "reasonseg": read_reasonseg,
    "gseval": read_gseval,
    "saco": read_saco,
}
_SETTINGS = {field.name for field in dataclasses.fields(Benchmark)} - {"settings"}
_SETTINGS |= {"reader", "splits", "prompt", "expected", "limit", "on_bad", "max_bad"}
_OF_GROUP = ("name", "title", "members")


def expand(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The single benchmarks and splits that a configuration asks for, in order.

    A group has ``members`` (name -> settings of a benchmark). What else a group sets, and is not null, replaces that
    setting of every member. ``split`` is one split, a list, or "all".

    Raises:
        ValueError: an empty group, a split that the benchmark does not list, one that is asked twice, a group setting
            that a member does not know.
    """
    found = list(_expand(settings))
    names = [(single["name"], single["split"]) for single in found]
    if repeated := {f"{name} {split}" for name, split in names if names.count((name, split)) > 1}:
        raise ValueError(f"asked for more than once: {', '.join(sorted(repeated))}")
    return found


def _expand(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "members" in settings:
        members = settings["members"]
        if not isinstance(members, Mapping) or not members:
            raise ValueError(f"benchmark {settings.get('name')!r} has no members")
        common = {key: value for key, value in settings.items() if key not in _OF_GROUP and value is not None}
        for member in members.values():
            if unknown := set(common) - set(member):
                raise ValueError(f"benchmark {member.get('name')!r} has no setting {', '.join(sorted(unknown))}")
            yield from _expand({**member, **common})
        return
    splits = settings.get("splits")
    asked = settings.get("split")
    if asked == ALL:
        if not splits:
            raise ValueError(f"benchmark {settings.get('name')!r} does not list its splits: name one, split=...")
        asked = splits
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, list | tuple) or not asked or not all(isinstance(split, str) for split in asked):
        raise ValueError(f"split must be a name, a list of names or {ALL!r}, got {settings.get('split')!r}")
    for split in asked:
        if splits and split not in splits:
            raise ValueError(f"benchmark {settings.get('name')!r} has no split {split!r}, only {', '.join(splits)}")
        yield {**settings, "split": split}


def load_benchmark(settings: Mapping[str, Any]) -> tuple[Benchmark, list[EvalItem]]:
    """Read one benchmark's one split: what is said about it, and its instructions in the order of the files.

    Args:
        settings: one of `expand`'s. ``prompt`` holds ``{text}``, which the data set's own text replaces; with
            ``limit``, that many instructions are taken, spread evenly.

    Raises:
        ValueError: settings that are missing, unknown or out of range, and whatever the reader finds wrong.
    """
    settings = dict(settings)
    reader, options = _reader(settings)
    prompt = settings["prompt"]
    if not isinstance(prompt, str) or "{text}" not in prompt:
        raise ValueError(f"prompt must hold {{text}}, got {prompt!r}")
    threshold = settings["threshold"]
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}")
    min_area = settings.get("min_area", 0)
    if not isinstance(min_area, int) or min_area < 0:
        raise ValueError(f"min_area must be a number of pixels, got {min_area!r}")

    skips = Skips(settings.get("on_bad", "raise"), settings.get("max_bad"))
    read = reader(**options, name=settings["name"], split=settings["split"], skips=skips)
    every = [
        EvalItem(
            sample,
            # Not str.format: texts and templates may hold braces of their own.
            dataclasses.replace(turn, instruction=prompt.replace("{text}", turn.instruction)),
            ignore_rle=read.ignore_rles.get(turn.id),
            text=turn.instruction,
        )
        for sample in read.samples
        for turn in sample.turns
    ]
    items = spread(every, settings.get("limit"))
    inclusive = bool(settings.get("inclusive", False))
    conventions = {
        **settings.get("conventions", {}),
        "prompt": prompt,
        "kept": f"score {'>=' if inclusive else '>'} {threshold}",
        "minimum area": f"a union of fewer than {min_area} pixels counts as empty" if min_area else "off",
        "instructions": _how_many(settings, len(items), len(every)),
    }
    if read.skipped:
        conventions["left out as bad"] = ", ".join(f"{count} {what}" for what, count in sorted(read.skipped.items()))
    published = [dict(entry) for entry in settings.get("published", ())]
    benchmark = Benchmark(
        name=settings["name"],
        title=settings["title"],
        split=settings["split"],
        threshold=float(threshold),
        inclusive=inclusive,
        min_area=min_area,
        headline=tuple(settings["headline"]),
        conventions=conventions,
        published=tuple(entry for entry in published if entry.pop("split", settings["split"]) == settings["split"]),
        settings=settings,
    )
    return benchmark, items


def _reader(settings: Mapping[str, Any]) -> tuple[Callable[..., EvalSplit], dict[str, Any]]:
    """The reader and what it is to be called with, besides name and split."""
    required = ("name", "title", "split", "reader", "prompt", "threshold", "headline")
    if missing := [key for key in required if settings.get(key) is None]:
        raise ValueError(f"benchmark {settings.get('name')!r}: not given: {', '.join(missing)}")
    where = f"benchmark {settings['name']!r}"
    return reader_options(READERS, settings, where, _SETTINGS, ("name", "split", "skips"))


def _how_many(settings: Mapping[str, Any], asked: int, found: int) -> str:
    """The number of instructions in words; a warning where it is not that of the published split."""
    if asked < found:
        return f"{asked:,} of {found:,}, spread evenly"
    expected = (settings.get("expected") or {}).get(settings["split"])
    if expected is None or expected == found:
        return f"{found:,}"
    message = f"{found:,}, but the published split has {expected:,}"
    logger.warning(
        "%s %s: instructions: %s; figures do not compare with published ones",
        settings["name"],
        settings["split"],
        message,
    )
    return message
