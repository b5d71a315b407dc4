"""Train InstructSAM.

    python -m instructsam.train                                    # the tiny world on a CPU, from scratch
    python -m instructsam.train experiment=tiny_detector           # the quickstart's three runs, one after the other
    python -m instructsam.train experiment=tiny_vlm
    python -m instructsam.train experiment=tiny_world
    python -m instructsam.train experiment=stage1                  # the release's recipe on Qwen3-VL-2B and SAM 3
    bash scripts/launch/one_node.sh zero1 experiment=stage1        # all GPUs of a machine; README, "Train"
    python -m instructsam.train debug=limit                        # two steps of everything; overfit, profile

The same command again continues a run that was interrupted. Settings: `configs/train.yaml` and what it names.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from instructsam.configs_path import CONFIGS, complete_settings
from instructsam.training.lock import exclusive


def train(settings: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one training as configured; returns the trainer's summary. See `training.trainer.Trainer.run`.

    overrides: what of the settings was given on the command line, for the records.
    """
    from instructsam.models.checkpoints import replace_folder
    from instructsam.models.compiling import compile_frozen_vision
    from instructsam.models.lora import save_with_adapter
    from instructsam.models.placement import as_dtype
    from instructsam.training.build import build_task
    from instructsam.training.config import TrainerConfig
    from instructsam.training.optim import OptimConfig, select_parameters
    from instructsam.training.overfit import verdict
    from instructsam.training.trainer import Trainer

    save_dtype = as_dtype(settings["save_dtype"], "save_dtype", auto=False)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    task = build_task(settings)
    if task.model.load_report is not None and int(os.environ.get("RANK", 0)) == 0:
        task.model.load_report.write(Path(settings["output_dir"]) / "load_report.json")
    config = TrainerConfig.from_dict(
        {**settings["trainer"], "seed": settings["seed"], "output_dir": settings["output_dir"]}
    )
    evaluate = None
    if config.eval_every:
        from instructsam.training.evaluating import periodic_evaluation

        evaluate = periodic_evaluation(task, settings)
    fingerprint = {key: settings[key] for key in ("model", "data", "objective")}
    optim = OptimConfig.from_dict(settings["optim"])
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
        fingerprint,
        task.group_by,
        task.sizes,
        settings,
        overrides,
    )
    summary = trainer.run()
    if summary["status"] != "interrupted":
        state = trainer.state_dict()
        if trainer.accelerator.is_main_process:
            folder = Path(settings["output_dir"]) / "checkpoint"
            with replace_folder(folder) as unfinished:
                model_state = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
                save_with_adapter(task.model, unfinished, save_dtype, model_state)
                task.processor.save_pretrained(unfinished)
            print(f"model saved to {folder}")
        if evaluate is not None and settings["evaluation"]["data"] == "train" and trainer.accelerator.is_main_process:
            print(verdict(trainer.tracking.losses.read(), summary["metrics"]))
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return summary


@hydra.main(config_path=CONFIGS, config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):  # launch scripts have their launcher, and so us, ignore them
        signal.signal(number, signal.SIG_DFL)
    settings = complete_settings(config)
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        with exclusive(settings["output_dir"]) if first else nullcontext():
            if first:
                OmegaConf.save(OmegaConf.create(settings), Path(settings["output_dir"]) / "config.yaml")
            summary = train(settings, list(HydraConfig.get().overrides.task))
    except ValueError as error:
        sys.exit(f"error: {error}")
    code = 130 if summary["status"] == "interrupted" else 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Everything is written. Threads of the process group sometimes abort the interpreter while it shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
