"""A toy objective and data set, and a script that trains them: run in-process by tests, or by them through torchrun."""

from __future__ import annotations

import argparse
import json
import os
import signal
import zlib

import torch
from torch import nn

from instructsam.training.config import TrainerConfig
from instructsam.training.leaving import leave
from instructsam.training.optim import OptimConfig
from instructsam.training.trainer import Trainer


class ToyDataset(torch.utils.data.Dataset):
    """Points on a noisy plane; the noise comes from (epoch, index) alone. Every third sample has `rare` units."""

    def __init__(
        self,
        length: int = 10,
        bad_index: int | None = None,
        rare: bool = True,
        fail_index: int | None = None,
        skip_index: int | None = None,
        far_off: tuple[int, int] | None = None,
    ) -> None:
        self.length = length
        self.bad_index = bad_index
        self.fail_index = fail_index
        self.skip_index = skip_index
        self.far_off = far_off
        self.rare = rare

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        if index == self.fail_index:
            raise ValueError(f"toy-{index} is broken: no picture")
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        noise = torch.randn((), generator=torch.Generator().manual_seed(1000 + 100 * epoch + index))
        y = x.sum() + 0.1 * noise
        if index == self.bad_index:
            y = y * float("nan")
        if key == self.far_off:
            y = y + 1000.0
        rare = float(self.rare and index % 3 == 0)
        skipped = index == self.skip_index
        return {"id": f"toy-{index}", "key": f"{epoch}/{index}", "x": x, "y": y, "rare": rare, "skipped": skipped}


def collate(items: list[dict]) -> dict:
    return {
        "sample_ids": [item["id"] for item in items],
        "skipped_ids": [item["id"] for item in items if item["skipped"]],
        "keys": [item["key"] for item in items],
        "x": torch.stack([item["x"] for item in items]),
        "y": torch.stack([item["y"] for item in items]),
        "rare": torch.tensor([item["rare"] for item in items]),
    }


class ToyObjective(nn.Module):
    """Squared error over all samples plus absolute error over the rare ones; calls `at_step` as a step begins.

    keys: "EPOCH/INDEX" of all samples that it was given.
    """

    def __init__(self, dropout: float = 0.0, accumulation: int = 1, at_step=None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.hidden = nn.Linear(4, 8)
        self.out = nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.dropout = nn.Dropout(dropout)
        self.at_step = at_step
        self.accumulation = accumulation
        self.counted = 0
        self.keys: list[str] = []

    def count_units(self, batch: dict) -> dict[str, float]:
        if self.at_step is not None and self.counted % self.accumulation == 0:
            self.at_step(self.counted // self.accumulation + 1)
        self.counted += 1
        self.keys += batch["keys"]
        return {"samples": float(len(batch["y"])), "rare": float(batch["rare"].sum())}

    def forward(self, batch: dict, counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        error = self.out(self.dropout(torch.tanh(self.hidden(batch["x"])))).squeeze(-1) - batch["y"]
        return {
            "square": error.square().sum() / counts["samples"].clamp(min=1),
            "rare": (error.abs() * batch["rare"]).sum() / counts["rare"].clamp(min=1),
        }


def toy_trainer(
    output_dir,
    *,
    dropout: float = 0.0,
    at_step=None,
    dataset: ToyDataset | None = None,
    optim: dict | None = None,
    evaluate=None,
    fingerprint: dict | None = None,
    group_by: list[float] | None = None,
    overrides: list[str] | None = None,
    **settings,
) -> Trainer:
    config = TrainerConfig(
        **{
            "output_dir": str(output_dir),
            "max_steps": 8,
            "per_device_batch_size": 4,
            "checkpoint_every": 3,
            "progress_bar": False,
            "seed": 5,
            **settings,
        }
    )
    objective = ToyObjective(dropout, config.accumulation, at_step)
    optim_config = OptimConfig(**{"lr": 0.01, "warmup_steps": 2, **(optim or {})})
    return Trainer(
        config,
        objective,
        dataset or ToyDataset(),
        collate,
        optim_config,
        evaluate,
        fingerprint,
        group_by,
        overrides=overrides or [],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--bad-index", type=int)
    parser.add_argument("--fail-index", type=int, help="this sample cannot be read")
    parser.add_argument("--skip-index", type=int, help="this sample counts as skipped")
    parser.add_argument("--fail-at", type=int, help="the objective fails in this step")
    parser.add_argument("--die-by", help="NAME:STEP:RANK, sent to itself in that step")
    arguments = parser.parse_args()

    def at_step(step: int) -> None:
        if step == arguments.fail_at:
            raise KeyError("no such term")
        if arguments.die_by:
            name, when, rank = arguments.die_by.split(":")
            if step == int(when) and os.environ.get("RANK", "0") == rank:
                os.kill(os.getpid(), getattr(signal, name))

    places = {name: getattr(arguments, name) for name in ("length", "bad_index", "fail_index", "skip_index")}
    dataset = ToyDataset(**places)
    trainer = toy_trainer(arguments.output_dir, dataset=dataset, at_step=at_step, **arguments.settings)
    result = trainer.run()
    rank = os.environ.get("RANK", "0")
    weights = zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in trainer.objective.parameters()))
    print(f"rank {rank} result {json.dumps(result)}")
    print(f"rank {rank} weights {weights}")
    print(f"rank {rank} keys {' '.join(trainer.objective.keys)}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    leave()


if __name__ == "__main__":
    main()
