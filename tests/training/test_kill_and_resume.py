"""A real training command, killed without warning and started again, ends with the same loss file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instructsam.training.lock import exclusive

REPOSITORY = Path(__file__).parents[2]
STEPS = 9


def start(world: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "instructsam.train", "experiment=tiny_vlm", f"data.root={world}"]
    command += [f"output_dir={output}", f"trainer.max_steps={STEPS}", "trainer.per_device_batch_size=2"]
    command += ["trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.progress_bar=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.slow
def test_killed_and_started_again(world, tmp_path):
    finish(start(world, tmp_path / "whole"))
    process = start(world, tmp_path / "killed")
    losses = tmp_path / "killed" / "losses.jsonl"
    deadline = time.time() + 300
    while not losses.exists() or losses.read_text().count("\n") < 5:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert "resuming from" in finish(start(world, tmp_path / "killed"))
    assert losses.read_bytes() == (tmp_path / "whole" / "losses.jsonl").read_bytes()
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert "complete" in finish(start(world, tmp_path / "killed"))


def test_two_runs_in_one_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process is at work there"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
