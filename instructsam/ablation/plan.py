"""What a cell's steps run with: the complete settings of each, composed before anything starts.

So an override that does not exist is told at once, and a finished step is known by what it was run with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from instructsam.ablation.cells import EVALUATION, Ablation, Cell
from instructsam.configs_path import CONFIGS

TRAIN_FOLDER = "{train}"
# What results do not depend on; these may differ between the parts of a sweep.
_FREE = {
    "train": {"seed", "output_dir", "threads"}
    | {f"trainer.{key}" for key in ("num_workers", "checkpoint_every", "keep_checkpoints", "log_every", "progress_bar")}
    | {f"trainer.{key}" for key in ("tensorboard", "wandb", "wandb_mode", "project", "peak_tflops", "resume")},
    EVALUATION: {"checkpoint", "output_dir", "device", "threads", "workers", "restart", "html", "gallery_rows"},
}


def filled(override: str, folder: str | Path) -> str:
    """An override with ``{train}`` replaced by a folder; the value is then quoted, as paths may hold anything."""
    if TRAIN_FOLDER not in override:
        return override
    key, _, value = override.partition("=")
    return f"{key}={quoted(value.replace(TRAIN_FOLDER, str(folder)))}"


def quoted(value: str | Path) -> str:
    """A text as Hydra reads it back unchanged."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def planned(ablation: Ablation, cell: Cell) -> dict[str, dict[str, Any]]:
    """Step -> settings that its result depends on, for the stages that a cell trains itself and its evaluation.

    Raises:
        ValueError: an override that does not fit the configuration, naming cell and step.
    """
    steps = {stage: _settings("train", overrides, cell, stage) for stage, overrides in cell.stages.items()}
    return {**steps, EVALUATION: _settings("eval", ["checkpoint=model", *cell.evaluate], cell, EVALUATION)}


def _settings(config: str, overrides: Any, cell: Cell, step: str) -> dict[str, Any]:
    try:
        values = _composed(config, [filled(override, "TRAIN") for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"cell {cell.name}, {step}: {' '.join(str(error).split())}") from error
    free = _FREE[EVALUATION if step == EVALUATION else "train"]
    kept = {key: value for key, value in values.items() if key not in free}
    if isinstance(kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if f"trainer.{key}" not in free}
    return cast(dict[str, Any], json.loads(json.dumps(kept)))  # as it is read back


def _composed(name: str, overrides: list[str]) -> dict[str, Any]:
    if GlobalHydra.instance().is_initialized():  # within a Hydra command, which knows the same folder
        config = compose(name, overrides=overrides)
    else:
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose(name, overrides=overrides)
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
