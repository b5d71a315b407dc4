"""From a composed configuration to everything a `Trainer` needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.dataset import InstructionDataset
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.models.factory import build_model
from instructsam.models.modeling import InstructSAM
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample
from instructsam.training.objectives import InstructionObjective

OBJECTIVES = ("instruct", "pretrain_detector", "pretrain_vlm")


@dataclass
class Task:
    """What is trained on what: the model inside `objective`, the data and how to batch it."""

    model: InstructSAM
    processor: InstructSAMProcessor
    objective: nn.Module
    dataset: Dataset
    collate: Callable[[list[Any]], dict[str, Any]]


def build_task(settings: Mapping[str, Any]) -> Task:
    """Build model, data and objective.

    Args:
        settings: the resolved training configuration (keys model, data, objective, seed).

    Raises:
        ValueError: an unknown objective, and whatever the parts complain of.
    """
    model, processor = build_model(settings["model"], settings["seed"])
    data = settings["data"]
    samples = read_coco_instructions(data["root"], data["train_split"], data["on_bad"], limit=data.get("limit"))
    objective = dict(settings["objective"])
    name = objective.pop("name")
    # Heads draw their weights here: from the run's seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"] + 1)
        if name == "instruct":
            return _instruct(model, processor, samples, data, objective, settings["seed"])
        if name in OBJECTIVES:
            return _pretrain(name, model, processor, samples, data, objective, settings["seed"])
    raise ValueError(f"objective.name={name!r} is not one of {', '.join(OBJECTIVES)}")


def _data_options(data: Mapping[str, Any], seed: int) -> dict[str, Any]:
    names = ("turns_per_image", "independent_turns", "kinds")
    return {**{name: data[name] for name in names}, "seed": seed}


def _instruct(
    model: InstructSAM,
    processor: InstructSAMProcessor,
    samples: list[Sample],
    data: Mapping[str, Any],
    options: dict[str, Any],
    seed: int,
) -> Task:
    criterion = SetCriterion(CriterionConfig.from_mapping(options.pop("criterion", {})))
    objective = InstructionObjective(model, criterion, **options)
    dataset = InstructionDataset(samples, processor, **_data_options(data, seed))
    return Task(model, processor, objective, dataset, processor.collate)


def _pretrain(
    name: str,
    model: InstructSAM,
    processor: InstructSAMProcessor,
    samples: list[Sample],
    data: Mapping[str, Any],
    options: dict[str, Any],
    seed: int,
) -> Task:
    from instructsam.pretraining.dataset import GroundedDataset, collate_grounded
    from instructsam.pretraining.detector import DetectorPretraining
    from instructsam.pretraining.vlm import VLMPretraining

    generic = {"generic_phrase": options.pop("generic_phrase", None), "num_generic": options.pop("num_generic", 0)}
    dataset = GroundedDataset(samples, processor, **generic, **_data_options(data, seed))
    sizes = [len(values) for values in dataset.values.values()]
    objective: nn.Module
    if name == "pretrain_detector":
        criterion = SetCriterion(CriterionConfig.from_mapping(options.pop("criterion", {})))
        objective = DetectorPretraining(model, criterion, sizes, **options)
    else:
        objective = VLMPretraining(model, sizes, **options)
    return Task(model, processor, objective, dataset, partial(collate_grounded, processor))
