"""The loop end to end on a toy: it learns, resumes to the byte, ignores how the batch is split, and fails loudly."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from instructsam.data.samplers import StepSampler
from instructsam.training.checkpointing import FOLDER, WEIGHTS_FILE
from instructsam.training.trainer import TrainerConfig, close_data

TOY = Path(__file__).with_name("multiprocess_toy.py")
spec = importlib.util.spec_from_file_location("multiprocess_toy", TOY)
toy = importlib.util.module_from_spec(spec)
sys.modules["multiprocess_toy"] = toy
spec.loader.exec_module(toy)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Accelerate keeps its state for the life of the process: reset it, so that tests can differ in precision."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run_script(*arguments, processes: int = 1, seconds: float = 300, **variables: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **variables}
    return subprocess.run(
        [*launcher, str(TOY), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=seconds
    )


def losses_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def weights_of(folder: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return load_file(folder / FOLDER / f"step_{step:06d}" / WEIGHTS_FILE)


def assert_same_training(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(losses_of(one), losses_of(other), strict=True):
        assert a["terms"] == pytest.approx(b["terms"], abs=tolerance)
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=tolerance)
        assert a["lr"] == b["lr"]
    torch.testing.assert_close(weights_of(one), weights_of(other), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------- learning


def test_loss_goes_down_and_every_step_is_recorded(tmp_path, capsys):
    result = toy.toy_trainer(tmp_path, max_steps=60, optim={"lr": 0.03}, progress_bar=True, log_every=20).run()
    records = losses_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 61))
    assert sum(r["loss"] for r in records[-10:]) < 0.2 * sum(r["loss"] for r in records[:10])
    assert result["status"] == "complete" and result["step"] == 60 and result["record"] == records[-1]
    assert set(records[0]["terms"]) == {"square", "rare"}
    assert records[0]["lr"] == {"default": 0.015}, "the rate the step used, not the next one"
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in printed] == ["step 20/60", "step 40/60", "step 60/60"]
    progress = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in progress] == [0, 20, 40, 60] and progress[-1]["samples_per_second"] > 0
    assert progress[-1]["epoch"] == 24.0


def test_bf16_trains(tmp_path):
    toy.toy_trainer(tmp_path, precision="bf16").run()
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path).values())


def test_clipping_bounds_the_update_but_records_the_norm_before(tmp_path):
    sgd_like = {"eps": 1e3, "warmup_steps": 0}  # with a huge eps the update is proportional to the gradient
    toy.toy_trainer(tmp_path / "clipped", clip_norm=1e-2, max_steps=1, optim=sgd_like).run()
    toy.toy_trainer(tmp_path / "free", clip_norm=0.0, max_steps=1, optim=sgd_like).run()
    norm = losses_of(tmp_path / "free")[0]["grad_norm"]
    assert norm > 0.1 and losses_of(tmp_path / "clipped")[0]["grad_norm"] == norm
    start = {name: p.detach() for name, p in toy.ToyObjective().named_parameters()}
    moved = {
        kind: torch.cat([(weights_of(tmp_path / kind, 1)[n] - start[n]).flatten() for n in start]).norm().item()
        for kind in ("clipped", "free")
    }
    assert moved["clipped"] < 0.2 * moved["free"]


def test_batches_without_units_train(tmp_path):
    toy.toy_trainer(tmp_path, dataset=toy.ToyDataset(rare=False), accumulation=2, per_device_batch_size=1).run()
    assert all(record["terms"]["rare"] == 0.0 for record in losses_of(tmp_path))


def test_evaluation_every_few_steps_and_at_the_end(tmp_path):
    def evaluate(step):
        assert not torch.is_grad_enabled()
        return {"score": step / 10}

    result = toy.toy_trainer(tmp_path, eval_every=5, evaluate=evaluate).run()
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 5, "metrics": {"score": 0.5}}, {"step": 8, "metrics": {"score": 0.8}}]
    assert result["metrics"] == {"score": 0.8}


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    toy.toy_trainer(tmp_path, tensorboard=True, log_every=2).run()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_missing_tracker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is switched on but not installed"):
        toy.toy_trainer(tmp_path, wandb=True).run()


# ---------------------------------------------------------------------- the split of the batch changes nothing


def test_accumulation_changes_nothing(tmp_path):
    toy.toy_trainer(tmp_path / "one").run()
    toy.toy_trainer(tmp_path / "two", per_device_batch_size=2, accumulation=2).run()
    toy.toy_trainer(tmp_path / "four", per_device_batch_size=1, accumulation=4).run()
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-6)
    assert_same_training(tmp_path / "one", tmp_path / "four", 1e-6)


def test_accumulation_in_the_launcher_environment_is_ignored(tmp_path, monkeypatch):
    toy.toy_trainer(tmp_path / "plain").run()
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    toy.toy_trainer(tmp_path / "launched").run()
    assert_same_training(tmp_path / "plain", tmp_path / "launched", 0.0)


@pytest.mark.multiprocess
def test_two_processes_equal_one_and_stop_together(tmp_path):
    """2 ranks x batch 2 == 1 rank x batch 4; a signal to rank 1 stops both, and resuming ends with the same bytes."""
    settings = json.dumps({"per_device_batch_size": 2})
    done = run_script(tmp_path / "two", "--settings", settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert "rank 0 result" in done.stdout and "rank 1 result" in done.stdout
    toy.toy_trainer(tmp_path / "one").run()
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-6)
    accumulated = json.dumps({"per_device_batch_size": 1, "accumulation": 2})
    done = run_script(tmp_path / "four", "--settings", accumulated, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "four", 1e-6)

    cut = tmp_path / "cut"
    stopped = run_script(cut, "--settings", settings, "--die-by", "SIGTERM:4:1", processes=2)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count('"status": "interrupted"') == 2 and "Run the same command again" in stopped.stdout
    assert len(losses_of(cut)) < 8
    resumed = run_script(cut, "--settings", settings, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert (cut / "losses.jsonl").read_bytes() == (tmp_path / "two" / "losses.jsonl").read_bytes()
    torch.testing.assert_close(weights_of(cut), weights_of(tmp_path / "two"), atol=0, rtol=0)


@pytest.mark.multiprocess
def test_non_finite_loss_on_one_of_two_processes_stops_both(tmp_path):
    settings = json.dumps({"per_device_batch_size": 2})
    failed = run_script(tmp_path, "--settings", settings, "--bad-index", "7", processes=2)
    assert failed.returncode != 0
    message = [line for line in failed.stderr.splitlines() if "loss is not finite in step" in line]
    assert message and "toy-7" in message[0]


@pytest.mark.multiprocess
def test_processes_that_did_not_find_each_other_are_an_error(tmp_path):
    """A launch without ACCELERATE_USE_CPU on a machine without GPU: each process would train alone."""
    failed = run_script(tmp_path, processes=2, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    assert failed.returncode != 0
    assert "2 processes were launched but accelerate sees 1" in failed.stderr
    assert not (tmp_path / "losses.jsonl").exists()


# ---------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("workers", [0, 1])
def test_run_stopped_by_an_exception_resumes_to_the_same_bytes(tmp_path, workers):
    def explode(step):
        if step == 6:  # two steps after the checkpoint of step 3
            raise KeyError("boom")

    settings = {"dropout": 0.3, "num_workers": workers, "accumulation": 2, "per_device_batch_size": 2}
    toy.toy_trainer(tmp_path / "whole", **settings).run()
    with pytest.raises(KeyError, match="boom"):
        toy.toy_trainer(tmp_path / "cut", at_step=explode, **settings).run()
    assert len(losses_of(tmp_path / "cut")) == 5
    result = toy.toy_trainer(tmp_path / "cut", **settings).run()
    assert result["status"] == "complete"
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()
    torch.testing.assert_close(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), atol=0, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, workers):
    settings = {"dropout": 0.3, "num_workers": workers}
    toy.toy_trainer(tmp_path / "whole", **settings).run()
    killed = run_script(tmp_path / "cut", "--settings", json.dumps(settings), "--die-by", "SIGKILL:6:0")
    assert killed.returncode == -9
    assert len(losses_of(tmp_path / "cut")) == 5
    with (tmp_path / "cut/losses.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line torn by the kill
    toy.toy_trainer(tmp_path / "cut", **settings).run()
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_saves_and_says_how_to_resume(tmp_path, capsys, name):
    before = signal.getsignal(signal.SIGTERM)
    settings = {"dropout": 0.3, "checkpoint_every": 0}
    toy.toy_trainer(tmp_path / "whole", **settings).run()
    stop = toy.toy_trainer(
        tmp_path / "cut",
        at_step=lambda step: os.kill(os.getpid(), getattr(signal, name)) if step == 4 else None,
        **settings,
    )
    result = stop.run()
    assert result["status"] == "interrupted" and 4 <= result["step"] <= 5
    assert f"stopped by {name}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert toy.toy_trainer(tmp_path / "cut", **settings).run()["status"] == "complete"
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()


def test_evaluation_missed_by_a_kill_is_made_up_for(tmp_path):
    def broken(step):
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        toy.toy_trainer(tmp_path, eval_every=3, evaluate=broken).run()
    seen = []
    toy.toy_trainer(tmp_path, eval_every=3, evaluate=lambda step: seen.append(step) or {"score": 1.0}).run()
    assert seen == [3, 6, 8]


def test_finished_run_is_left_alone(tmp_path, capsys):
    toy.toy_trainer(tmp_path).run()
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "progress.jsonl"
    }
    result = toy.toy_trainer(tmp_path).run()
    assert result["status"] == "already_complete" and result["record"]["step"] == 8
    assert "is complete (8 steps)" in capsys.readouterr().out
    after = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "progress.jsonl"
    }
    assert after == before


def test_resume_with_other_settings_is_an_error(tmp_path):
    toy.toy_trainer(tmp_path, fingerprint={"model": {"queries": 10}}).run()
    with pytest.raises(ValueError, match="model.queries is 10 there and 20 here") as error:
        toy.toy_trainer(tmp_path, fingerprint={"model": {"queries": 20}}).run()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="optim.lr is 0.01 there and 0.02 here"):
        toy.toy_trainer(tmp_path, fingerprint={"model": {"queries": 10}}, optim={"lr": 0.02}).run()


def test_resume_never_refuses_an_old_run(tmp_path):
    toy.toy_trainer(tmp_path).run()
    with pytest.raises(ValueError, match="resume is 'never'"):
        toy.toy_trainer(tmp_path, resume="never").run()


# ---------------------------------------------------------------------- length and order


def test_epochs_instead_of_steps(tmp_path, capsys):
    settings = {"max_steps": None, "epochs": 1.5, "per_device_batch_size": 2, "accumulation": 2, "log_every": 2}
    result = toy.toy_trainer(tmp_path, progress_bar=True, **settings).run()
    assert result["step"] == 4  # 15 samples in steps of 4
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in printed] == ["step 2/4: epoch 0.80 of 1.60", "step 4/4: epoch 1.60 of 1.60"]
    rates = [row["lr"]["default"] for row in losses_of(tmp_path)]
    assert rates[1] == pytest.approx(0.01) and rates[3] == pytest.approx(0.005)  # the cosine ends with the last step
    assert toy.toy_trainer(tmp_path, **settings).run()["status"] == "already_complete"
    with pytest.raises(ValueError, match="trainer.epochs is 1.5 there and 2 here; trainer.max_steps is 4 there and 5"):
        toy.toy_trainer(tmp_path, **{**settings, "epochs": 2}).run()


def test_grouped_order_is_used_and_resumed(tmp_path):
    sizes = [float(index % 3) for index in range(10)]
    settings = {"group_by": sizes, "per_device_batch_size": 2, "dropout": 0.3}

    def explode(step):
        if step == 6:
            raise KeyError("boom")

    toy.toy_trainer(tmp_path / "whole", **settings).run()
    with pytest.raises(KeyError, match="boom"):
        toy.toy_trainer(tmp_path / "cut", at_step=explode, **settings).run()
    toy.toy_trainer(tmp_path / "cut", **settings).run()
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()
    trainer = toy.toy_trainer(tmp_path / "other", **{**settings, "group_by": None})
    trainer.run()
    assert losses_of(tmp_path / "other")[0] != losses_of(tmp_path / "whole")[0]
    with pytest.raises(ValueError, match="trainer.group_by is"):
        toy.toy_trainer(tmp_path / "whole", **{**settings, "group_by": [*sizes[1:], 5.0]}).run()
    with pytest.raises(ValueError, match="trainer.group_by is"):
        toy.toy_trainer(tmp_path / "whole", **{**settings, "group_by": None}).run()


# ---------------------------------------------------------------------- failing


def test_error_in_a_data_worker_ends_the_run_with_its_own_message(tmp_path):
    settings = json.dumps({"num_workers": 2})
    failed = run_script(tmp_path, "--settings", settings, "--fail-index", "7", seconds=60)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "ValueError: toy-7 is broken: no picture"


def test_error_in_the_objective_ends_the_run_and_its_workers(tmp_path):
    failed = run_script(tmp_path, "--settings", json.dumps({"num_workers": 2}), "--fail-at", "2", seconds=60)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "KeyError: 'no such term'" and len(losses_of(tmp_path)) == 1


def test_workers_are_gone_after_an_error_and_after_the_end(tmp_path):
    with pytest.raises(ValueError) as caught:  # the traceback that is kept here holds on to the iterator
        toy.toy_trainer(tmp_path / "failed", dataset=toy.ToyDataset(fail_index=7), num_workers=2).run()
    assert str(caught.value) == "toy-7 is broken: no picture"
    assert not multiprocessing.active_children()
    toy.toy_trainer(tmp_path / "whole", num_workers=2).run()
    assert not multiprocessing.active_children()


class SlowDataset(toy.ToyDataset):
    """Sample 7 takes longer than anybody waits."""

    def __getitem__(self, key):
        if key[1] == 7:
            time.sleep(300)
        return super().__getitem__(key)


def test_busy_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = toy.toy_trainer(tmp_path, dataset=SlowDataset(), num_workers=2)
    batches.setup()
    iterator = batches.open_data()
    time.sleep(1)
    close_data(iterator)
    for worker in iterator._workers:
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_signal_to_the_whole_group_lets_the_step_finish(tmp_path):
    """What a terminal or a scheduler does: workers get the signal too, and go on until the step has its data."""

    def at_step(step):
        if step == 4:
            for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
                os.kill(process.pid, signal.SIGTERM)

    settings = {"num_workers": 2, "accumulation": 2, "per_device_batch_size": 2, "checkpoint_every": 0}
    result = toy.toy_trainer(tmp_path, at_step=at_step, **settings).run()
    assert result["status"] == "interrupted" and 4 <= result["step"] <= 5
    assert not multiprocessing.active_children()


def test_non_finite_loss_names_step_and_samples(tmp_path):
    sampler = StepSampler(10, 2, accumulation=2, seed=5)
    bad_batch = [index for _, index in sampler.keys_at(1, 1)]  # second step, second micro batch
    dataset = toy.ToyDataset(bad_index=bad_batch[0])
    trainer = toy.toy_trainer(tmp_path, dataset=dataset, per_device_batch_size=2, accumulation=2)
    with pytest.raises(RuntimeError) as error:
        trainer.run()
    names = ", ".join(f"toy-{index}" for index in bad_batch)
    assert str(error.value) == f"loss is not finite in step 2; samples: {names}"
    assert len(losses_of(tmp_path)) == 1
    assert all(torch.isfinite(p).all() for p in trainer.objective.parameters())


def test_non_finite_gradient_is_an_error(tmp_path):
    trainer = toy.toy_trainer(tmp_path)
    trainer.objective.out.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RuntimeError, match="gradient norm is not finite in step 1; samples: toy-"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.objective.parameters())


def test_skipped_samples_are_counted_over_the_whole_run_up_to_a_limit(tmp_path):
    """Sample 3 of 10 comes once in 10; the count goes on where an earlier part of the run ended."""
    dataset = toy.ToyDataset(skip_index=3)
    assert toy.toy_trainer(tmp_path / "free", dataset=dataset).run()["status"] == "complete"
    skipped = [record.get("skipped", 0) for record in losses_of(tmp_path / "free")]
    assert sum(skipped[:5]) == 2 and sum(skipped) in (3, 4)
    seen = [step for step, count in enumerate(skipped, start=1) if count]

    def stop(step):
        if step == seen[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.toy_trainer(tmp_path / "two", dataset=dataset, at_step=stop, checkpoint_every=1, max_skipped=1).run()
    message = rf"^2 bad samples by step {seen[1]}, more than trainer.max_skipped=1; in this step: toy-3$"
    with pytest.raises(RuntimeError, match=message):
        toy.toy_trainer(tmp_path / "two", dataset=dataset, checkpoint_every=1, max_skipped=1).run()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_skipped_samples_on_one_of_two_processes_stop_both_at_the_limit(tmp_path):
    settings = json.dumps({"per_device_batch_size": 2, "max_skipped": 0})
    result = run_script(str(tmp_path), "--settings", settings, "--skip-index", "3", processes=2)
    assert result.returncode != 0
    assert result.stderr.count("more than trainer.max_skipped=0; in this step: toy-3") >= 2


@pytest.mark.parametrize(
    "setting",
    [
        {"max_steps": 0},
        {"max_steps": True},
        {"per_device_batch_size": 0},
        {"accumulation": 1.5},
        {"clip_norm": -1.0},
        {"clip_norm": float("nan")},
        {"precision": "fp32"},
        {"frozen_dtype": "bfloat16"},
        {"frozen_dtype": "float16", "precision": "bf16"},
        {"epochs": 1.0},
        {"epochs": 0.0, "max_steps": None},
        {"epochs": True, "max_steps": None},
        {"epochs": float("inf"), "max_steps": None},
        {"epochs": None, "max_steps": None},
        {"seed": -1},
        {"num_workers": -1},
        {"log_every": 0},
        {"max_skipped": -1},
        {"resume": "maybe"},
        {"output_dir": " "},
    ],
)
def test_nonsense_settings_are_errors(setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=name):
        TrainerConfig(**{"output_dir": "out", "max_steps": 1, **setting})


def test_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="max_stpes"):
        TrainerConfig.from_dict({"output_dir": "out", "max_steps": 1, "max_stpes": 2})


def test_evaluation_without_anything_to_evaluate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="eval_every"):
        toy.toy_trainer(tmp_path, eval_every=2)
