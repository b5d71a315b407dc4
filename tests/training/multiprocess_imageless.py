"""Trains the tiny model in float64 on one sample with a picture and one without, in one process or two.

Started by a test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from double_precision import float64

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.predictor import Predictor
from instructsam.structures import Sample, Turn
from instructsam.training.config import TrainerConfig
from instructsam.training.leaving import leave
from instructsam.training.objectives import InstructionObjective
from instructsam.training.optim import OptimConfig
from instructsam.training.trainer import Trainer


class Pair(torch.utils.data.Dataset):
    """Item 0 has a picture; item 1 has none, or could not be read."""

    def __init__(self, processor, picture: Sample, what: str) -> None:
        talk = Sample("talk", None, 0, 0, (Turn("the red one", answer=("all of them are blue",)),))
        other = processor.encode_sample(talk, True) if what == "talk" else processor.neutral_item("broken.jpg")
        self.items = [processor.encode_sample(picture, True), other]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return self.items[key[1]]


def main() -> None:
    checkpoint, world, output_dir, what, batch_size = sys.argv[1:]
    predictor = Predictor.from_pretrained(checkpoint)
    with float64():
        dataset = Pair(predictor.processor, read_coco_instructions(Path(world), "train")[0], what)
        torch.manual_seed(0)  # the query head's weights, on every rank alike
        criterion = SetCriterion(CriterionConfig(aux=1.0, box_l1=5.0, box_giou=2.0))
        model = predictor.model.double().train()
        objective = InstructionObjective(model, criterion, query_box_weight=0.5, query_box_layers=2)
        settings = {"max_steps": 3, "checkpoint_every": 0, "progress_bar": False}
        config = TrainerConfig(output_dir, per_device_batch_size=int(batch_size), **settings)
        trainer = Trainer(config, objective, dataset, predictor.processor.collate, OptimConfig(lr=1e-3))
        trainer.run()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    leave()


if __name__ == "__main__":
    main()
