"""Figures of the shipped tiny model by kind of instruction: checkpoints/tiny/figures.json, and README's tables.

    python -m instructsam.make_tiny_world --root data/held_out --train 1 --val 1000
    python -m instructsam.evaluate checkpoint=checkpoints/tiny benchmark.root=data/held_out output_dir=outputs/shipped \
        batch_size=32 max_new_tokens=32
    python scripts/shipped_figures.py outputs/shipped             # print the tables
    python scripts/shipped_figures.py outputs/shipped --accept    # and write them, for tests/test_shipped_model.py

figures.json also has the figures of the first GUARDED scenes alone, which is what the test evaluates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.report import markdown_table
from instructsam.evaluation.tables import NOTHING, Rows, number, value_of

ROOT = Path(__file__).parents[1]
FIGURES_FILE = ROOT / "checkpoints" / "tiny" / "figures.json"
MARKS = "<!-- figures:start -->\n", "<!-- figures:end -->"
GUARDED = 200
KINDS = ("category", "attribute", "phrases", "spatial", "superlative", "ordinal", "counting", "negation", "reasoning")
COLUMNS = {"AP50": "AP50", "mAP": "mAP", "gIoU": "giou", "duplicates": "duplicate_rate", "count error": "count_error"}
KEPT = ("num_samples", *COLUMNS.values(), "AP75", "ciou", "n_acc", "t_acc", "phrase_accuracy")
REPLACEMENTS = {
    "slot_mean": "mean over the set",
    "other_image": "another picture's, same instruction",
    "other_instruction": "another instruction's, same picture",
}


def kept(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are checked in, of a group that `evaluate_records` summed up."""
    return {key: round(figures[key], 4) if isinstance(figures[key], float) else figures[key] for key in KEPT}


def guarded(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the first scenes of a split."""
    return [record for record in records if int(record["id"].split("-")[1]) < GUARDED]


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Overall figures, and those of every kind."""
    return {"overall": kept(metrics["overall"]), "by_kind": {k: kept(one) for k, one in metrics["by_kind"].items()}}


def figure_rows(metrics: Mapping[str, Any]) -> Rows:
    rows = [["instructions", "n", *COLUMNS]]
    for name, group in (("all", metrics["overall"]), *((kind, metrics["by_kind"][kind]) for kind in KINDS)):
        rows.append([name, str(group["num_samples"]), *(number(value_of(group, key)) for key in COLUMNS.values())])
    return rows


def reliance_rows(reliance: Mapping[str, Any]) -> Rows:
    """AP50 with the real queries and with replaced ones, over the instructions that have such a replacement."""
    rows = [["instructions", *REPLACEMENTS.values()]]
    for kind in ("all", *KINDS):
        row = [kind]
        for name in REPLACEMENTS:
            groups = reliance.get(name, {})
            group = groups.get("overall") if kind == "all" else groups.get("by_kind", {}).get(kind)
            pair = (group or {}).get("AP50", {})
            shown = [number(pair.get(side)) for side in ("real", "replaced")]
            row.append(NOTHING if NOTHING in shown else " → ".join(shown))
        rows.append(row)
    return rows


def tables(metrics: Mapping[str, Any]) -> str:
    """README's part between the marks."""
    overall = metrics["overall"]
    facts = (
        f"{overall['num_samples']:,} instructions about held-out scenes; left empty as they should be (no-target): "
        f"{number(overall['n_acc'])}; exact phrases {number(overall['phrase_accuracy'])}; AP75 "
        f"{number(overall['AP75'])}, cIoU {number(overall['ciou'])}; kept are scores above "
        f"{metrics['benchmark']['threshold']}."
    )
    head = "**Query reliance**, AP50 with the real queries → with others in their place:"
    reliance = markdown_table(reliance_rows(metrics["query_reliance"]))
    return "\n\n".join([markdown_table(figure_rows(metrics)), facts, head, reliance]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of the shipped tiny model; see the head of this file.")
    parser.add_argument("evaluation", type=Path, help="folder of metrics.json and predictions.jsonl")
    parser.add_argument("--accept", action="store_true", help="write them")
    options = parser.parse_args()
    metrics = json.loads((options.evaluation / "metrics.json").read_text(encoding="utf-8"))
    with (options.evaluation / "predictions.jsonl").open(encoding="utf-8") as lines:
        first = guarded(map(json.loads, lines))
    text = tables(metrics)
    print(text)
    if not options.accept:
        return
    if not metrics.get("query_reliance"):
        sys.exit("error: evaluated without query reliance")
    threshold = metrics["benchmark"]["threshold"]
    of_first = evaluate_records(first, score_threshold=threshold)
    sha256 = metrics["checkpoint"]["sha256"]
    found = {"sha256": sha256, "threshold": threshold, "all": summary(metrics), "guarded": summary(of_first)}
    FIGURES_FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")
    print(f"written: {FIGURES_FILE}, {readme}")


if __name__ == "__main__":
    main()
