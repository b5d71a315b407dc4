"""Measured records in columns: thresholds of the score, groups and resamples are a matter of arithmetic on them.

That works because the kept predictions of a record are always the first of its ranking.

Shapes: R records, P predictions of all records one after another, **each record's in the order of their rank**,
T IoU thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from instructsam.evaluation.overlaps import gather

COUNT_GROUPS = ("0", "1", ">=2")
AREA_GROUPS = ("none", "small", "medium", "large")
LENGTH_GROUPS = ("1-2", "3-5", "6-10", ">10")


@dataclass(frozen=True)
class Measured:
    """What one record contributes. ``hits_TP`` and ``scores_P`` are over all predictions by rank, others over kept."""

    kind: str
    num_truths: int
    num_kept: int
    num_duplicates: int
    intersection: int
    union: int
    is_empty: bool
    phrases_match: bool | None
    hits_TP: NDArray[np.bool_]
    scores_P: NDArray[np.float64]

    @property
    def iou(self) -> float:
        """IoU of the unions; 1 where both are empty."""
        return self.intersection / self.union if self.union else 1.0

    @property
    def count_group(self) -> str:
        """One of ``COUNT_GROUPS``."""
        return COUNT_GROUPS[min(self.num_truths, 2)]


@dataclass(frozen=True)
class Measurements(Sequence[Measured]):
    """Measured records in columns; item i is record i's row.

    The first block does not depend on what is kept. ``area_share_R`` is the mean area of a record's ground truths
    over its image's (NaN without any), ``words_R`` the number of words of its text (0 where it has none),
    ``match_R`` 1 or 0 where phrases can be compared and -1 elsewhere. ``union_area_P`` and ``union_truth_P`` are the
    union of a prediction and all that rank above it, in pixels, alone and within the truths' union.
    """

    ids: NDArray[np.object_]
    images: NDArray[np.object_]
    kinds: NDArray[np.object_]
    num_truths_R: NDArray[np.int64]
    truth_area_R: NDArray[np.int64]
    area_share_R: NDArray[np.float64]
    words_R: NDArray[np.int64]
    match_R: NDArray[np.int8]
    starts: NDArray[np.int64]
    scores_P: NDArray[np.float64]
    hits_TP: NDArray[np.bool_]
    is_duplicate_P: NDArray[np.bool_]
    union_area_P: NDArray[np.int64]
    union_truth_P: NDArray[np.int64]
    concept_R: NDArray[np.float64]
    """(R, 6 + T) what each adds to the figures of SA-Co, see `concept_f1.unit_counts`."""

    # What is kept, and what follows from that.
    num_kept_R: NDArray[np.int64]
    num_duplicates_R: NDArray[np.int64]
    intersection_R: NDArray[np.int64]
    union_R: NDArray[np.int64]
    is_empty_R: NDArray[np.bool_]

    # By which rules, see `at`.
    score_threshold: float | None = None
    min_area: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Measured: ...
    @overload
    def __getitem__(self, index: slice) -> Measurements: ...
    def __getitem__(self, index: int | slice) -> Measured | Measurements:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        r = range(len(self))[index]
        own = slice(self.starts[r], self.starts[r + 1])
        return Measured(
            kind=cast(str, self.kinds[r]),
            num_truths=int(self.num_truths_R[r]),
            num_kept=int(self.num_kept_R[r]),
            num_duplicates=int(self.num_duplicates_R[r]),
            intersection=int(self.intersection_R[r]),
            union=int(self.union_R[r]),
            is_empty=bool(self.is_empty_R[r]),
            phrases_match=None if self.match_R[r] < 0 else bool(self.match_R[r]),
            hits_TP=self.hits_TP[:, own],
            scores_P=self.scores_P[own],
        )

    def __iter__(self) -> Iterator[Measured]:
        return (self[r] for r in range(len(self)))

    @property
    def iou_R(self) -> NDArray[np.float64]:
        """IoU of each record's unions; 1 where both are empty."""
        return np.where(self.union_R > 0, self.intersection_R / np.maximum(self.union_R, 1), 1.0)

    @property
    def count_groups(self) -> NDArray[np.object_]:
        """(R,) one of ``COUNT_GROUPS``."""
        return np.array(COUNT_GROUPS, dtype=object)[np.minimum(self.num_truths_R, 2)]

    @property
    def area_groups(self) -> NDArray[np.object_]:
        """(R,) one of ``AREA_GROUPS``."""
        share_R = self.area_share_R
        group_R = np.select([np.isnan(share_R), share_R < 0.01, share_R <= 0.1], [0, 1, 2], default=3)
        return np.array(AREA_GROUPS, dtype=object)[group_R]

    @property
    def length_groups(self) -> NDArray[np.object_]:
        """(R,) one of ``LENGTH_GROUPS``, or "" without words."""
        group_R = np.select([self.words_R == 0, self.words_R <= 2, self.words_R <= 5, self.words_R <= 10], range(4), 4)
        return np.array(("", *LENGTH_GROUPS), dtype=object)[group_R]

    def count_per_record(self, flags_P: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(R,) how many of each record's predictions are flagged."""
        running = np.concatenate([[0], np.cumsum(flags_P)])
        return running[self.starts[1:]] - running[self.starts[:-1]]

    def select(self, index_R: NDArray[Any]) -> Measurements:
        """The records at these indices (or where a boolean column is true), in that order."""
        if index_R.dtype == np.bool_:
            index_R = np.flatnonzero(index_R)
        lengths = np.diff(self.starts)[index_R]
        at_P = gather(np.arange(len(self.scores_P)), self.starts[:-1][index_R], lengths)
        columns: dict[str, Any] = {}
        for name, column in vars(self).items():
            if name == "hits_TP":
                columns[name] = column[:, at_P]
            elif name in ("score_threshold", "min_area"):
                columns[name] = column
            elif name != "starts":
                columns[name] = column[at_P if name.endswith("_P") else index_R]
        return Measurements(**columns, starts=np.concatenate([[0], np.cumsum(lengths)]))

    def at(self, score_threshold: float | None, min_area: int = 0) -> Measurements:
        """The same records with predictions of score > threshold kept (all for None); see `evaluate_records`."""
        kept_P = np.ones(len(self.scores_P), np.bool_) if score_threshold is None else self.scores_P > score_threshold
        num_kept_R = self.count_per_record(kept_P)
        has_R = num_kept_R > 0
        last_R = (self.starts[:-1] + num_kept_R - 1)[has_R]
        area_R, shared_R = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        area_R[has_R], shared_R[has_R] = self.union_area_P[last_R], self.union_truth_P[last_R]
        is_empty_R = area_R < max(min_area, 1)
        return replace(
            self,
            num_kept_R=num_kept_R,
            num_duplicates_R=self.count_per_record(kept_P & self.is_duplicate_P),
            intersection_R=np.where(is_empty_R, 0, shared_R),
            union_R=self.truth_area_R + np.where(is_empty_R, 0, area_R - shared_R),
            is_empty_R=is_empty_R,
            score_threshold=score_threshold,
            min_area=min_area,
        )
