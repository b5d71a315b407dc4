"""Evaluation during training: a few held-out instructions, their figures and a gallery of truth beside prediction."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instructsam.data.checks import Skips
from instructsam.data.sources import check_files, parse_sources, read_source
from instructsam.data.wording import word
from instructsam.evaluation.gallery import write_gallery
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.runner import flatten, run
from instructsam.predictor import Predictor
from instructsam.training.build import Task
from instructsam.training.precision import autocast_if_mixed

KEYS = ("mAP", "AP50", "giou", "ciou", "n_acc", "duplicate_rate", "count_error", "phrase_accuracy")


def periodic_evaluation(task: Task, settings: Mapping[str, Any]) -> Callable[[int], dict[str, float]]:
    """The trainer's ``evaluate``: step → figures; pictures go to OUTPUT_DIR/samples/step_N.png.

    Args:
        settings: the training configuration; its ``evaluation`` has num_instructions, threshold, batch_size,
            gallery_rows.
    """
    options, data = settings["evaluation"], settings["data"]
    if not data.get("val"):
        raise ValueError("trainer.eval_every is set, but data.val names no held-out instructions; or set it to 0")
    sources = parse_sources({"val": data["val"]})
    check_files(sources)
    rng = np.random.default_rng(0)  # the same words for every evaluation and run
    samples = [
        dataclasses.replace(sample, turns=tuple(word(turn, rng) for turn in sample.turns))
        for sample in read_source(sources[0], Skips(data["on_bad"], data["max_bad"]))
    ]
    items = flatten(samples, options["num_instructions"])

    def evaluate(step: int) -> dict[str, float]:
        was_training = task.model.training
        predictor = Predictor(task.model, task.processor)
        with autocast_if_mixed(task.model):
            records = run(
                predictor, items, threshold=options["threshold"], batch_size=options["batch_size"], progress=False
            )
        task.model.train(was_training)
        if int(os.environ.get("RANK", 0)) == 0:  # all ranks predict the same
            folder = Path(settings["output_dir"]) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            write_gallery(records, folder / f"step_{step:06d}.png", options["gallery_rows"])
        figures = evaluate_records(records)["overall"]
        return {key: figures[key] for key in KEYS if figures.get(key) is not None}

    return evaluate
