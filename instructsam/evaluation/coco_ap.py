"""COCO's own average precision, by pycocotools' COCOeval: a cross-check of `average_precision`.

The protocol differs from the one that figures are published with (DESIGN section 10): precision is averaged at the 101
recalls 0, 0.01, ..., 1 instead of at every ground truth; at most 100 predictions of an instruction count; and of
ground truths with equal IoU a prediction takes the last, not the first. Hits are the same otherwise.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instructsam import masks
from instructsam.evaluation.average_precision import IOU_THRESHOLDS
from instructsam.evaluation.records import checked

MAX_DETECTIONS = 100


def coco_ap(records: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """``AP``, ``AP50`` and ``AP75`` of masks, class-agnostic, over all sizes; every instruction is an image of its own.

    Returns:
        Figures in 0...1, None where there is no ground truth.

    Raises:
        ValueError: for no records, an id that occurs twice, or a malformed record, which is named with the reason.
    """
    records, names = checked(records)
    images, truths, predictions = [], [], []
    for number, (record, name) in enumerate(zip(records, names, strict=True), start=1):
        height, width = int(record["height"]), int(record["width"])
        images.append({"id": number, "height": height, "width": width})
        true_rles = masks.check_rles(record["gt_rles"], height, width, f"{name}: gt_rles")
        rles = masks.check_rles(record["pred_rles"], height, width, f"{name}: pred_rles")
        for rle, area in zip(true_rles, masks.areas(true_rles, checked=True).tolist(), strict=True):
            truths.append({"image_id": number, "category_id": 1, "segmentation": rle, "area": area, "iscrowd": 0})
        for rle, score in zip(rles, record["pred_scores"], strict=True):
            predictions.append({"image_id": number, "category_id": 1, "segmentation": rle, "score": float(score)})
    if not truths:
        return {"AP": None, "AP50": None, "AP75": None}
    if not predictions:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    for number, truth in enumerate(truths, start=1):  # an id of 0 would be taken for "not matched"
        truth["id"] = number

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {"images": images, "annotations": truths, "categories": [{"id": 1, "name": "object"}]}
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(predictions), iouType="segm")
        evaluation.params.iouThrs = IOU_THRESHOLDS  # the same numbers, not those of linspace, which round otherwise
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision_T = evaluation.eval["precision"].mean(axis=(1, 2, 3, 4))
    rows = {f"{threshold:.2f}": float(value) for threshold, value in zip(IOU_THRESHOLDS, precision_T, strict=True)}
    return {"AP": float(np.mean(precision_T)), "AP50": rows["0.50"], "AP75": rows["0.75"]}
