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

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from terminal import usual_signals

from instructsam.training.checkpoint_files import latest, path_of

REPOSITORY = Path(__file__).parents[1]
LAYERS = ("qwen3_vl.modeling_qwen3_vl", "sam3.modeling_sam3")
ENGINES = {"zero1": 1, "zero2": 2, "zero3": 3}

SRUN = """#!/usr/bin/env bash
# Plays srun on one node: hands SIGUSR1 on to the task itself, not to what that has started, and kills it on SIGTERM.
while [[ $1 == --* ]]; do echo "$1" >> "$SRUN_OPTIONS"; shift; done
"${@}" &
task=$!
trap 'kill -USR1 "$task"' USR1
trap 'kill -KILL "$task"' TERM
while true; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


LAUNCHER = """#!{python}
# Plays launcher.py: takes no notice of signals, and starts the training, if at all, after a while.
import os, pathlib, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
folder = pathlib.Path(os.environ["STUB"])
(folder / "launcher").write_text(f"{{os.getpid()}} {{os.getpgrp()}}")
command = [sys.executable, str(folder / "training.py"), "instructsam.train"]
sys.exit(subprocess.call(command) if (folder / "training.py").exists() else time.sleep(60))
"""
TRAINING = """
import os, pathlib, signal, sys, time
folder, received = pathlib.Path(os.environ["STUB"]), []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
(folder / "training").write_text("started")
deadline = time.time() + 300
while not received and time.time() < deadline:
    time.sleep(0.05)
time.sleep(1)  # saves; who signals twice is seen
(folder / "received").write_text(" ".join(received))
sys.exit(7)
"""


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """In a session, and so a process group, of its own, as of a terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "GPUS": "2", **variables}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=usual_signals,  # a shell cannot trap what it finds ignored
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(path: Path, process: subprocess.Popen) -> str:
    deadline = time.time() + 300
    while not path.exists() or not path.read_text():
        assert time.time() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return path.read_text()


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def overrides(world: Path, output: Path, steps: int) -> list[str]:
    settings = [f"data.root={world}", f"output_dir={output}", f"trainer.max_steps={steps}", "trainer.log_every=1"]
    return [*settings, "trainer.per_device_batch_size=1", "trainer.checkpoint_every=0"]


def steps_of(output: Path) -> list[int]:
    path = output / "losses.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(process: subprocess.Popen, output: Path, number: int) -> None:
    deadline = time.time() + 300
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


@pytest.mark.multiprocess
@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts/launch").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.multiprocess
def test_no_gpu_and_no_engine_are_said():
    without = start(["bash", "scripts/launch/one_node.sh", "ddp", "experiment=stage1"], GPUS="0")
    assert "python -m instructsam.train experiment=stage1" in without.communicate()[0] and without.returncode == 2
    unnamed = start(["bash", "scripts/launch/one_node.sh"])
    assert "which engine?" in unnamed.communicate()[0] and unnamed.returncode != 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_before_the_training_has_started_ends_the_launcher(name, tmp_path):
    stub = program(tmp_path / "python", LAUNCHER.format(python=sys.executable))
    script = start(["bash", "scripts/launch/one_node.sh", "ddp"], PYTHON=str(stub), STUB=str(tmp_path))
    launcher = int(wait_for(tmp_path / "launcher", script).split()[0])
    script.send_signal(getattr(signal, name))
    script.communicate(timeout=300)
    assert script.returncode not in (0, None) and not is_alive(launcher)


@pytest.mark.multiprocess
@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_reaches_the_training_once_and_the_script_waits_for_its_end(script, name, tmp_path):
    stub = program(tmp_path / "python", LAUNCHER.format(python=sys.executable))
    (tmp_path / "training.py").write_text(TRAINING)
    nodes = {"NODES": "1", "NODE_RANK": "0", "MASTER": "127.0.0.1"}
    run = start(["bash", f"scripts/launch/{script}", "ddp"], PYTHON=str(stub), STUB=str(tmp_path), **nodes)
    wait_for(tmp_path / "training", run)
    os.killpg(run.pid, getattr(signal, name))  # as Ctrl-C in a terminal
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 7, output
    assert (tmp_path / "received").read_text() == ("SIGTERM" if name == "SIGHUP" else name)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("engine", "number"), [("cpu", 1), ("ddp", 2)])  # accelerate's own launcher, torchrun
