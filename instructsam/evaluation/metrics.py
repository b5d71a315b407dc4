"""Figures of an evaluation, as pure functions on plain records: no model, no torch (DESIGN section 10).

A record is a dict for one instruction:

    id, height, width               what it is called, and the image's size in pixels
    gt_rles                         masks that the instruction asks for; none = no-target
    pred_rles, pred_scores          predicted masks and their scores
    kind                            optional: instruction kind; figures are broken down by it
    pred_phrase_ids                 optional: index of each prediction's phrase (all of one phrase if absent)
    pred_phrases, gt_phrases        optional: phrases written, and phrases that should have been
    ignore_rle                      optional: pixels that count for neither side in unions (ReasonSeg's label 255)

Whatever else a record holds is left alone. ``CONVENTIONS`` says in words what every figure means; it is published
beside the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam import masks
from instructsam.evaluation.average_precision import IOU_THRESHOLDS, average_precision, match_predictions, rank
from instructsam.structures import RLE

DUPLICATE_IOU = 0.7
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

CONVENTIONS: dict[str, str] = {
    "unit": "one instruction; every id is scored once",
    "empty": "a prediction is empty if the union of its kept masks has no pixel; no-target = no ground-truth mask",
    "iou of an instruction": "union of the kept masks against the union of the ground truths; 1 if both are empty, "
    "0 if only one is",
    "giou": "mean IoU of the instructions (the mIoU of RefCOCO); each IoU is rounded to single precision, as the "
    "released evaluation does",
    "ciou": "summed intersections / summed unions (oIoU); empty on both sides adds nothing, a prediction on a "
    "no-target instruction adds its area to the unions, an empty prediction adds the ground truth's; 0 where "
    "the unions sum to 0",
    "AP": "class-agnostic; predictions of all instructions pooled and ranked by score (equal scores: in the order of "
    "the records); each matched to the ground truth of highest IoU among the unused ones of its own instruction, a "
    "hit if IoU >= threshold; all-point interpolation; recall over all ground truths; predictions on no-target "
    "instructions are false positives; 0 where there is no ground truth",
    "mAP": "mean of AP at IoU 0.50, 0.55, ..., 0.95",
    "P@t": "share of instructions with IoU >= t",
    "n_acc": "share of no-target instructions with an empty prediction",
    "t_acc": "share of instructions with a target whose prediction is not empty",
    "duplicate_rate": "share of kept predictions that overlap a kept prediction of higher score (equal scores: listed "
    f"earlier) of the same phrase with IoU > {DUPLICATE_IOU}",
    "count_error": "mean absolute difference between the numbers of kept predictions and of ground truths",
    "phrase_accuracy": "share of instructions whose phrases are exactly those of the reference, in order",
}

COUNT_GROUPS = ("0", "1", ">=2")


def evaluate_records(
    records: Iterable[Mapping[str, Any]], *, score_threshold: float | None = None, min_area: int = 0
) -> dict[str, Any]:
    """All figures of a set of records.

    Args:
        records: at least one record; their order decides between equal scores in AP.
        score_threshold: keep predictions with score > this for every figure but AP, which ranks all that are listed.
            None where the records hold kept predictions only.
        min_area: a prediction whose union covers fewer pixels counts as empty (gRefCOCO's optional rule uses 50).

    Returns:
        ``overall``, ``by_kind`` (kind -> figures) and ``by_count`` ("0", "1", ">=2" ground truths -> figures; groups
        without records are left out), and ``conventions``. Figures are numbers in 0...1, counts, or None where there
        is nothing to measure (such as ``n_acc`` without no-target instructions).

    Raises:
        ValueError: for no records, an id that occurs twice, or a malformed record, which is named with the reason.
    """
    records = list(records)
    if not records:
        raise ValueError("no records to evaluate")
    measured = [
        _measure(record, instances, score_threshold, min_area)
        for record, instances in zip(records, check_records(records), strict=True)
    ]
    kinds = sorted({one.kind for one in measured if one.kind})
    by_count = {group: [one for one in measured if one.count_group == group] for group in COUNT_GROUPS}
    return {
        "overall": summarise(measured),
        "by_kind": {kind: summarise([one for one in measured if one.kind == kind]) for kind in kinds},
        "by_count": {group: summarise(members) for group, members in by_count.items() if members},
        "conventions": {
            **CONVENTIONS,
            "kept": "score > score_threshold; all that the records list if that is none",
            "score_threshold": score_threshold,
            "min_area": min_area,
        },
    }


@dataclass(frozen=True)
class Measured:
    """What one record contributes. ``hits_TP`` and ``scores_P`` are over all predictions listed, the rest over kept."""

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


def _measure(
    record: Mapping[str, Any], instances: RecordMasks, score_threshold: float | None, min_area: int
) -> Measured:
    truths, predictions, scores_P = instances.truths, instances.predictions, np.array(record["pred_scores"], np.float64)
    ious = masks.pairwise_iou(predictions, predictions + truths, checked=True)
    ious_PP, ious_PG = ious[:, : len(predictions)], ious[:, len(predictions) :]

    kept_P = np.ones(len(predictions), dtype=np.bool_) if score_threshold is None else scores_P > score_threshold
    kept = [rle for rle, keep in zip(predictions, kept_P.tolist(), strict=True) if keep]
    intersection, union, is_empty = _overlap(kept, instances, int(record["height"]), int(record["width"]), min_area)

    phrases_match = None
    if record.get("pred_phrases") is not None and record.get("gt_phrases") is not None:
        phrases_match = list(record["pred_phrases"]) == list(record["gt_phrases"])
    return Measured(
        kind=record.get("kind") or "",
        num_truths=len(truths),
        num_kept=len(kept),
        num_duplicates=count_duplicates(ious_PP, scores_P, kept_P, record.get("pred_phrase_ids")),
        intersection=intersection,
        union=union,
        is_empty=is_empty,
        phrases_match=phrases_match,
        hits_TP=match_predictions(ious_PG, scores_P),
        scores_P=scores_P,
    )


def _overlap(kept: list[RLE], instances: RecordMasks, height: int, width: int, min_area: int) -> tuple[int, int, bool]:
    """Intersection and union of the two sides in pixels, without ignored ones; and whether the prediction is empty."""
    ignored = instances.ignored
    kept_union = masks.union([*kept, *ignored], height, width, checked=True)
    truth_union = masks.union([*instances.truths, *ignored], height, width, checked=True)
    both = masks.union([kept_union, truth_union], height, width, checked=True)
    areas = masks.areas([kept_union, truth_union, both, *ignored], checked=True).tolist()
    area_ignored = areas[3] if ignored else 0
    area_kept, area_truth, union = (area - area_ignored for area in areas[:3])
    if area_kept < max(min_area, 1):
        return 0, area_truth, True
    return area_kept + area_truth - union, union, False


def count_duplicates(
    ious_PP: NDArray[np.float64],
    scores_P: NDArray[np.float64],
    kept_P: NDArray[np.bool_],
    phrase_P: Sequence[int] | None = None,
) -> int:
    """Number of kept predictions that overlap another of higher rank and the same phrase (IoU > ``DUPLICATE_IOU``)."""
    if kept_P.sum() < 2:
        return 0
    order = rank(scores_P)
    order = order[kept_P[order]]
    overlaps = ious_PP[np.ix_(order, order)] > DUPLICATE_IOU
    if phrase_P is not None:
        phrases = np.asarray(phrase_P)[order]
        overlaps &= phrases[:, None] == phrases[None, :]
    return int(np.tril(overlaps, k=-1).any(axis=1).sum())


def summarise(measured: Sequence[Measured]) -> dict[str, float | int | None]:
    """Figures of a group of measured records (at least one); keys as in ``CONVENTIONS`` and "AP@0.50" ... "AP@0.95"."""
    assert measured, "a group without records has no figures"
    ious = np.array([one.iou for one in measured])
    intersection, union = sum(one.intersection for one in measured), sum(one.union for one in measured)
    num_truths, num_kept = sum(one.num_truths for one in measured), sum(one.num_kept for one in measured)
    hits_TP = np.concatenate([one.hits_TP for one in measured], axis=1)
    ap_T = average_precision(hits_TP, np.concatenate([one.scores_P for one in measured]), num_truths)
    at = {f"{threshold:.2f}": float(ap) for threshold, ap in zip(IOU_THRESHOLDS, ap_T, strict=True)}
    return {
        "num_samples": len(measured),
        "num_gt_instances": num_truths,
        "num_pred_instances": hits_TP.shape[1],
        "num_kept_instances": num_kept,
        "mAP": float(ap_T.mean()),
        "AP50": at["0.50"],
        "AP75": at["0.75"],
        **{f"AP@{threshold}": ap for threshold, ap in at.items()},
        "giou": float(ious.astype(np.float32).astype(np.float64).mean()),
        "ciou": intersection / union if union else 0.0,
        **{f"P@{threshold}": float((ious >= threshold).mean()) for threshold in PRECISION_THRESHOLDS},
        "n_acc": _share(one.is_empty for one in measured if one.num_truths == 0),
        "t_acc": _share(not one.is_empty for one in measured if one.num_truths > 0),
        "duplicate_rate": sum(one.num_duplicates for one in measured) / num_kept if num_kept else None,
        "count_error": float(np.mean([abs(one.num_kept - one.num_truths) for one in measured])),
        "phrase_accuracy": _share(one.phrases_match for one in measured if one.phrases_match is not None),
        "intersection": intersection,
        "union": union,
    }


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


# ---- checking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordMasks:
    """The checked masks of a record; ``ignored`` holds one mask or none."""

    truths: list[RLE]
    predictions: list[RLE]
    ignored: list[RLE]


def check_records(records: Sequence[Mapping[str, Any]]) -> list[RecordMasks]:
    """Check records and return their masks in canonical form.

    Raises:
        ValueError: naming the record and the reason, for the first that is malformed or whose id occurs twice.
    """
    seen: set[Any] = set()
    found: list[
        tuple[str, Any, list[int]]
    ] = []  # every mask of every record: its name, the code, the size it must have
    for index, record in enumerate(records):
        has_id = isinstance(record, Mapping) and "id" in record
        name = f"record {record['id']!r}" if has_id else f"record at index {index}"
        try:
            _check_fields(record)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if record["id"] in seen:
            raise ValueError(f"{name}: occurs twice, the same instruction may be scored once only")
        seen.add(record["id"])
        size = [int(record["height"]), int(record["width"])]
        for key in ("gt_rles", "pred_rles"):
            found += [(f"{name}: {key}[{at}]", rle, size) for at, rle in enumerate(record[key])]
        if record.get("ignore_rle") is not None:
            found.append((f"{name}: ignore_rle", record["ignore_rle"], size))

    # In one go, since the check has a cost per call.
    rles = masks.check_rles([rle for _, rle, _ in found], what=lambda index: found[index][0])
    for rle, (name, _, size) in zip(rles, found, strict=True):
        if rle["size"] != size:
            raise ValueError(f"{name}: size (height, width) is {rle['size']}, but the record's is {size}")
    checked, end = [], 0
    for record in records:
        start, middle = end, end + len(record["gt_rles"])
        stop = middle + len(record["pred_rles"])
        end = stop + (record.get("ignore_rle") is not None)
        checked.append(RecordMasks(rles[start:middle], rles[middle:stop], rles[stop:end]))
    return checked


def _check_fields(record: Any) -> None:
    """Everything about a record but its masks."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a dict, got {type(record).__name__}")
    required = ("id", "height", "width", "gt_rles", "pred_rles", "pred_scores")
    if missing := [key for key in required if key not in record]:
        raise ValueError(f"has no {', '.join(missing)}")
    if not isinstance(record["id"], str | int):
        raise ValueError(f"id must be a string or an integer, got {record['id']!r}")
    for key in ("height", "width"):
        if not isinstance(record[key], int | np.integer) or isinstance(record[key], bool) or record[key] <= 0:
            raise ValueError(f"{key} must be a positive integer, got {record[key]!r}")
    if not isinstance(record.get("kind") or "", str):
        raise ValueError(f"kind must be a string, got {record['kind']!r}")
    lists = ("gt_rles", "pred_rles", "pred_scores", "pred_boxes", "pred_phrase_ids", "pred_phrases", "gt_phrases")
    for key in lists:
        value = record.get(key)
        if not isinstance(value, list | tuple) and (value is not None or key in required):
            raise ValueError(f"{key} must be a list, got {type(value).__name__}")
    for key in ("pred_scores", "pred_boxes", "pred_phrase_ids"):
        if record.get(key) is not None and len(record[key]) != len(record["pred_rles"]):
            raise ValueError(f"has {len(record['pred_rles'])} pred_rles, but {len(record[key])} {key}")
    for index, score in enumerate(record["pred_scores"]):
        if not isinstance(score, int | float | np.number) or not math.isfinite(score):
            raise ValueError(f"pred_scores[{index}] is {score!r}, not a finite number")
    for key in ("pred_phrases", "gt_phrases"):
        if not all(isinstance(phrase, str) for phrase in record.get(key) or ()):
            raise ValueError(f"{key} must be a list of strings, got {record[key]!r}")
    num_phrases = math.inf if record.get("pred_phrases") is None else len(record["pred_phrases"])
    for index, phrase_id in enumerate(record.get("pred_phrase_ids") or ()):
        if not isinstance(phrase_id, int | np.integer) or not 0 <= phrase_id < num_phrases:
            raise ValueError(f"pred_phrase_ids[{index}] is {phrase_id!r}, not the index of one of its phrases")
