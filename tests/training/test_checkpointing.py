"""Checkpoints: whole or invisible, exact, and unwilling to continue another run."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from instructsam.training.checkpointing import (
    FOLDER,
    STATE_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Checkpointer,
    capture_rng,
    find_damage,
    fingerprint_differences,
    latest,
    list_checkpoints,
    load_weights,
    restore_rng,
)
from instructsam.training.optim import OptimConfig, build_optimizer, build_schedule


class Tied(nn.Module):
    """Two names for one tensor, a buffer, and a view that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.side = nn.Parameter(torch.randn(3, 4).t())
        self.register_buffer("seen", torch.zeros(()))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def checkpointer(folder, fingerprint=None, keep=2, objective=None) -> Checkpointer:
    objective = objective or Tied()
    config = OptimConfig(lr=0.1)
    optimizer = build_optimizer(objective, config)
    schedule = build_schedule(optimizer, config, 100)
    return Checkpointer(folder, Accelerator(), objective, optimizer, schedule, fingerprint or {}, keep)


def train_a_step(saver: Checkpointer) -> None:
    model = saver.objective
    (model.head(model.embed.weight).square().mean() + model.side.sum()).backward()
    model.seen += 1
    saver.optimizer.step()
    saver.optimizer.zero_grad()
    saver.scheduler.step()


def test_everything_comes_back(tmp_path):
    saver = checkpointer(tmp_path)
    train_a_step(saver)
    saver.save(1)
    other = checkpointer(tmp_path)
    assert other.find_latest() == tmp_path / FOLDER / "step_000001"
    assert other.load(other.find_latest()) == 1
    train_a_step(saver)
    train_a_step(other)
    for name, value in saver.objective.state_dict().items():
        assert torch.equal(value, other.objective.state_dict()[name]), name
    assert saver.scheduler.get_last_lr() == other.scheduler.get_last_lr()
    assert other.objective.head.weight is other.objective.embed.weight, "still tied"
    fresh = Tied()
    load_weights(tmp_path / FOLDER / "step_000001", fresh)
    assert fresh.seen == 1


def test_weights_of_another_shape_are_an_error(tmp_path):
    checkpointer(tmp_path).save(1)
    with pytest.raises(ValueError, match="cannot load"):
        load_weights(tmp_path / FOLDER / "step_000001", nn.Linear(2, 2))


def test_only_the_newest_are_kept(tmp_path):
    saver = checkpointer(tmp_path, keep=2)
    for step in (5, 10, 15):
        saver.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_000015"]
    keeper = checkpointer(tmp_path / "all", keep=0)
    for step in (1, 2, 3):
        keeper.save(step)
    assert len(list_checkpoints(tmp_path / "all")) == 3


def test_order_is_by_number_not_by_name(tmp_path):
    saver = checkpointer(tmp_path, keep=0)
    saver.save(1_000_000)
    saver.save(999_999)
    assert latest(tmp_path).name == "step_1000000"


def test_no_run_has_no_checkpoint(tmp_path):
    assert latest(tmp_path / "nothing") is None and list_checkpoints(tmp_path) == []


def test_unfinished_checkpoint_is_ignored_then_removed(tmp_path):
    saver = checkpointer(tmp_path)
    saver.save(5)
    unfinished = tmp_path / FOLDER / "step_000010.tmp"
    unfinished.mkdir()
    (unfinished / WEIGHTS_FILE).write_bytes(b"half")
    assert latest(tmp_path).name == "step_000005"
    saver.save(10)
    assert latest(tmp_path).name == "step_000010" and find_damage(latest(tmp_path)) is None
    unfinished.mkdir()
    saver.clean()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step_000005", "step_000010"]


def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saver = checkpointer(tmp_path)
    saver.save(5)

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        saver.save(10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005"]
    assert find_damage(latest(tmp_path)) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / TRAINING_FILE).unlink(), "is missing"),
        (lambda path: (path / WEIGHTS_FILE).write_bytes(b"short"), "bytes instead of"),
        (lambda path: flip_last_byte(path / WEIGHTS_FILE), "checksum"),
        (lambda path: (path / STATE_FILE).write_text("{"), "not valid JSON"),
        (lambda path: (path / STATE_FILE).write_text("[]"), "not the state of a checkpoint"),
        (lambda path: (path / STATE_FILE).unlink(), "cannot read"),
    ],
)
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage, message):
    saver = checkpointer(tmp_path)
    saver.save(5)
    saver.save(10)
    damage(tmp_path / FOLDER / "step_000010")
    assert message in find_damage(tmp_path / FOLDER / "step_000010")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).name == "step_000005"
    assert "step_000010" in caplog.text and message in caplog.text
    saver.save(10)
    assert latest(tmp_path).name == "step_000010", "a damaged checkpoint is replaced"


def flip_last_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def test_other_configuration_is_a_one_line_error_and_changes_nothing(tmp_path):
    checkpointer(tmp_path, {"model": {"queries": 10, "size": [4, 4]}, "lr": 0.1}).save(5)
    same = checkpointer(tmp_path, {"model": {"queries": 10, "size": (4, 4)}, "lr": 0.1})
    assert same.load(same.find_latest()) == 5
    other = checkpointer(tmp_path, {"model": {"queries": 20, "size": [4, 4]}, "seed": 1})
    before = other.objective.embed.weight.clone()
    with pytest.raises(ValueError) as error:
        other.load(other.find_latest())
    text = str(error.value)
    assert "\n" not in text
    assert "model.queries is 10 there and 20 here" in text
    assert "lr is 0.1 there and 'absent' here" in text and "seed is 'absent' there and 1 here" in text
    assert "size" not in text
    assert torch.equal(other.objective.embed.weight, before)


def test_fingerprint_differences_of_nested_settings():
    assert fingerprint_differences({"a": {"b": 1}, "c": {}}, {"a": {"b": 1}, "c": {}}) == []
    assert fingerprint_differences({"a": {"b": 1}}, {"a": {}}) == [
        "a is 'absent' there and {} here",
        "a.b is 1 there and 'absent' here",
    ]


def test_pickled_code_is_not_run(tmp_path):
    """A training file with anything but plain data is refused by torch's restricted reader."""
    saver = checkpointer(tmp_path)
    saver.save(1)
    torch.save({"optimizer": random.Random(0)}, tmp_path / FOLDER / "step_000001" / TRAINING_FILE)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        saver.load(tmp_path / FOLDER / "step_000001")


def test_random_states_come_back():
    def draw() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    np.random.randn()  # leaves a second value in store, which belongs to the state
    state = capture_rng()
    first = draw()
    assert draw() != first
    restore_rng(state)
    assert draw() == first


def test_state_is_readable_json(tmp_path):
    path = checkpointer(tmp_path, {"seed": 3}).save(7)
    state = json.loads((path / STATE_FILE).read_text())
    assert state["step"] == 7 and state["fingerprint"] == {"seed": 3} and WEIGHTS_FILE in state["files"]
