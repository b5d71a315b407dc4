"""A real training command, killed without warning and started again, ends with the same files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instructsam.lock import exclusive
from instructsam.training.checkpoint_files import FOLDER, STATE_FILE, find_damage, list_checkpoints
from instructsam.training.checkpointing import OPTIMIZER_FILE, RNG_FILE, WEIGHTS_FILE

REPOSITORY = Path(__file__).parents[2]
STEPS = 24
# Kills while a checkpoint is being written, by what of it is there already; "" is the folder. None: in any step.
KILLS = ["", None, WEIGHTS_FILE, None, OPTIMIZER_FILE, None, RNG_FILE, STATE_FILE, None, STATE_FILE]


def start(world: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "instructsam.train", "experiment=tiny_vlm", f"data.root={world}"]
    command += [f"output_dir={output}", f"trainer.max_steps={STEPS}", "trainer.per_device_batch_size=2"]
    command += ["trainer.checkpoint_every=1", "trainer.log_every=1", "trainer.progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


def finished_steps(output: Path) -> int:
    """Of the newest checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(output)), default=0)


def kill_when(process: subprocess.Popen, moment, delay: float = 0.0) -> None:
    deadline = time.time() + 120
    while not moment():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.time() < deadline
        time.sleep(0.0002)
    if delay:
        time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_killed_ten_times_and_started_again(world, tmp_path):
    """In steps and while checkpoints are written, at every file of them. Each part of the run gets a step further."""
    finish(start(world, tmp_path / "whole"))
    killed = tmp_path / "killed"
    losses, generator = killed / "losses.jsonl", random.Random(0)
    hit = 0
    for written in KILLS:
        done = finished_steps(killed)
        process = start(world, killed)
        if written is None:
            lines, delay = done + generator.randint(1, 2), generator.uniform(0, 0.2)
            kill_when(process, lambda n=lines: losses.exists() and losses.read_text().count("\n") >= n, delay)
            continue
        finished = killed / FOLDER / f"step_{done + 2:06d}"
        unfinished = finished.with_name(finished.name + ".tmp")
        # A busy machine may miss the moment: then it is a kill like the others.
        kill_when(process, lambda a=unfinished / written, b=finished: a.exists() or b.exists())
        hit += unfinished.exists()
        # What was there before is whole, whatever became of this one.
        assert done + 1 <= finished_steps(killed) <= done + 3
        assert find_damage(list_checkpoints(killed)[-1]) is None
    assert hit >= 2, f"{hit} kills came while a checkpoint was being written"
    assert finished_steps(killed) < STEPS and not (killed / "checkpoint").exists()
    assert f"resuming from {list_checkpoints(killed)[-1]}" in finish(start(world, killed))
    for name in ("losses.jsonl", "checkpoint/model.safetensors"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (killed / FOLDER).iterdir()) == ["step_000023", "step_000024"]
    assert not list(killed.rglob("*.tmp"))


def test_two_runs_in_one_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process is at work there"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
