"""Every configuration composes, and names only what exists."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_fixtures import CONFIGS, settings_of

from instructsam.models.configuration import InstructSAMConfig
from instructsam.training.build import OBJECTIVES
from instructsam.training.optim import OptimConfig
from instructsam.training.trainer import TrainerConfig


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


GROUPS = [
    f"{group}={choice}"
    for group in ("experiment", "debug", "objective", "optim", "model", "data")
    for choice in choices(group)
]


@pytest.mark.parametrize("override", GROUPS)
def test_training_configurations(override):
    settings = settings_of("train", override)
    TrainerConfig.from_dict({**settings["trainer"], "seed": settings["seed"], "output_dir": settings["output_dir"]})
    OptimConfig.from_dict(settings["optim"])
    InstructSAMConfig(**settings["model"]["config"])
    assert settings["objective"]["name"] in OBJECTIVES


@pytest.mark.parametrize("choice", choices("data"))
def test_evaluation_configuration(choice):
    settings = settings_of("eval", f"data={choice}", "checkpoint=somewhere")
    assert settings["checkpoint"] == "somewhere"


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_experiments_state_their_command(path: Path):
    assert f"python -m instructsam.train experiment={path.stem}" in path.read_text()