def test_the_launcher_outlives_signals_that_its_processes_do_not_ignore(engine, number, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, pathlib, signal, sys, time\n"
        "kinds = [signal.getsignal(getattr(signal, name)) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT')]\n"
        "usual = kinds == [signal.SIG_DFL, signal.SIG_DFL, signal.default_int_handler]\n"
        "pathlib.Path(sys.argv[1], 'child_' + os.environ.get('RANK', '0')).write_text(' '.join(os.environ))\n"
        "time.sleep(2)\n"
        "sys.exit(0 if usual else 9)\n"
    )
    command = [sys.executable, "scripts/launch/launcher.py", "--config_file", f"configs/accelerate/{engine}.yaml"]
    launch = start([*command, "--num_processes", str(number), str(child), str(tmp_path)], ACCELERATE_USE_CPU="true")
    for rank in range(number):
        wait_for(tmp_path / f"child_{rank}", launch)
    assert ("TORCHELASTIC_RUN_ID" in (tmp_path / "child_0").read_text()) == (engine == "ddp")
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        launch.send_signal(name)
        time.sleep(0.1)
    output, _ = launch.communicate(timeout=300)
    assert launch.returncode == 0, output


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("script", "engine", "gpus", "name"),
    [
        ("one_node.sh", "cpu", 1, "SIGINT"),
        ("one_node.sh", "ddp", 2, "SIGTERM"),
        ("several_nodes.sh", "ddp", 2, "SIGUSR1"),
    ],
)
def test_a_signal_saves_a_checkpoint(script, engine, gpus, name, world, tmp_path):
    variables = {"GPUS": str(gpus), "ACCELERATE_USE_CPU": "true", "NODES": "1", "NODE_RANK": "0"}
    variables |= {"MASTER": "127.0.0.1", "PORT": str(20000 + os.getpid() % 20000)}
    run = start(["bash", f"scripts/launch/{script}", engine, *overrides(world, tmp_path, 400)], **variables)
    wait_for_steps(run, tmp_path, 2)
    processes = [run, *psutil.Process(run.pid).children(recursive=True)] if name == "SIGTERM" else [run]
    for process in processes:  # a scheduler signals them all
        process.send_signal(getattr(signal, name))
    output, _ = run.communicate(timeout=300)
    assert run.returncode != 0 and f"stopped by {name}" in output and "SignalException" not in output, output
    done = steps_of(tmp_path)[-1]
    assert done < 400 and latest(tmp_path) == path_of(tmp_path, done)


def play_slurm(folder: Path) -> dict[str, str]:
    """Environment of a job on one node of two GPUs."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program(folder / "bin" / name, text)
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(folder / "requeued"),
        "SRUN_OPTIONS": str(folder / "srun_options"), "ACCELERATE_USE_CPU": "true",
        "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node1", "SLURM_NODEID": "0",
    }  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "requeues"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_slurm_waits_for_the_checkpoint(name, requeues, tmp_path):
    stub = program(tmp_path / "python", LAUNCHER.format(python=sys.executable))
    (tmp_path / "training.py").write_text(TRAINING)
    variables = {"PYTHON": str(stub), "STUB": str(tmp_path), "SLURM_CPUS_PER_TASK": "12", **play_slurm(tmp_path)}
    job = start(["bash", "scripts/launch/slurm.sbatch", "ddp"], **variables)
    wait_for(tmp_path / "training", job)
    job.send_signal(getattr(signal, name))
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 7 and (tmp_path / "received").read_text() == "SIGUSR1", output
    assert (tmp_path / "requeued").exists() == requeues == ("back into the queue" in output)
    assert "--cpus-per-task=12" in (tmp_path / "srun_options").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_slurm_saves_and_requeues_before_the_time_is_up(world, tmp_path):
    slurm = play_slurm(tmp_path)
    command = ["bash", "scripts/launch/slurm.sbatch", "ddp", *overrides(world, tmp_path / "run", 400)]
    job = start(command, **slurm)
    wait_for_steps(job, tmp_path / "run", 2)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300
    output, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "stopped by SIGUSR1" in output and "back into the queue" in output, output
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    done = steps_of(tmp_path / "run")[-1]

    again = start(command, **slurm)
    wait_for_steps(again, tmp_path / "run", done + 2)
    again.send_signal(signal.SIGUSR1)
    output, _ = again.communicate(timeout=300)
    assert f"resuming from {tmp_path}/run/checkpoints/step_{done:06d}" in output
    steps = steps_of(tmp_path / "run")
    assert steps == list(range(1, steps[-1] + 1))
