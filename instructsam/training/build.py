"""From a composed configuration to everything a `Trainer` needs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from instructsam.data.budgets import Sizes
from instructsam.data.checks import Skips
from instructsam.data.dataset import InstructionDataset
from instructsam.data.samples import Samples
from instructsam.data.sources import open_sources
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.models.factory import build_model
from instructsam.models.modeling import InstructSAMModel
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.training.objectives import InstructionObjective

# Of settings["model"]: where weights come from (a checksum knows those that do not train), and how they compute.
_FREE = (
    "tokenizer",
    "checkpoint",
    "init",
    "vlm_path",
    "detector_path",
    "gradient_checkpointing",
    "compile_vision",
    "attn_implementation",
)
# Of settings["data"]: what is asked of the samples.
_ASKED = (
    "turns_per_image",
    "independent_turns",
    "too_many_instances",
    "on_bad",
    "group_by",
    "limit",
    "kinds",
    "epoch_samples",
    "composition",
    "augmentation",
)
OBJECTIVES = ("instruct", "pretrain_detector", "pretrain_vlm")


@dataclass
class Task:
    """What is trained on what: the model inside `objective`, the data and how to batch it.

    `sizes`: tokens and phrases of the samples of an epoch. `group_by`: what else steps are to be alike in, if anything
    (data.group_by).
    """

    model: InstructSAMModel
    processor: InstructSAMProcessor
    objective: nn.Module
    dataset: InstructionDataset
    collate: Callable[[list[Any]], dict[str, Any]]
    sizes: tuple[Sizes, Sizes] | None = None
    group_by: Sizes | None = None


def build_task(settings: Mapping[str, Any]) -> Task:
    """Build model, data and objective.

    Args:
        settings: the resolved training configuration (keys model, data, objective, seed).

    Raises:
        ValueError: an unknown objective, and whatever the parts complain of.
    """
    model, processor = build_model(settings["model"], settings["seed"])
    data = settings["data"]
    model.config.independent_turns = data["independent_turns"]
    samples = open_sources(data, Skips(data["on_bad"], data["max_bad"]))
    objective = dict(settings["objective"])
    name = objective.pop("name")
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is not one of {', '.join(OBJECTIVES)}")
    names = ("turns_per_image", "independent_turns", "on_bad", "too_many_instances", "composition", "augmentation")
    options = {**{key: data[key] for key in names}, "seed": settings["seed"]}
    # Heads draw their weights here: from the run's seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"] + 1)
        if name == "instruct":
            dataset = InstructionDataset(samples, processor, **options)
            criterion = SetCriterion(CriterionConfig.from_mapping(objective.pop("criterion", {})))
            trained = InstructionObjective(model, criterion, **objective)
            task = Task(model, processor, trained, dataset, processor.collate)
        else:
            task = _pretraining_task(name, model, processor, samples, objective, options)
    sizes = {"masks": task.dataset.num_masks, "phrases": task.dataset.num_phrases, "tokens": task.dataset.num_tokens}
    task.sizes = (sizes["tokens"], sizes["phrases"])
    if data["group_by"] is not None:
        if data["group_by"] not in sizes:
            raise ValueError(f"data.group_by={data['group_by']!r} is not null or one of {', '.join(sizes)}")
        task.group_by = sizes[data["group_by"]]
    return task


def fingerprint(settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What must not change between the parts of a run: what its results depend on, not where files lie or what only
    costs time and memory. The samples themselves are known by their sizes."""
    data, model = settings["data"], settings["model"]
    sizes = task.dataset.samples.sizes
    samples = 0
    for field in fields(sizes):
        samples = zlib.crc32(np.ascontiguousarray(getattr(sizes, field.name)).data, samples)
    sources = {name: source for name, source in data["sources"].items() if source is not None}
    return {
        "model": {name: value for name, value in model.items() if name not in _FREE},
        "data": {
            **{name: data[name] for name in _ASKED if name in data},
            "draws": {name: [source.get("repeats"), source.get("weight")] for name, source in sources.items()},
            "samples": samples,
        },
        "objective": settings["objective"],
    }


def _pretraining_task(
    name: str,
    model: InstructSAMModel,
    processor: InstructSAMProcessor,
    samples: Samples,
    objective: dict[str, Any],
    options: dict[str, Any],
) -> Task:
    from instructsam.pretraining.dataset import GroundedDataset, collate_grounded
    from instructsam.pretraining.detector import DetectorPretraining
    from instructsam.pretraining.vlm import VLMPretraining

    generic = {key: objective.pop(key) for key in ("generic_phrase", "num_generic") if key in objective}
    dataset = GroundedDataset(samples, processor, **generic, **options)
    sizes = [len(values) for values in dataset.values.values()]
    trained: DetectorPretraining | VLMPretraining
    if name == "pretrain_detector":
        criterion = SetCriterion(CriterionConfig.from_mapping(objective.pop("criterion", {})))
        trained = DetectorPretraining(model, criterion, sizes, **objective)
    elif "criterion" in objective:
        raise ValueError(f"objective {name} has no criterion (debug=overfit is for objective=instruct or release)")
    else:
        trained = VLMPretraining(model, sizes, **objective)
    return Task(model, processor, trained, dataset, partial(collate_grounded, processor))
