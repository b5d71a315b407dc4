"""Evaluate a checkpoint on held-out instructions.

    python -m instructsam.evaluate checkpoint=outputs/quickstart/checkpoint
    python -m instructsam.evaluate checkpoint=DIR data.root=DIR data.val_split=val limit=200 query_reliance=false
    python -m instructsam.evaluate checkpoint=DIR decoding=released device=cuda dtype=bfloat16

Writes metrics.json, report.md, gallery.png and predictions.jsonl to `output_dir` (default: CHECKPOINT/eval) and prints
the table. Settings: `configs/eval.yaml`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from instructsam.configs_path import CONFIGS


def evaluate(settings: dict[str, Any]) -> dict[str, Any]:
    """Run one evaluation as configured; returns the figures as written to metrics.json.

    Raises:
        ValueError: no checkpoint, data that cannot be read, settings out of range.
    """
    from instructsam.data.coco_instructions import read_coco_instructions
    from instructsam.evaluation.gallery import write_gallery
    from instructsam.evaluation.metrics import evaluate_records
    from instructsam.evaluation.reliance import query_reliance
    from instructsam.evaluation.report import print_table, write_report
    from instructsam.evaluation.runner import flatten, predict
    from instructsam.models.checkpoints import fresh_model
    from instructsam.predictor import Predictor

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    checkpoint = settings["checkpoint"]
    predictor = Predictor.from_pretrained(checkpoint, settings["device"], settings["dtype"], settings["decoding"])
    dtype = predictor.model.dtype
    data = settings["data"]
    items = flatten(read_coco_instructions(data["root"], data["val_split"], data["on_bad"]), settings["limit"])
    threshold, batch_size = settings["threshold"], settings["batch_size"]
    options = {"threshold": threshold, "batch_size": batch_size, "max_new_tokens": settings["max_new_tokens"]}
    records = predict(predictor, items, **options)
    metrics = evaluate_records(records)
    reliance = query_reliance(predictor, items, records, threshold, batch_size) if settings["query_reliance"] else None
    baseline = None
    if settings["untrained"]:
        fresh = fresh_model(predictor.model.config, settings["seed"])
        for parameter in fresh.parameters():  # not `fresh.to(dtype)`: the rotary tables stay in float32
            parameter.data = parameter.data.to(dtype)
        untrained = Predictor(fresh.to(predictor.model.device), predictor.processor, predictor.rule)
        baseline = evaluate_records(predict(untrained, items, **options))

    # A folder named after a hub name would be taken for the model the next time.
    default = Path(checkpoint) if Path(checkpoint).is_dir() else Path("outputs") / Path(checkpoint).name
    folder = Path(settings["output_dir"] or default / "eval")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    described = {key: settings[key] for key in ("checkpoint", "data", "threshold", "limit", "max_new_tokens", "seed")}
    described["attention_variant"] = predictor.model.config.attention_variant
    described |= {"decoding": predictor.rule.name, "dtype": str(dtype).removeprefix("torch.")}
    described["cut_off_answers"] = sum(not record["finished"] for record in records)
    write_report(folder, metrics, settings=described, baseline=baseline, reliance=reliance)
    write_gallery(records, folder / "gallery.png", settings["gallery_rows"])
    print_table(metrics, baseline)
    if described["cut_off_answers"]:
        print(
            f"{described['cut_off_answers']} of {len(records)} answers reached max_new_tokens="
            f"{settings['max_new_tokens']} and may lack phrases"
        )
    print(f"written to {folder}: metrics.json, report.md, gallery.png, predictions.jsonl")
    return metrics


@hydra.main(config_path=CONFIGS, config_name="eval", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    try:
        evaluate(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
