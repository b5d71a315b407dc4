"""The launch scripts, run as a user runs them, with two processes on a CPU in the place of GPUs; Slurm is played."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

REPOSITORY = Path(__file__).parents[1]
LAYERS = ("qwen3_vl.modeling_qwen3_vl", "sam3.modeling_sam3")
ENGINES = {"zero1": 1, "zero2": 2, "zero3": 3}

SRUN = """#!/usr/bin/env bash
# Plays srun on one node: hands SIGUSR1 on to the task itself, not to what that has started, as Slurm does with cgroups.
shift
"${@}" &
task=$!
trap 'kill -USR1 "$task"' USR1
while true; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def start(command: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "GPUS": "2", **variables}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def overrides(world: Path, output: Path, steps: int) -> list[str]:
    settings = [f"data.root={world}", f"output_dir={output}", f"trainer.max_steps={steps}", "trainer.log_every=1"]
    return [*settings, "trainer.per_device_batch_size=1", "trainer.checkpoint_every=0"]


def steps_of(output: Path) -> list[int]:
    path = output / "losses.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(process: subprocess.Popen, output: Path, number: int) -> None:
    deadline = time.time() + 200
    while len(steps_of(output)) < number:
        assert time.time() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    engine = str(getattr(config.distributed_type, "value", config.distributed_type))
    assert config.mixed_precision == "no", "trainer.precision decides"
    if path.stem in ENGINES:
        assert engine == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == ENGINES[path.stem]
    elif path.stem == "fsdp2":
        assert engine == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    else:
        assert engine == ("MULTI_GPU" if path.stem in ("ddp", "multi_node") else "NO")
    assert (config.num_machines, config.use_cpu) == (2 if path.stem == "multi_node" else 1, path.stem == "cpu")
    assert f"configs/accelerate/{path.name}" in path.read_text().split("compute_environment")[0], "no command"


def test_layers_that_fsdp_wraps_exist():
    # By their modules: the package's lazy import of SAM 3 asks for torchvision.
    sources = [importlib.import_module(f"transformers.models.{name}") for name in LAYERS]
    names = load_config_from_file(str(REPOSITORY / "configs/accelerate/fsdp2.yaml")).fsdp_config
    for name in names["fsdp_transformer_layer_cls_to_wrap"].split(","):
        assert any(hasattr(source, name) for source in sources), name


@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts/launch").iterdir()), ids=lambda path: path.name)
def test_scripts_are_sound_shell(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_no_gpu_and_no_engine_are_said():
    without = start(["bash", "scripts/launch/one_node.sh", "ddp", "experiment=stage1"], GPUS="0")
    assert "python -m instructsam.train experiment=stage1" in without.communicate()[0] and without.returncode == 2
    unnamed = start(["bash", "scripts/launch/one_node.sh"])
    assert "which engine?" in unnamed.communicate()[0] and unnamed.returncode != 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_node(world, tmp_path):
    said = start(
        ["bash", "scripts/launch/one_node.sh", "ddp", *overrides(world, tmp_path, 2)], ACCELERATE_USE_CPU="true"
    )
    output, _ = said.communicate(timeout=300)
    assert said.returncode == 0, output
    assert "2 processes" in output and "engine ddp" in output
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_slurm_saves_and_requeues_before_the_time_is_up(world, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {
        "PATH": f"{programs}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "ACCELERATE_USE_CPU": "true", "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node1", "SLURM_NODEID": "0",
    }  # fmt: skip
    command = ["bash", "scripts/launch/slurm.sbatch", "ddp", *overrides(world, tmp_path / "run", 400)]
    job = start(command, **slurm)
    wait_for_steps(job, tmp_path / "run", 2)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300
    output, _ = job.communicate(timeout=200)
    assert job.returncode != 0 and "stopped by SIGUSR1" in output and "back into the queue" in output, output
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    done = steps_of(tmp_path / "run")[-1]

    again = start(command, **slurm)
    wait_for_steps(again, tmp_path / "run", done + 2)
    again.send_signal(signal.SIGUSR1)
    output, _ = again.communicate(timeout=200)
    assert f"resuming from {tmp_path}/run/checkpoints/step_{done:06d}" in output
    steps = steps_of(tmp_path / "run")
    assert steps == list(range(1, steps[-1] + 1))
