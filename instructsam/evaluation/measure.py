"""From records to `Measurements`: checks them and looks at their masks once, whatever is computed afterwards.

Shapes: R records of one group (the same numbers of masks) or of all, P predictions **in the order of their rank**,
M masks of a record, T IoU thresholds, G ground truths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam import masks
from instructsam.evaluation.average_precision import IOU_THRESHOLDS, match_ranked
from instructsam.evaluation.concept_f1 import KEEP_SCORE, assigned_hits, unit_counts
from instructsam.evaluation.measured import AREA_GROUPS, COUNT_GROUPS, LENGTH_GROUPS, Measured, Measurements
from instructsam.evaluation.overlaps import overlaps
from instructsam.evaluation.records import checked

__all__ = ["AREA_GROUPS", "COUNT_GROUPS", "DUPLICATE_IOU", "LENGTH_GROUPS", "Measured", "Measurements", "measure"]

DUPLICATE_IOU = 0.7
_CHUNK_MASKS = 500  # whose run lengths are held at once: few enough that memory is used again, not asked for anew


def measure(
    records: Iterable[Mapping[str, Any]], score_threshold: float | None = None, min_area: int = 0
) -> Measurements:
    """Check and measure records; arguments as `metrics.evaluate_records`.

    Raises:
        ValueError: for no records, an id that occurs twice, or a malformed record, which is named with the reason.
    """
    records, names = checked(records)
    lengths = np.array([len(record["pred_rles"]) for record in records])
    starts, total, size = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum()), len(records)
    columns = Measurements(
        ids=_objects([record["id"] for record in records]),
        images=_objects([record.get("image") for record in records]),
        kinds=_objects([record.get("kind") or "" for record in records]),
        num_truths_R=np.array([len(record["gt_rles"]) for record in records]),
        truth_area_R=np.zeros(size, np.int64),
        area_share_R=np.full(size, np.nan),
        words_R=np.array([len((record.get("text") or record.get("instruction") or "").split()) for record in records]),
        match_R=np.array([_phrases_match(record) for record in records], dtype=np.int8),
        starts=starts,
        scores_P=np.zeros(total),
        hits_TP=np.zeros((len(IOU_THRESHOLDS), total), np.bool_),
        is_duplicate_P=np.zeros(total, np.bool_),
        union_area_P=np.zeros(total, np.int64),
        union_truth_P=np.zeros(total, np.int64),
        concept_R=np.zeros((size, 6 + len(IOU_THRESHOLDS))),
        num_kept_R=np.zeros(size, np.int64),
        num_duplicates_R=np.zeros(size, np.int64),
        intersection_R=np.zeros(size, np.int64),
        union_R=np.zeros(size, np.int64),
        is_empty_R=np.zeros(size, np.bool_),
    )
    first = 0
    while first < size:
        stop, held = first, 0
        while stop < size and (stop == first or held < _CHUNK_MASKS):
            held += len(records[stop]["gt_rles"]) + len(records[stop]["pred_rles"])
            stop += 1
        _fill(columns, records, names, range(first, stop))
        first = stop
    return columns.at(score_threshold, min_area)


def _fill(columns: Measurements, records: Sequence[Mapping[str, Any]], names: Sequence[str], chunk: range) -> None:
    """Look at the masks of some records and write down what follows in the columns."""
    listed: list[Any] = []
    groups: dict[tuple[int, int, int], list[int]] = {}
    begins: dict[int, int] = {}
    for r in chunk:
        record, begins[r] = records[r], len(listed)
        ignored = [] if record.get("ignore_rle") is None else [record["ignore_rle"]]
        listed += [*record["pred_rles"], *record["gt_rles"], *ignored]
        groups.setdefault((len(record["pred_rles"]), len(record["gt_rles"]), len(ignored)), []).append(r)

    def name(index: int) -> str:
        r = max(r for r in chunk if begins[r] <= index and (r == chunk[-1] or begins[r + 1] > index))
        at, num = index - begins[r], len(records[r]["pred_rles"])
        if at < num:
            return f"{names[r]}: pred_rles[{at}]"
        return f"{names[r]}: " + (f"gt_rles[{at - num}]" if at - num < len(records[r]["gt_rles"]) else "ignore_rle")

    sizes, counts_flat, starts = masks.check_runs(listed, name)
    due_R2 = np.array([[int(records[r]["height"]), int(records[r]["width"])] for r in chunk])
    due = np.repeat(due_R2, np.diff([*begins.values(), len(listed)]), axis=0)
    if (wrong := (sizes != due).any(axis=1)).any():
        at = int(wrong.argmax())
        raise ValueError(
            f"{name(at)}: size (height, width) is {sizes[at].tolist()}, but the record's is {due[at].tolist()}"
        )

    for (num_predictions, num_truths, num_ignored), members in groups.items():
        rows = np.array(members)
        scores_RP = np.array([records[r]["pred_scores"] for r in members], np.float64).reshape(len(rows), -1)
        ranks_RP = np.argsort(-scores_RP, axis=1, kind="stable")
        first_R = np.array([begins[r] for r in members])
        sizes_R2 = due_R2[rows - chunk[0]]
        found = overlaps(counts_flat, starts, first_R, ranks_RP, sizes_R2, num_truths, num_ignored)

        columns.truth_area_R[rows] = found.truth_area_R
        if num_truths:
            columns.area_share_R[rows] = found.truth_area_RG.mean(axis=1) / sizes_R2.prod(axis=1)
        ious_RPG = found.ious_RPG
        num_kept_R = (scores_RP >= KEEP_SCORE).sum(axis=1)
        hits_RT = assigned_hits(ious_RPG, num_kept_R)
        columns.concept_R[rows] = unit_counts(hits_RT, num_kept_R, columns.num_truths_R[rows])
        at_RP = columns.starts[rows][:, None] + np.arange(num_predictions)
        columns.scores_P[at_RP] = np.take_along_axis(scores_RP, ranks_RP, axis=1)
        columns.union_area_P[at_RP] = found.union_area_RP
        columns.union_truth_P[at_RP] = found.union_truth_RP
        columns.hits_TP[:, at_RP] = match_ranked(ious_RPG, IOU_THRESHOLDS).transpose(1, 0, 2)
        columns.is_duplicate_P[at_RP] = _duplicates(found.ious_RPP, _phrases(records, members, ranks_RP))


def _duplicates(ious_RPP: NDArray[np.float64], phrase_RP: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which predictions (by rank) overlap another of higher rank and the same phrase with IoU > ``DUPLICATE_IOU``."""
    overlap_RPP = (ious_RPP > DUPLICATE_IOU) & (phrase_RP[:, :, None] == phrase_RP[:, None, :])
    return np.tril(overlap_RPP, k=-1).any(axis=2)


def _phrases(
    records: Sequence[Mapping[str, Any]], members: Sequence[int], ranks_RP: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(R, P) index of the phrase of each prediction by rank; 0 where a record does not say."""
    listed = [records[r].get("pred_phrase_ids") for r in members]
    phrase_RP = np.zeros(ranks_RP.shape, np.int64)
    for row, phrases in enumerate(listed):
        if phrases is not None:
            phrase_RP[row] = phrases
    return np.take_along_axis(phrase_RP, ranks_RP, axis=1)


def _phrases_match(record: Mapping[str, Any]) -> int:
    written, due = record.get("pred_phrases"), record.get("gt_phrases")
    return -1 if written is None or due is None else int(list(written) == list(due))


def _objects(values: list[Any]) -> NDArray[np.object_]:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
