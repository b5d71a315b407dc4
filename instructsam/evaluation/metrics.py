"""Figures of an evaluation, as pure functions on plain records: no model, no torch (DESIGN section 10).

A record is a dict for one instruction:

    id, height, width               what it is called, and the image's size in pixels
    gt_rles                         masks that the instruction asks for; none = no-target
    pred_rles, pred_scores          predicted masks and their scores
    kind                            optional: instruction kind; figures are broken down by it
    text, instruction               optional: the expression without and with its prompt, for the number of words
    image                           optional: instructions about one image are resampled together (`bootstrap`)
    pred_phrase_ids                 optional: index of each prediction's phrase (all of one phrase if absent)
    pred_phrases, gt_phrases        optional: phrases written, and phrases that should have been
    ignore_rle                      optional: pixels that count for neither side in unions (ReasonSeg's label 255)

Whatever else a record holds is left alone. ``CONVENTIONS`` says in words what every figure means; it is published
beside the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam.evaluation import concept_f1
from instructsam.evaluation.average_precision import IOU_THRESHOLDS, average_precision
from instructsam.evaluation.measure import (
    AREA_GROUPS,
    COUNT_GROUPS,
    DUPLICATE_IOU,
    LENGTH_GROUPS,
    Measured,
    Measurements,
    measure,
)

__all__ = ["CONVENTIONS", "Measured", "Measurements", "evaluate_records", "measure", "summarise", "summarise_groups"]

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
    "AP of COCO": "not what is shown as AP: it averages the same interpolated precision at the 101 recalls 0, 0.01, "
    "..., 1 instead of at every ground truth, and takes at most 100 predictions of an instruction",
    "n_acc": "share of no-target instructions with an empty prediction; also called no_target_accuracy",
    "t_acc": "share of instructions with a target whose prediction is not empty",
    "duplicate_rate": "share of kept predictions that overlap a kept prediction of higher score (equal scores: listed "
    f"earlier) of the same phrase with IoU > {DUPLICATE_IOU}",
    "count_error": "mean absolute difference between the numbers of kept predictions and of ground truths",
    "phrase_accuracy": "share of instructions whose phrases are exactly those of the reference, in order",
    **concept_f1.CONVENTIONS,
    "by_area": "mean area of an instruction's ground truths over the image's: small < 1 %, medium 1...10 %, "
    "large > 10 %",
    "by_phrase_length": "words of the expression, or of the instruction where the records do not hold it",
}


def evaluate_records(
    records: Measurements | Iterable[Mapping[str, Any]], *, score_threshold: float | None = None, min_area: int = 0
) -> dict[str, Any]:
    """All figures of a set of records.

    Args:
        records: at least one record; their order decides between equal scores in AP. Or what `measure` returned for
            them, with the rules that it was given: then the two below have no effect.
        score_threshold: keep predictions with score > this for every figure but AP, which ranks all that are listed.
            None where the records hold kept predictions only.
        min_area: a prediction whose union covers fewer pixels counts as empty (gRefCOCO's optional rule uses 50).

    Returns:
        ``overall``, and groups (name -> figures; those without records are left out): ``by_kind``, ``by_count``
        ("0", "1", ">=2" ground truths), ``by_area`` ("none", "small", "medium", "large") and ``by_phrase_length``
        ("1-2", "3-5", "6-10", ">10" words); and ``conventions``. Figures are numbers in 0...1 (IL_MCC and cgF1:
        -1...1), counts, or None where there is nothing to measure (such as ``n_acc`` without no-target instructions).

    Raises:
        ValueError: for no records, an id that occurs twice, or a malformed record, which is named with the reason.
    """
    measured = records if isinstance(records, Measurements) else measure(records, score_threshold, min_area)
    return {
        "overall": summarise(measured),
        **summarise_groups(measured),
        "conventions": {
            **CONVENTIONS,
            "kept": "score > score_threshold; all that the records list if that is none",
            "score_threshold": measured.score_threshold,
            "min_area": measured.min_area,
        },
    }


def summarise_groups(measured: Measurements) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """``by_kind``, ``by_count``, ``by_area`` and ``by_phrase_length`` of `evaluate_records`."""
    kinds = tuple(sorted(set(measured.kinds.tolist()) - {""}))
    columns = {
        "by_kind": (kinds, measured.kinds),
        "by_count": (COUNT_GROUPS, measured.count_groups),
        "by_area": (AREA_GROUPS, measured.area_groups),
        "by_phrase_length": (LENGTH_GROUPS, measured.length_groups),
    }
    return {
        breakdown: {group: summarise(measured.select(of_R == group)) for group in groups if (of_R == group).any()}
        for breakdown, (groups, of_R) in columns.items()
    }


def summarise(measured: Measurements) -> dict[str, float | int | None]:
    """Figures of a group of measured records (at least one); keys as in ``CONVENTIONS`` and "AP@0.50" ... "AP@0.95"."""
    assert len(measured), "a group without records has no figures"
    iou_R, has_target_R = measured.iou_R, measured.num_truths_R > 0
    intersection, union = int(measured.intersection_R.sum()), int(measured.union_R.sum())
    num_truths, num_kept = int(measured.num_truths_R.sum()), int(measured.num_kept_R.sum())
    ap_T = average_precision(measured.hits_TP, measured.scores_P, num_truths)
    at = {f"{threshold:.2f}": float(ap) for threshold, ap in zip(IOU_THRESHOLDS, ap_T, strict=True)}
    n_acc = _share(measured.is_empty_R[~has_target_R])
    return {
        "num_samples": len(measured),
        "num_gt_instances": num_truths,
        "num_pred_instances": len(measured.scores_P),
        "num_kept_instances": num_kept,
        "mAP": float(ap_T.mean()),
        "AP50": at["0.50"],
        "AP75": at["0.75"],
        **{f"AP@{threshold}": ap for threshold, ap in at.items()},
        "giou": float(single_precision(iou_R).mean()),
        "ciou": intersection / union if union else 0.0,
        **{f"P@{threshold}": float((iou_R >= threshold).mean()) for threshold in PRECISION_THRESHOLDS},
        "n_acc": n_acc,
        "no_target_accuracy": n_acc,
        "t_acc": _share(~measured.is_empty_R[has_target_R]),
        "duplicate_rate": int(measured.num_duplicates_R.sum()) / num_kept if num_kept else None,
        "count_error": float(np.abs(measured.num_kept_R - measured.num_truths_R).mean()),
        "phrase_accuracy": _share(measured.match_R[measured.match_R >= 0] == 1),
        **concept_f1.concept_f1(measured.concept_R),
        "intersection": intersection,
        "union": union,
    }


def single_precision(iou_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoUs rounded to float32 and back, as the released evaluation averages them."""
    return iou_R.astype(np.float32).astype(np.float64)


def _share(flags: NDArray[np.bool_]) -> float | None:
    return int(flags.sum()) / len(flags) if len(flags) else None
