"""Compare two evaluations of the same instructions.

    python -m instructsam.compare outputs/a/eval/metrics.json outputs/b/eval/metrics.json
    python -m instructsam.compare A/predictions.jsonl B/predictions.jsonl --figures mAP,giou --json changes.json

Prints the figures of both, paired differences (B - A) with confidence intervals, tests on the IoU of the instructions,
and those that changed most. metrics.json and predictions.jsonl have to lie side by side, as `evaluate` writes them; a
predictions.jsonl alone is compared without a score threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def compare(a: str | Path, b: str | Path, **options: Any) -> dict[str, Any]:
    """What `evaluation.comparison.compare_runs` says of two files; raises as that."""
    from instructsam.evaluation.comparison import compare_runs, load_run

    return compare_runs(load_run(a), load_run(b), **options)


def print_comparison(compared: dict[str, Any]) -> None:
    """A table of figures (a star marks intervals without 0), the tests, and the instructions that changed most."""
    print(f"A  {compared['a']}\nB  {compared['b']}")
    print(f"{compared['num_samples']} instructions about {compared['num_images']} images\n")
    print(f"{'figure':<20}{'A':>9}{'B':>9}{'B - A':>9}   interval")
    for figure, row in compared["figures"].items():
        if row["difference"] is None:
            print(f"{figure:<20}{_number(row['a']):>9}{_number(row['b']):>9}{'–':>9}")
            continue
        interval = "–" if row["low"] is None else f"{row['low']:+.3f} … {row['high']:+.3f}"
        star = " *" if row["low"] is not None and (row["low"] > 0 or row["high"] < 0) else ""
        print(f"{figure:<20}{row['a']:>9.3f}{row['b']:>9.3f}{row['difference']:>+9.3f}   {interval}{star}")
    iou = compared["iou"]
    print(
        f"\nIoU: better {iou['better']}, worse {iou['worse']}, equal {iou['equal']}; mean difference "
        f"{iou['mean_difference']:+.3f}, p = {iou['p_sign_flip']:.4g} (sign flips), {iou['p_sign']:.4g} (sign test)"
    )
    for name in ("worse", "better"):
        if compared[name]:
            print(f"\n{name} in B:")
        for one in compared[name]:
            change = f"{one['iou_a']:.3f} → {one['iou_b']:.3f} ({one['change']:+.3f})"
            print(f"  {change}  {one['id']}  {' '.join(one['instruction'].split())[:60]}".rstrip())
    print(f"\nintervals: {compared['conventions']['interval']}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m instructsam.compare", description="Compare two evaluations of the same instructions."
    )
    parser.add_argument("a", help="metrics.json or predictions.jsonl of the first run")
    parser.add_argument("b", help="the same of the second; differences are second minus first")
    parser.add_argument("--figures", help="comma-separated figures (default: the benchmark's headline)")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--changed", type=int, default=10, help="instructions listed in each direction (default: 10)")
    parser.add_argument("--json", type=Path, help="write all of it to this file, too")
    args = parser.parse_args(arguments)
    figures = args.figures.split(",") if args.figures else None
    options = {"resamples": args.resamples, "seed": args.seed, "level": args.level, "changed": args.changed}
    try:
        compared = compare(args.a, args.b, figures=figures, **options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_comparison(compared)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(compared, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        args.json.write_text(text, encoding="utf-8")
        print(f"written: {args.json}")


if __name__ == "__main__":
    main()
