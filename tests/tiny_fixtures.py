"""A small tiny world and a small untrained model, made once for the whole suite."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[1] / "configs"
SHALLOW = [
    "model.config.vlm_config.text_config.num_hidden_layers=2",
    "model.config.vlm_config.vision_config.depth=2",
    "model.config.detector_config.vision_config.backbone_config.num_hidden_layers=2",
    "model.config.detector_config.vision_config.backbone_config.global_attn_indexes=[0,1]",
    "model.config.detector_config.detr_decoder_config.num_layers=2",
    "objective.query_box_layers=2",
]
"""Of a model with two layers of a kind, the least that can be told from one: time goes by the number of tensors."""


def settings_of(name: str, *overrides: str) -> dict[str, Any]:
    """A composed and resolved configuration, to do with as one likes."""
    return copy.deepcopy(_composed(name, overrides))


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tiny world of 12 training and 6 held-out scenes."""
    from instructsam.data.tiny_world import make_tiny_world

    root = tmp_path_factory.mktemp("world") / "tiny_world"
    make_tiny_world(root, train=12, val=6, seed=0)
    return root


def _saved(world: Path, folder: Path, *overrides: str) -> Path:
    from instructsam.models.factory import build_model

    settings = settings_of("train", f"data.root={world}", *overrides)
    model, processor = build_model(settings["model"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(world, tmp_path_factory) -> Path:
    """An untrained tiny model, saved."""
    return _saved(world, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def shallow_checkpoint(world, tmp_path_factory) -> Path:
    """One with two layers of a kind, for what takes many steps or float64. Objectives need query_box_layers=2."""
    return _saved(world, tmp_path_factory.mktemp("shallow_checkpoint") / "model", *SHALLOW)
