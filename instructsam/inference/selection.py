"""Which instances of an answer are kept: by score, without duplicates, the best few."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeVar

from instructsam.masks import pairwise_iou
from instructsam.structures import Instance

AnyInstance = TypeVar("AnyInstance", bound=Instance)


def check_selection(threshold: float, top_k: int | None, nms_iou: float | None) -> None:
    """Raise ValueError for choices that `select` cannot take."""
    if not _is(Real, threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}: must be a number between 0 and 1")
    if top_k is not None and (not _is(Integral, top_k) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: must be a whole number of at least 1, or None for all")
    if nms_iou is not None and (not _is(Real, nms_iou) or not 0 < nms_iou <= 1):
        message = f"nms_iou={nms_iou!r}: must be a number greater than 0 and at most 1, or None for no suppression"
        raise ValueError(message)


def _is(kind: type, value: object) -> bool:
    """Whether it is such a number; numpy's are, and a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def select(
    instances: Sequence[AnyInstance], threshold: float = 0.0, top_k: int | None = None, nms_iou: float | None = None
) -> tuple[AnyInstance, ...]:
    """The instances that are kept, in their order.

    Args:
        threshold: those with score > threshold.
        nms_iou: of two of one phrase whose masks overlap with an IoU above it, the one with the higher score. (Two
            phrases may well mean the same thing.)
        top_k: after that, the so many highest scores.

    Raises:
        ValueError: see `check_selection`.
    """
    check_selection(threshold, top_k, nms_iou)
    kept = [k for k, instance in enumerate(instances) if instance.score > threshold]
    kept.sort(key=lambda k: -instances[k].score)
    if nms_iou is not None:
        kept = _without_duplicates(instances, kept, nms_iou)
    return tuple(instances[k] for k in sorted(kept[:top_k]))


def _without_duplicates(instances: Sequence[Instance], by_score: list[int], limit: float) -> list[int]:
    kept: list[int] = []
    for phrase in {instances[k].phrase_index for k in by_score}:
        own = [k for k in by_score if instances[k].phrase_index == phrase]
        masks = [instances[k].rle for k in own]
        overlaps = pairwise_iou(masks, masks, checked=True)
        best: list[int] = []
        for place in range(len(own)):
            if not best or overlaps[place, best].max() <= limit:
                best.append(place)
        kept += [own[place] for place in best]
    chosen = set(kept)
    return [k for k in by_score if k in chosen]
