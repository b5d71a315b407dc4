"""Train InstructSAM.

    python -m instructsam.train                                    # the tiny world on a CPU, from scratch
    python -m instructsam.train experiment=tiny_world              # on top of the pretrained parts in checkpoints/
    python -m instructsam.train experiment=tiny_stage1             # what made checkpoints/tiny, with tiny_stage2
    python -m instructsam.train experiment=stage1                  # the release's recipe on Qwen3-VL-2B and SAM 3
    bash scripts/launch/one_node.sh zero1 experiment=stage1        # all GPUs of a machine; README, "Train"
    python -m instructsam.train debug=limit                        # two steps of everything; overfit, profile

The same command again continues a run that was interrupted. Settings: `configs/train.yaml` and what it names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from instructsam.configs_path import CONFIGS, complete_settings
from instructsam.lock import exclusive
from instructsam.training.leaving import leave

if TYPE_CHECKING:
    from instructsam.training.build import Task


def train(settings: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one training as configured; returns the trainer's summary. See `training.trainer.Trainer.run`.

    overrides: what of the settings was given on the command line, for the records.
    """
    from instructsam.models.compiling import compile_frozen_vision
    from instructsam.models.placement import as_dtype
    from instructsam.training.build import build_task, fingerprint
    from instructsam.training.config import TrainerConfig
    from instructsam.training.optim import OptimConfig, select_parameters
    from instructsam.training.overfit import verdict
    from instructsam.training.trainer import Trainer

    # Settings first: what is wrong with them should not wait for weights and data.
    if "ablation" in settings:
        raise ValueError("experiment=ablation/... is several trainings: start it with python -m instructsam.ablate")
    save_dtype = as_dtype(settings["save_dtype"], "save_dtype", auto=False)
    config = TrainerConfig.from_dict(
        {**settings["trainer"], "seed": settings["seed"], "output_dir": settings["output_dir"]}
    )
    optim = OptimConfig.from_dict(settings["optim"])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    task = build_task(settings)
    if task.model.load_report is not None and int(os.environ.get("RANK", 0)) == 0:
        task.model.load_report.write(Path(settings["output_dir"]) / "load_report.json")
    evaluate = None
    if config.eval_every:
        from instructsam.training.evaluating import periodic_evaluation

        evaluate = periodic_evaluation(task, settings)
    if settings["model"]["compile_vision"]:
        select_parameters(task.objective, optim)  # only what does not train is compiled
        compile_frozen_vision(task.model)
    trainer = Trainer(
        config,
        task.objective,
        task.dataset,
        task.collate,
        optim,
        evaluate,
        fingerprint(settings, task),
        task.group_by,
        task.sizes,
        settings,
        overrides,
    )
    summary = trainer.run()
    if summary["status"] != "interrupted":
        state = trainer.state_dict()
        if trainer.accelerator.is_main_process:
            output = Path(settings["output_dir"])
            _save_model(task, output / "checkpoint", save_dtype, state)
            best = trainer.best_state_dict(state) if config.best_metric is not None else None
            if best is not None:
                _save_model(task, output / "checkpoint_best", save_dtype, best)
        evaluation = settings["evaluation"]
        on_all_it_trained_on = evaluation["data"] == "train" and evaluation["num_instructions"] is None
        if evaluate is not None and on_all_it_trained_on and trainer.accelerator.is_main_process:
            print(verdict(trainer.tracking.losses.read(), summary["metrics"]))
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return summary


def _save_model(task: Task, folder: Path, dtype: torch.dtype, state: Mapping[str, torch.Tensor]) -> None:
    """The model of an objective's state dict, with its processor."""
    from instructsam.models.checkpoints import replace_folder
    from instructsam.models.lora import save_with_adapter

    with replace_folder(folder) as unfinished:
        own = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
        save_with_adapter(task.model, unfinished, dtype, own)
        task.processor.save_pretrained(unfinished)
    print(f"model saved to {folder}")


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = complete_settings(config)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with exclusive(settings["output_dir"]) if first else nullcontext():
            summary = train(settings, list(HydraConfig.get().overrides.task))
    except ValueError as error:
        sys.exit(f"error: {error}")
    code = 130 if summary["status"] == "interrupted" else 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
