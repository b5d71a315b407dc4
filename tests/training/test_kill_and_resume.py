"""A real training command, killed without warning and started again, ends with the same files."""

from __future__ import annotations

import signal
from pathlib import Path

import forked
import pytest

from instructsam.lock import exclusive
from instructsam.training.checkpoint_files import FOLDER, STATE_FILE, find_damage, list_checkpoints, path_of
from instructsam.training.checkpointing import OPTIMIZER_FILE, RNG_FILE, WEIGHTS_FILE

STEPS = 14
KILLED = Path(__file__).with_name("killed_training.py")
# Where the runs are killed, see killed_training.py; each gets a step further than the one before.
KILLS = ("step", "folder", WEIGHTS_FILE, OPTIMIZER_FILE, "step", RNG_FILE, STATE_FILE, "publish", "prune", "step")


def settings(world: Path, output: Path) -> list[str]:
    found = ["experiment=tiny_vlm", f"data.root={world}", f"output_dir={output}", f"trainer.max_steps={STEPS}"]
    found += ["trainer.per_device_batch_size=2", "trainer.checkpoint_every=1", "trainer.log_every=1"]
    return [*found, "trainer.progress_bar=false"]


def train(world: Path, output: Path) -> str:
    done = forked.run(["-m", "instructsam.train", *settings(world, output)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished_steps(output: Path) -> int:
    """Of the newest checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(output)), default=0)


@pytest.mark.slow
def test_killed_at_every_moment_and_started_again(world, tmp_path):
    """In steps and while checkpoints are written, at every file: what is there is whole, and the end is the same."""
    train(world, tmp_path / "whole")
    killed = tmp_path / "killed"
    for moment in KILLS:
        step = finished_steps(killed) + 2  # so that there is always a checkpoint from before
        done = forked.run([KILLED, moment, step, *settings(world, killed)])
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        assert finished_steps(killed) == (step if moment == "prune" else step - 1)
        assert find_damage(list_checkpoints(killed)[-1]) is None
        unfinished = killed / FOLDER / f"step_{step:06d}.tmp"
        assert unfinished.exists() == (moment not in ("step", "prune"))
        assert (unfinished / moment).exists() == (moment in (WEIGHTS_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE))
    assert finished_steps(killed) < STEPS and not (killed / "checkpoint").exists()
    assert f"resuming from {list_checkpoints(killed)[-1]}" in train(world, killed)
    for name in ("losses.jsonl", "checkpoint/model.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (killed / FOLDER).iterdir()) == [
        path_of("", step).name for step in (STEPS - 1, STEPS)
    ]
    assert not list(killed.rglob("*.tmp"))


def test_two_runs_in_one_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process is at work there"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
