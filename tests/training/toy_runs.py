"""What tests of the trainer share: runs of the toy, in this process or in others, and what they wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import forked
import multiprocess_toy as toy
import pytest
import torch
from accelerate.state import AcceleratorState
from double_precision import CLOSE
from safetensors.torch import load_file

from instructsam.training.checkpoint_files import FOLDER
from instructsam.training.checkpointing import WEIGHTS_FILE


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Accelerate keeps its state for the life of the process: reset it, so that tests can differ in precision."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run_script(*arguments, processes: int = 1, exact: bool = False, **variables: str) -> subprocess.CompletedProcess:
    """Train the toy in processes of its own; exact: in float64."""
    command = ["-m", *(["double_precision"] if exact else []), "multiprocess_toy", *arguments]
    return forked.run(command, processes, **{"ACCELERATE_USE_CPU": "true", **variables})


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of(folder: Path) -> list[dict]:
    return lines_of(folder / "losses.jsonl")


def events_of(folder: Path) -> list[dict]:
    return lines_of(folder / "events.jsonl")


def interrupted_at(step: int):
    """A run that ends as a step begins."""

    def at_step(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return at_step


def cut_short(output_dir: Path, step: int, **settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy.toy_trainer(output_dir, at_step=interrupted_at(step), **settings).run()


def assert_same_files(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def weights_of(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_file(folder / FOLDER / f"step_{step:06d}" / WEIGHTS_FILE)


def assert_same_training(one: Path, other: Path, tolerance: float = CLOSE) -> None:
    for a, b in zip(losses_of(one), losses_of(other), strict=True):
        assert a["terms"] == pytest.approx(b["terms"], abs=tolerance)
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=tolerance)
        assert a["lr"] == b["lr"]
    torch.testing.assert_close(weights_of(one), weights_of(other), atol=tolerance, rtol=0)
