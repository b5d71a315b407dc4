"""Time and memory of the metrics against a straightforward scorer that recomputes IoUs at each of the ten thresholds.

Run from the repository root:

    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/bench/metrics.py

Options: ``--records 20000 --predictions 4 --truths 2 --no-target 0 --height 480 --width 640
--seed 0``. The straightforward scorer
follows the words of the conventions with pycocotools, record by record; it neither checks its input nor breaks the
figures down, which the metrics do. Every figure of both is compared. The run fails where they differ, where the
metrics are less than five times as fast, or take more than 30 s or 2 GiB (of the whole process, records included).
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import sys
import time
from typing import Any

import numpy as np
from pycocotools import mask as coco

from instructsam.evaluation.metrics import evaluate_records

THRESHOLDS = [k / 20 for k in range(10, 20)]
Record = dict[str, Any]


# ---- records ----------------------------------------------------------------------------------------------------


def blob(centre: np.ndarray, radii: np.ndarray, wobble: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """An ellipse with an uneven outline, as the run-length code of its columns."""
    left, right = max(0, int(centre[0] - radii[0])), min(width, int(centre[0] + radii[0]) + 1)
    x = np.arange(left, right)
    half = radii[1] * np.sqrt(np.clip(1 - ((x - centre[0]) / radii[0]) ** 2, 0, None))
    half = half * (1 + 0.15 * np.sin(wobble[0] + x * wobble[1])) + 1
    top = np.clip(np.rint(centre[1] - half), 0, height - 2).astype(int)
    bottom = np.clip(np.rint(centre[1] + half), top + 1, height - 1).astype(int)
    edges = np.stack([x * height + top, x * height + bottom], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    code = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def make_records(args: argparse.Namespace) -> list[Record]:
    """Predictions are moved and stretched truths, or lie anywhere; the first ones are no-target, if any are."""
    rng = np.random.default_rng(args.seed)
    size = np.array([args.width, args.height])
    records = []
    for index in range(args.records):
        outlines = [
            (rng.uniform(0.15, 0.85, 2) * size, np.exp(rng.uniform(np.log(20), np.log(110), 2)), rng.uniform(0, 0.3, 2))
            for _ in range(max(args.truths, 1))
        ]
        predictions = []
        for number in range(args.predictions):
            centre, radii, wobble = outlines[number % len(outlines)]
            if rng.random() < 0.2:
                centre = rng.uniform(0.15, 0.85, 2) * size
            predictions.append((centre + rng.normal(0, 5, 2), radii * np.exp(rng.normal(0, 0.1, 2)), wobble))
        is_no_target = index < args.no_target
        num_predictions = int(rng.integers(0, args.predictions + 1)) if is_no_target else args.predictions
        records.append(
            {
                "id": f"bench/{index}",
                "kind": f"kind {index % 4}",
                "instruction": "the left of the two round things"[: 4 + index % 29],
                "height": args.height,
                "width": args.width,
                "gt_rles": [] if is_no_target else [blob(*one, args.height, args.width) for one in outlines],
                "pred_rles": [blob(*one, args.height, args.width) for one in predictions[:num_predictions]],
                "pred_scores": rng.random(num_predictions).round(3).tolist(),
            }
        )
    return records


# ---- the straightforward scorer ---------------------------------------------------------------------------------


def average_precision(records: list[Record], threshold: float) -> float:
    pooled, num_truths = [], 0
    for record in records:
        truths, predictions, scores = record["gt_rles"], record["pred_rles"], record["pred_scores"]
        num_truths += len(truths)
        ious = coco.iou(predictions, truths, [0] * len(truths)) if truths and predictions else None
        unused = set(range(len(truths)))
        for index in sorted(range(len(scores)), key=lambda k: -scores[k]):
            best = max(sorted(unused), key=lambda k: ious[index, k], default=None)
            hit = best is not None and ious[index, best] >= threshold
            if hit:
                unused.remove(best)
            pooled.append((scores[index], hit))
    pooled.sort(key=lambda pair: -pair[0])
    precisions, hits = [], 0
    for number, (_, hit) in enumerate(pooled, start=1):
        hits += hit
        precisions.append(hits / number)
    for index in range(len(precisions) - 2, -1, -1):
        precisions[index] = max(precisions[index], precisions[index + 1])
    return sum(p for p, (_, hit) in zip(precisions, pooled, strict=True) if hit) / num_truths


def straightforward(records: list[Record]) -> dict[str, float]:
    """The figures of all records, each from the words of its convention."""
    figures: dict[str, float] = {}
    for threshold in THRESHOLDS:
        figures[f"AP@{threshold:.2f}"] = average_precision(records, threshold)
    figures["mAP"] = sum(figures.values()) / len(THRESHOLDS)
    ious, intersections, unions, duplicates, num_kept, errors = [], 0, 0, 0, 0, 0
    empty_without, without, found_with = 0, 0, 0
    for record in records:
        truths, kept, scores = record["gt_rles"], record["pred_rles"], record["pred_scores"]
        truth = coco.merge(truths) if truths else None
        union = coco.merge(kept) if kept else None
        areas = [int(coco.area(mask)) if mask else 0 for mask in (truth, union)]
        intersection = int(coco.area(coco.merge([truth, union], intersect=True))) if truth and union else 0
        either = sum(areas) - intersection
        ious.append(intersection / either if either else 1.0)
        intersections, unions = intersections + intersection, unions + either
        if truths:
            found_with += areas[1] > 0
        else:
            without += 1
            empty_without += areas[1] == 0
        ranked = sorted(range(len(kept)), key=lambda k: -scores[k])
        overlap = coco.iou(kept, kept, [0] * len(kept)) if kept else None
        duplicates += sum(any(overlap[b, a] > 0.7 for a in ranked[:at]) for at, b in enumerate(ranked))
        num_kept += len(kept)
        errors += abs(len(kept) - len(truths))
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        figures[f"P@{threshold}"] = sum(iou >= threshold for iou in ious) / len(ious)
    figures["giou"] = sum(float(np.float32(iou)) for iou in ious) / len(ious)
    figures |= {"ciou": intersections / unions, "intersection": intersections, "union": unions}
    figures |= {"n_acc": empty_without / without} if without else {}
    figures |= {"t_acc": found_with / (len(records) - without)} if without < len(records) else {}
    figures |= {"duplicate_rate": duplicates / num_kept, "count_error": errors / len(records)}
    return figures


def peak_memory() -> float:
    """Peak of the process so far, in GiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("records", 20_000),
        ("predictions", 4),
        ("truths", 2),
        ("no-target", 0),
        ("height", 480),
        ("width", 640),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    print(
        f"{args.records} records: {args.truths} truths, {args.predictions} predictions each, {args.height}x{args.width}"
    )
    print(f"numpy {np.__version__}, {platform.processor() or platform.machine()}, processor time of one thread")
    records = make_records(args)
    codes = [rle["counts"] for record in records for rle in (*record["gt_rles"], *record["pred_rles"])]
    print(f"records made: {len(codes)} masks of {np.mean([len(code) for code in codes]):.0f} characters on average")
    before = peak_memory()

    start = time.process_time()
    metrics = evaluate_records(records)
    ours, memory = time.process_time() - start, peak_memory()
    print(f"metrics:          {ours:8.2f} s, peak {memory:.2f} GiB, {before:.2f} GiB of them before (records, imports)")
    start = time.process_time()
    expected = straightforward(records)
    theirs = time.process_time() - start
    print(f"straightforward:  {theirs:8.2f} s, {theirs / ours:.1f} x the time")

    for key, value in expected.items():
        found = metrics["overall"][key]
        same = found == value if isinstance(value, int) else math.isclose(found, value, rel_tol=1e-12)
        if not same:
            sys.exit(f"error: {key} is {found!r}, the straightforward scorer says {value!r}")
    print(f"{len(expected)} figures agree (relative tolerance 1e-12)")
    if ours > 30 or memory > 2 or theirs < 5 * ours:
        sys.exit("error: slower than five times the straightforward scorer's speed, 30 s or 2 GiB")


if __name__ == "__main__":
    main()
