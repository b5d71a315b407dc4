"""Every configuration composes, and names only what exists."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import forked
import pytest
from tiny_fixtures import CONFIGS, settings_of

from instructsam.data.augmentation import Augmentation
from instructsam.data.composition import Composition
from instructsam.data.sources import open_sources, parse_sources
from instructsam.losses.criterion import CriterionConfig
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.factory import SETTINGS
from instructsam.models.lora import LoraSettings
from instructsam.models.placement import as_dtype
from instructsam.training.build import OBJECTIVES
from instructsam.training.checkpoint_files import fingerprint_differences
from instructsam.training.config import TrainerConfig
from instructsam.training.optim import OptimConfig

REPOSITORY = Path(__file__).parents[1]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


GROUPS = [
    f"{group}={choice}"
    for group in ("experiment", "debug", "objective", "optim", "model", "data")
    for choice in choices(group)
    if not choice.startswith("_")  # what others are made of
]


def test_prepared_data_that_is_missing_is_told_at_once(tmp_path, monkeypatch):
    """Nothing is built or read before everything that lacks is named, with what makes it."""
    monkeypatch.chdir(tmp_path)  # whatever lies in the repository's data/
    for name in ("stage1", "stage2", "originals"):
        settings = settings_of("train", f"data={name}", f"data.prepared={tmp_path}/prepared", "model.tokenizer=null")
        with pytest.raises(ValueError, match="are not prepared") as error:
            open_sources(settings["data"])
        text = str(error.value)
        assert f"python -m instructsam.prepare data={name}" in text
        assert all(f"\n  {source}: " in text for source in settings["data"]["sources"])
        with pytest.raises(ValueError, match="lack files") as error:
            open_sources({**settings["data"], "prepared": None})
        assert "bash scripts/prepare/" in str(error.value)
        assert all(f"\n  {source}: " in str(error.value) for source in settings["data"]["sources"])


def own_root(override: str) -> list[str]:
    """What only the user can give; the tiny model's words are those of its world."""
    given = {"data=coco_instructions": ["data.root=somewhere"], "data=originals": ["model.tokenizer=null"]}
    return given.get(override, [])


def check(settings: dict) -> None:
    TrainerConfig.from_dict({**settings["trainer"], "seed": settings["seed"], "output_dir": settings["output_dir"]})
    OptimConfig.from_dict(settings["optim"])
    InstructSAMConfig(**settings["model"]["config"])
    CriterionConfig.from_mapping(settings["objective"].get("criterion", {}))
    if settings["model"]["lora"] is not None:
        LoraSettings.from_mapping(settings["model"]["lora"])
    assert set(settings["model"]) <= SETTINGS
    assert settings["objective"]["name"] in OBJECTIVES
    parse_sources(settings["data"]["sources"])
    Composition.from_mapping(settings["data"]["composition"])
    Augmentation(**settings["data"]["augmentation"])
    as_dtype(settings["save_dtype"], "save_dtype", auto=False)


@pytest.mark.parametrize("override", GROUPS)
def test_training_configurations(override):
    check(settings_of("train", *own_root(override), override))


@pytest.mark.slow
@pytest.mark.parametrize("debug", choices("debug"))
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiments_can_be_debugged(experiment, debug):
    check(settings_of("train", f"experiment={experiment}", f"debug={debug}"))


@pytest.mark.parametrize("choice", choices("benchmark"))
def test_evaluation_configuration(choice):
    settings = settings_of("eval", f"benchmark={choice}", "checkpoint=somewhere")
    assert settings["checkpoint"] == "somewhere"


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_experiments_state_their_commands(path: Path):
    """Each runs from the repository's root as it stands there, at least as far as settings go."""
    comment = "\n".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    commands = re.findall(r"(?:python|accelerate launch .*?) -m instructsam\.train ((?:.*\\\n)*.*)", comment)
    assert any(command.startswith(f"experiment={path.stem}") for command in commands)
    for command in commands:
        check(settings_of("train", *shlex.split(command.replace("\\\n", " "))))


@pytest.mark.multiprocess
def test_settings_that_only_the_user_can_give_are_asked_for():
    done = forked.run(["-m", "instructsam.train", "data=coco_instructions"])
    assert done.returncode == 1 and done.stderr.strip() == "error: not given: data.root=..."


def test_stage_2_differs_from_stage_1_in_rates_start_and_accumulation_only():
    first, second = (settings_of("train", f"experiment=stage{stage}") for stage in (1, 2))
    differences = {text.split(" ")[0] for text in fingerprint_differences(first, second)}
    of_data = {name for name in differences if name.startswith("data.")}
    assert all(re.match(r"data\.(name|sources\.\w+)", name) for name in of_data)
    differences -= of_data
    rates = {"optim.lr", "optim.groups.vlm.lr", "optim.groups.detector.lr"}
    parts = {"model.vlm_path", "model.detector_path", "model.checkpoint"}
    assert differences == {"output_dir", "trainer.accumulation", *rates, *parts}


@pytest.mark.parametrize("experiment", ["tiny_world", "stage1", "stage2", "tiny_vlm"])
def test_every_setting_of_trainer_and_optimizer_can_be_given(experiment):
    """A field that no file mentions could only be given with a +, which nobody guesses."""
    settings = settings_of("train", f"experiment={experiment}", "data.root=somewhere")
    assert set(settings["trainer"]) == {field.name for field in fields(TrainerConfig)} - {"output_dir", "seed"}
    assert set(settings["optim"]) == {field.name for field in fields(OptimConfig)}


@pytest.mark.slow
def test_overrides_in_the_readme_compose():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Train")[1].split("## Evaluate")[0]
    found = re.findall(r"`(\+?(?:trainer|optim|model|data)[.=][^`]+=[^`]+)`", text.replace("\n", " "))
    assert len(found) > 12, found
    for overrides in found:
        settings_of("train", "experiment=stage1", "data.root=somewhere", *overrides.replace("NAME", "vlm").split())
