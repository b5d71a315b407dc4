"""Evaluate a checkpoint on a benchmark.

    python -m instructsam.evaluate checkpoint=checkpoints/tiny
    python -m instructsam.evaluate checkpoint=DIR benchmark=refcoco benchmark.split=[val,testA] device=cuda
    python -m instructsam.evaluate checkpoint=DIR benchmark=coco_instructions benchmark.root=data/mine limit=200
    accelerate launch --num_processes 8 -m instructsam.evaluate checkpoint=DIR benchmark=referring device=cuda
    torchrun --nproc-per-node 3 -m instructsam.evaluate checkpoint=DIR
    python -m instructsam.evaluate predictions=outputs/eval/predictions.jsonl threshold=0.5

Writes metrics.json, report.md, report.html, gallery.png and predictions.jsonl to `output_dir` (default:
CHECKPOINT/eval; of several benchmarks or splits each to its own folder NAME_SPLIT in it, with a summary), and prints
the table. Killed and started again it goes on where it was. `predictions=FILE` works figures and reports out anew,
without the model.
Settings: `configs/eval.yaml`, benchmarks: `configs/benchmark/`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from instructsam.configs_path import CONFIGS, missing_keys

NEEDS_MODEL = {"untrained": False, "limit": None, "restart": False, "attention_variant": None}


def evaluate(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run one evaluation as configured.

    Returns:
        {NAME_SPLIT of every benchmark: its figures as written to metrics.json}

    Raises:
        ValueError: settings out of range or at odds with each other, no checkpoint, data that cannot be read.
    """
    check(settings)
    if settings["predictions"]:
        from instructsam.evaluation.recompute import recompute

        return recompute(settings)
    from instructsam.evaluation.session import evaluate_checkpoint

    return evaluate_checkpoint(settings)


def check(settings: Mapping[str, Any]) -> None:
    """ValueError for settings that cannot work, before anything is read."""
    if bool(settings["checkpoint"]) == bool(settings["predictions"]):
        raise ValueError("give checkpoint=DIR, or predictions=FILE to work out its figures anew; not both")
    if settings["predictions"]:
        asked = [f"{key}={settings[key]}" for key, off in NEEDS_MODEL.items() if settings[key] != off]
        asked += ["query_reliance=true"] if settings["query_reliance"] is True else []
        if asked:
            raise ValueError(f"{', '.join(asked)}: needs the model, which predictions=FILE goes without")
    elif missing := list(missing_keys(settings["benchmark"], "benchmark.")):
        raise ValueError(f"not given: {', '.join(f'{key}=...' for key in missing)}")
    lowest = {"batch_size": 1, "max_new_tokens": 1, "limit": 1, "threads": 0, "workers": 0, "seed": 0}
    lowest |= {"gallery_rows": 0, "bootstrap": 0, "min_area": 0}
    for key, least in lowest.items():
        value = settings[key]
        if value is None and key in ("limit", "min_area"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key}={value}: must be a whole number of at least {least}")
    for key in ("untrained", "restart", "html"):
        if not isinstance(settings[key], bool):
            raise ValueError(f"{key}={settings[key]}: must be true or false")
    if settings["query_reliance"] not in (True, False, "auto"):
        raise ValueError(f"query_reliance={settings['query_reliance']}: must be true, false or auto")
    threshold = settings["threshold"]
    if threshold is not None and (not isinstance(threshold, int | float) or not 0 <= threshold <= 1):
        raise ValueError(f"threshold={threshold} is not between 0 and 1")


@hydra.main(config_path=CONFIGS, config_name="eval", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    try:
        evaluate(settings)
    except ValueError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        sys.exit(f"error{rank}: {error}")


if __name__ == "__main__":
    main()
