"""What a training set is made of: sizes of pictures and masks, how much an instruction asks for, of what kind it is.

Samples, as one epoch asks them, become small `Facts`, and these become figures; a sample without a turn counts nowhere.
Sources of which only some samples were measured, or that an epoch sees several times, count with a weight, so that the
figures of all together are those of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from instructsam import masks
from instructsam.structures import Sample

Bins = Sequence[tuple[str, float]]  # names and upper ends; a value is in the first bin whose end it does not exceed

FEW: Bins = [*((str(number), number) for number in range(11)), (">10", np.inf)]
TURNS: Bins = [*((str(n), n) for n in range(1, 6)), ("≤8", 8), ("≤12", 12), ("≤20", 20), ("≤40", 40), (">40", np.inf)]
WORDS: Bins = [*((str(n), n) for n in range(7)), ("≤8", 8), ("≤12", 12), ("≤20", 20), ("≤40", 40), (">40", np.inf)]
AREA: Bins = [(f"≤{percent:g}", percent / 100) for percent in (0.01, 0.1, 0.3, 1, 3, 10, 30, 100)]
SIDE: Bins = [*((f"≤{end}", end) for end in (128, 256, 512, 640, 1024, 2048)), (">2048", np.inf)]

QUANTITIES: dict[str, tuple[str, str, str, Bins]] = {
    "instances_per_instruction": ("Instances an instruction asks for", "instances", "instructions", FEW),
    "instances_per_phrase": ("Instances of a phrase", "instances", "phrases", FEW),
    "phrases_per_instruction": ("Phrases of an answer", "phrases", "instructions", FEW),
    "turns_per_sample": ("Instructions asked of a sample at once", "instructions", "samples", TURNS),
    "phrase_words": ("Words of a phrase", "words", "phrases", WORDS),
    "instruction_words": ("Words of an instruction", "words, without those of a template", "instructions", WORDS),
    "mask_area": ("Area of an instance", "% of the picture", "instances", AREA),
    "longest_side": ("Longest side of a picture", "pixels", "samples", SIDE),
}
"""Name -> title, unit, what is counted, bins."""


class TurnFacts(NamedTuple):
    """Of one turn. ``phrases``: (words, instances, boxes only) of each."""

    kind: str
    form: str
    words: int
    phrases: tuple[tuple[int, int, bool], ...]


class Facts(NamedTuple):
    """What is kept of a sample.

    Attributes:
        areas: of all instances, as shares of the picture.
    """

    height: int
    width: int
    turns: tuple[TurnFacts, ...]
    areas: tuple[float, ...]


def facts_of(sample: Sample) -> Facts:
    """Measure one sample."""
    turns = tuple(
        TurnFacts(
            turn.kind,
            turn.form,
            len(turn.instruction.split()),
            tuple((len(phrase.text.split()), len(phrase.rles), phrase.box_only) for phrase in turn.phrases),
        )
        for turn in sample.turns
    )
    rles = [rle for turn in sample.turns for phrase in turn.phrases for rle in phrase.rles]
    areas = masks.areas(rles, checked=True) / max(sample.height * sample.width, 1)
    return Facts(sample.height, sample.width, turns, tuple(areas.tolist()))


def statistics(groups: Sequence[tuple[Sequence[Facts], float]]) -> dict[str, Any]:
    """The figures of one or several groups of samples.

    Args:
        groups: samples, and the weight of each of them.

    Returns:
        Each of `QUANTITIES`: see `describe`. ``no_target``, ``text_only`` (no phrase in the answer) and ``boxes_only``:
        shares of the instructions. ``kinds``, ``forms``: shares of the instructions by name, the largest first.
    """
    values: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    weights: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    kinds: dict[str, float] = {}
    forms: dict[str, float] = {}
    shares = {"no_target": 0.0, "text_only": 0.0, "boxes_only": 0.0}
    turns_weight = 0.0

    def add(name: str, weight: float, *found: float) -> None:
        values[name].extend(found)
        weights[name].extend([weight] * len(found))

    for samples, weight in groups:
        for facts in (one for one in samples if one.turns):
            add("turns_per_sample", weight, len(facts.turns))
            add("mask_area", weight, *facts.areas)
            if facts.height:
                add("longest_side", weight, max(facts.height, facts.width))
            for turn in facts.turns:
                turns_weight += weight
                kinds[turn.kind] = kinds.get(turn.kind, 0.0) + weight
                forms[turn.form] = forms.get(turn.form, 0.0) + weight
                add("instruction_words", weight, turn.words)
                instances = sum(count for _, count, _ in turn.phrases)
                shares["text_only"] += weight * (not turn.phrases)
                shares["no_target"] += weight * (bool(turn.phrases) and not instances)
                shares["boxes_only"] += weight * any(box_only for _, _, box_only in turn.phrases)
                if turn.phrases:
                    add("instances_per_instruction", weight, instances)
                    add("phrases_per_instruction", weight, len(turn.phrases))
                    add("phrase_words", weight, *(words for words, _, _ in turn.phrases))
                    add("instances_per_phrase", weight, *(count for _, count, _ in turn.phrases))
    found = {name: describe(values[name], weights[name], bins) for name, (_, _, _, bins) in QUANTITIES.items()}
    total = max(turns_weight, np.finfo(float).tiny)
    return {
        **found,
        **{name: share / total for name, share in shares.items()},
        "kinds": _shares(kinds, total),
        "forms": _shares(forms, total),
    }


def describe(values: ArrayLike, weights: ArrayLike, bins: Bins) -> dict[str, Any]:
    """Mean, median, 5 %, 95 %, smallest and largest of weighted values, and the share of each bin.

    Of no values, the figures are None and the shares 0.
    """
    array, weight = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    names = [name for name, _ in bins]
    if not len(array):
        return dict.fromkeys(("mean", "median", "p5", "p95", "min", "max")) | {"bins": dict.fromkeys(names, 0.0)}
    ends = np.array([end for _, end in bins])
    filled = np.bincount(np.searchsorted(ends, array, side="left"), weights=weight, minlength=len(bins))
    p5, median, p95 = _quantiles(array, weight, (0.05, 0.5, 0.95))
    return {
        "mean": float(np.average(array, weights=weight)),
        "median": median,
        "p5": p5,
        "p95": p95,
        "min": float(array.min()),
        "max": float(array.max()),
        "bins": dict(zip(names, (filled / weight.sum()).tolist(), strict=True)),
    }


def _quantiles(values: NDArray[np.float64], weights: NDArray[np.float64], at: Sequence[float]) -> list[float]:
    """The smallest values that such a share of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    # A little less than the share, so that the rounding of sums does not lead one value too far.
    places = np.searchsorted(reached, np.asarray(at) * reached[-1] * (1 - 1e-9))
    return values[order][np.minimum(places, len(values) - 1)].tolist()


def _shares(weights: Mapping[str, float], total: float) -> dict[str, float]:
    return {name: weight / total for name, weight in sorted(weights.items(), key=lambda item: (-item[1], item[0]))}
