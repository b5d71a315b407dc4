"""Evaluation during training: a few instructions, their figures and a gallery of truth beside prediction."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
from torch import nn

from instructsam.data.checks import Skips
from instructsam.data.sources import check_files, parse_sources, read_source
from instructsam.data.wording import word
from instructsam.evaluation.gallery import write_gallery
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.runner import flatten, run
from instructsam.models.modeling import InstructSAMModel
from instructsam.predictor import Predictor
from instructsam.structures import Sample
from instructsam.training.build import Task
from instructsam.training.precision import autocast_if_mixed
from instructsam.training.tracking import gallery_path

KEYS = ("mAP", "AP50", "giou", "ciou", "n_acc", "duplicate_rate", "count_error", "phrase_accuracy")


def periodic_evaluation(task: Task, settings: Mapping[str, Any]) -> Callable[[int, nn.Module], dict[str, float]]:
    """The trainer's ``evaluate``: step and objective → figures of its model.

    Pictures go to `gallery_path`, and from there to the dashboards.

    Args:
        settings: the training configuration; its ``evaluation`` has data, num_instructions, threshold,
            batch_size, max_new_tokens, gallery_rows.
    """
    options, data = settings["evaluation"], settings["data"]
    best = settings["trainer"]["best_metric"]
    if best is not None and best.removeprefix("-") not in KEYS:
        raise ValueError(f"trainer.best_metric={best} is none of {', '.join(KEYS)} (with - in front: lowest)")
    if options["max_new_tokens"] < 1:
        raise ValueError(f"evaluation.max_new_tokens={options['max_new_tokens']}: must be at least 1")
    if options["data"] not in ("val", "train"):
        raise ValueError(f"evaluation.data={options['data']!r} is neither val nor train")
    if options["data"] == "train":
        asked: Iterable[Sample] = (task.dataset.usable(index) for index in range(len(task.dataset)))
    else:
        if not data.get("val"):
            raise ValueError("trainer.eval_every is set, but data.val names no held-out instructions; or set it to 0")
        sources = parse_sources({"val": data["val"]})
        check_files(sources)
        asked = read_source(sources[0], Skips(data["on_bad"], data["max_bad"]))
    rng = np.random.default_rng(0)  # the same words for every evaluation and run
    samples = [dataclasses.replace(s, turns=tuple(word(turn, rng) for turn in s.turns)) for s in asked]
    items = flatten(samples, options["num_instructions"])

    def evaluate(step: int, objective: nn.Module) -> dict[str, float]:
        model = cast(InstructSAMModel, objective.model)
        was_training = model.training
        predictor = Predictor(model, task.processor, max_new_tokens=options["max_new_tokens"])
        with autocast_if_mixed(model):
            records = run(
                predictor, items, threshold=options["threshold"], batch_size=options["batch_size"], progress=False
            )
        model.train(was_training)
        if int(os.environ.get("RANK", 0)) == 0:  # all ranks have the records of all
            path = gallery_path(settings["output_dir"], step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gallery(records, path, options["gallery_rows"])
        figures = evaluate_records(records)["overall"]
        return {key: figures[key] for key in KEYS if figures.get(key) is not None}

    return evaluate
