"""Sweeps over stub commands: killed and started again, failing cells, changed settings, several at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from instructsam.ablation.cells import parse
from instructsam.ablation.runner import Sweep
from instructsam.ablation.state import Place, status_of

STUB = str(Path(__file__).with_name("stub_command.py"))
TOY = {
    "name": "toy",
    "stages": {"bridge": ["experiment=tiny_world"]},
    "cells": {
        "late": {"trained_as": "a", "evaluate": ["attention_variant=causal"]},
        "a": {},
        "b": {"train": ["optim.lr=0.5"]},
    },
    "default": "a",
    "seeds": [0],
}


@pytest.fixture
def control(tmp_path) -> Path:
    folder = tmp_path / "control"
    folder.mkdir()
    return folder


def commands(control: Path) -> dict:
    return {f"{what}_command": [sys.executable, STUB, what, str(control)] for what in ("train", "evaluate")}


def sweep(control: Path, values: dict = TOY, **options) -> Sweep:
    return Sweep(parse(values), control.parent / "out", **commands(control), **options)


def calls(control: Path) -> Counter:
    return Counter(line.split()[0] for line in (control / "calls.txt").read_text().splitlines())


def statuses(running: Sweep) -> dict[str, str]:
    pairs = running.ablation.order()
    return {f"{c.name}/{s}": status_of(running.ablation, running.output, c, s)[0] for c, s in pairs}


def start(control: Path) -> subprocess.Popen:
    """A sweep in a process of its own."""
    code = (
        "import json, sys\n"
        "from instructsam.ablation.cells import parse\n"
        "from instructsam.ablation.runner import Sweep\n"
        "values, out, options = map(json.loads, sys.argv[1:])\n"
        "sweep = Sweep(parse(values), out, **options)\n"
        "sys.exit(0 if sweep.run(sweep.ablation.order()) else 130)"
    )
    arguments = [TOY, str(control.parent / "out"), commands(control)]
    return subprocess.Popen([sys.executable, "-c", code, *map(json.dumps, arguments)])


def wait_for(path: Path) -> int:
    """The number that appears in a file."""
    for _ in range(1500):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def steps(control: Path, name: str) -> list[str]:
    return (control.parent / f"out/cells/{name}/steps.txt").read_text().split()


@pytest.mark.multiprocess
def test_all_cells_run_once(control):
    first = sweep(control)
    assert first.run(first.ablation.order())
    expected = Counter(
        ("train_a_seed_0", "train_b_seed_0", "evaluate_a_seed_0", "evaluate_b_seed_0", "evaluate_late_seed_0")
    )
    assert set(statuses(first).values()) == {"complete"} and calls(control) == expected
    record = Place.of(first.output, first.ablation.cells["b"], 0).steps()["bridge"]
    assert record["settings"]["optim"]["lr"] == 0.5 and record["seconds"] > 0
    again = sweep(control)
    assert again.run(again.ablation.order()) and calls(control) == expected


@pytest.mark.multiprocess
def test_a_killed_sweep_goes_on(control):
    (control / "block_train_b_seed_0").touch()
    process = start(control)
    child = wait_for(control / "blocked_train_b_seed_0")
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    (control / "block_train_b_seed_0").unlink()
    again = sweep(control)
    assert statuses(again) == {"a/0": "complete", "b/0": "running", "late/0": "interrupted"}
    assert again.run(again.ablation.order())
    assert set(statuses(again).values()) == {"complete"}
    assert calls(control)["train_b_seed_0"] == 2 and calls(control)["train_a_seed_0"] == 1
    assert steps(control, "b/seed_0/train/bridge") == ["0", "1", "2"]  # none twice


@pytest.mark.multiprocess
def test_an_orphan_of_a_killed_sweep_is_waited_for(control):
    (control / "block_train_b_seed_0").touch()
    process = start(control)
    wait_for(control / "blocked_train_b_seed_0")
    process.kill()
    process.wait()
    again = sweep(control)
    threading.Timer(1.0, (control / "block_train_b_seed_0").unlink).start()
    assert again.run(again.ablation.order())
    assert set(statuses(again).values()) == {"complete"}
    assert steps(control, "b/seed_0/train/bridge") == ["0", "1", "2"]


@pytest.mark.multiprocess
def test_a_signal_stops_the_commands_too(control):
    (control / "block_train_b_seed_0").touch()
    process = start(control)
    child = wait_for(control / "blocked_train_b_seed_0")
    process.terminate()
    assert process.wait(timeout=300) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    (control / "block_train_b_seed_0").unlink()
    again = sweep(control)
    assert statuses(again)["b/0"] == "interrupted"
    assert again.run(again.ablation.order()) and set(statuses(again).values()) == {"complete"}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fail", "bridge: exit code 1: error: no such folder: data/none"),
        ("kill", "bridge: killed by SIGKILL (out of memory?)"),
        ("nothing", "bridge: ended without writing checkpoint"),
    ],
)
def test_a_failed_cell_stops_no_other(control, how, reason):
    (control / f"{how}_train_a_seed_0").touch()
    first = sweep(control)
    assert first.run(first.ablation.order())
    assert statuses(first) == {"a/0": "failed", "b/0": "complete", "late/0": "failed"}
    cells = first.ablation.cells
    assert status_of(first.ablation, first.output, cells["a"], 0)[1] == reason
    assert status_of(first.ablation, first.output, cells["late"], 0)[1] == reason.replace("bridge", "bridge of a", 1)
    (control / f"{how}_train_a_seed_0").unlink()
    again = sweep(control)
    again.run(again.ablation.order())
    assert calls(control)["train_a_seed_0"] == 1, "failed cells are not run again unasked"
    retried = sweep(control, retry=True)
    assert retried.run(retried.ablation.order()) and set(statuses(retried).values()) == {"complete"}
    assert calls(control)["train_b_seed_0"] == 1


@pytest.mark.multiprocess
def test_a_command_that_does_not_exist(control):
    broken = Sweep(parse(TOY), control.parent / "out", ["/nowhere/python"], ["/nowhere/python"])
    assert broken.run(broken.ablation.order())
    assert (
        "/nowhere/python: No such file" in status_of(broken.ablation, broken.output, broken.ablation.cells["a"], 0)[1]
    )


@pytest.mark.multiprocess
def test_changed_settings_are_an_error_that_names_the_cell(control):
    first = sweep(control)
    first.run(first.ablation.order())
    changed = {**TOY, "cells": {**TOY["cells"], "b": {"train": ["optim.lr=0.25"]}}}
    with pytest.raises(ValueError, match=r"cell b, seed 0: bridge .*optim.lr: 0.5 there, 0.25 now"):
        sweep(control, changed)
    sweep(control, {**TOY, "train": ["trainer.log_every=7"]})  # results do not depend on it
    more = sweep(control, {**TOY, "seeds": [0, 3]})
    assert more.run(more.ablation.order())
    assert calls(control)["train_a_seed_0"] == 1 and "train_a_seed_3 3 -" in (control / "calls.txt").read_text()


@pytest.mark.multiprocess
def test_an_evaluation_whose_model_is_gone(control):
    first = sweep(control)
    first.run(first.ablation.order())
    shutil.rmtree(first.output / "cells/a")
    with pytest.raises(ValueError, match="cell late, seed 0: evaluated, but the training of a is gone"):
        sweep(control)
    shutil.rmtree(first.output / "cells/late")
    again = sweep(control)
    assert again.run(again.ablation.order()) and set(statuses(again).values()) == {"complete"}


@pytest.mark.multiprocess
def test_a_failed_cell_may_be_mended(control):
    (control / "fail_train_b_seed_0").touch()
    first = sweep(control)
    first.run(first.ablation.order())
    (control / "fail_train_b_seed_0").unlink()
    mended = sweep(control, {**TOY, "cells": {**TOY["cells"], "b": {"train": ["optim.lr=0.25"]}}}, retry=True)
    assert mended.run(mended.ablation.order()) and statuses(mended)["b/0"] == "complete"


@pytest.mark.multiprocess
def test_several_at_once_have_a_device_each(control):
    for name in ("train_a_seed_0", "train_b_seed_0"):
        (control / f"block_{name}").touch()
    running = sweep(control, jobs=2, devices=[3, 5])

    def release() -> None:
        wait_for(control / "blocked_train_a_seed_0"), wait_for(control / "blocked_train_b_seed_0")
        for name in ("train_a_seed_0", "train_b_seed_0"):
            (control / f"block_{name}").unlink()

    thread = threading.Thread(target=release)
    thread.start()
    assert running.run(running.ablation.order())  # ends only if both run at the same time
    thread.join()
    assert set(statuses(running).values()) == {"complete"}
    devices = [line.split()[2] for line in (control / "calls.txt").read_text().splitlines()]
    assert sorted(devices[:2]) == ["3", "5"]


@pytest.mark.multiprocess
def test_two_sweeps_share_the_work(control):
    (control / "block_train_a_seed_0").touch()
    process = start(control)
    wait_for(control / "blocked_train_a_seed_0")
    other = sweep(control)
    seeds = [pair for pair in other.ablation.order() if pair[0].name != "late"]
    threading.Timer(1.5, (control / "block_train_a_seed_0").unlink).start()
    assert other.run(seeds) and process.wait(timeout=300) == 0
    assert set(statuses(other).values()) == {"complete"}
    assert max(calls(control).values()) == 1


@pytest.mark.parametrize("options", [{"jobs": 0}, {"jobs": True}, {"jobs": 2, "devices": [0]}])
def test_options_out_of_range(control, options):
    with pytest.raises(ValueError, match="jobs="):
        sweep(control, **options)
