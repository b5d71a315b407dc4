"""The loop end to end on a toy: it learns, ignores how the batch is split, evaluates, and fails loudly."""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from types import SimpleNamespace

import multiprocess_toy as toy
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from double_precision import float32_is
from safetensors.torch import load_file
from toy_runs import (
    assert_same_files,
    assert_same_training,
    cut_short,
    lines_of,
    losses_of,
    on_cpu,  # noqa: F401
    run_script,
    weights_of,
)

from instructsam.data.samplers import DistributedBatchSampler
from instructsam.training.checkpoint_files import FOLDER, list_checkpoints, read_best
from instructsam.training.checkpointing import EMA_FILE, OPTIMIZER_FILE, WEIGHTS_FILE
from instructsam.training.workers import close_data

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
    def evaluate(step, _):
        assert not torch.is_grad_enabled()
        return {"score": step / 10}

    result = toy.toy_trainer(tmp_path, eval_every=5, evaluate=evaluate).run()
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 5, "metrics": {"score": 0.5}}, {"step": 8, "metrics": {"score": 0.8}}]
    assert result["metrics"] == {"score": 0.8}


def test_every_step_is_taken_in_training_mode(tmp_path):
    """Whatever the objective was in before, and whatever an evaluation leaves it in."""

    def evaluate(_, objective):
        objective.eval()
        return {"score": 1.0}

    trainer = toy.toy_trainer(tmp_path, max_steps=4, eval_every=2, evaluate=evaluate)
    trainer.objective.eval()
    modes = []
    trainer.objective.dropout.register_forward_pre_hook(lambda dropout, _: modes.append(dropout.training))
    trainer.run()
    assert modes == [True] * 4


def test_randomness_of_a_step_comes_from_seed_step_and_rank_alone(tmp_path):
    """Every change of one of the three changes all that is drawn; the same three give the same again."""

    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        trainer = toy.toy_trainer(tmp_path, seed=seed)
        trainer.progress = SimpleNamespace(finished_steps=step)
        trainer.accelerator = SimpleNamespace(process_index=rank)
        trainer.seed_step()
        return torch.rand((), dtype=torch.float64).item(), np.random.rand(), random.random()

    cases = list(itertools.product((5, 6), (0, 1, 2), (0, 1, 2)))
    first = [drawn(*case) for case in cases]
    for kind in zip(*first, strict=True):
        assert len(set(kind)) == len(cases)
    assert [drawn(*case) for case in cases] == first


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    toy.toy_trainer(tmp_path, tensorboard=True, log_every=2).run()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_missing_tracker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is switched on but not installed"):
        toy.toy_trainer(tmp_path, wandb=True).run()


# ---------------------------------------------------------------------- the split of the batch changes nothing


@float32_is(torch.float64)
def test_accumulation_changes_nothing(tmp_path):
    toy.toy_trainer(tmp_path / "one").run()
    toy.toy_trainer(tmp_path / "two", per_device_batch_size=2, accumulation=2).run()
    toy.toy_trainer(tmp_path / "four", per_device_batch_size=1, accumulation=4).run()
    assert_same_training(tmp_path / "one", tmp_path / "two")
    assert_same_training(tmp_path / "one", tmp_path / "four")


def test_accumulation_in_the_launcher_environment_is_ignored(tmp_path, monkeypatch):
    toy.toy_trainer(tmp_path / "plain").run()
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    toy.toy_trainer(tmp_path / "launched").run()
    assert_same_training(tmp_path / "plain", tmp_path / "launched", 0.0)


@pytest.mark.multiprocess
@float32_is(torch.float64)
def test_two_processes_equal_one_and_stop_together(tmp_path):
    """2 ranks x batch 2 == 1 rank x batch 4; a signal to rank 1 stops both, and resuming ends with the same bytes."""
    settings = json.dumps({"per_device_batch_size": 2})
    done = run_script(tmp_path / "two", "--settings", settings, processes=2, exact=True)
    assert done.returncode == 0, done.stderr
    assert "rank 0 result" in done.stdout and "rank 1 result" in done.stdout
    toy.toy_trainer(tmp_path / "one").run()
    assert_same_training(tmp_path / "one", tmp_path / "two")
    accumulated = json.dumps({"per_device_batch_size": 1, "accumulation": 2})
    done = run_script(tmp_path / "four", "--settings", accumulated, processes=2, exact=True)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "four")

    cut = tmp_path / "cut"
    stopped = run_script(cut, "--settings", settings, "--die-by", "SIGTERM:4:1", processes=2, exact=True)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count('"status": "interrupted"') == 2 and "Run the same command again" in stopped.stdout
    assert len(losses_of(cut)) < 8
    resumed = run_script(cut, "--settings", settings, processes=2, exact=True)
    assert resumed.returncode == 0, resumed.stderr
    assert (cut / "losses.jsonl").read_bytes() == (tmp_path / "two" / "losses.jsonl").read_bytes()
    torch.testing.assert_close(weights_of(cut), weights_of(tmp_path / "two"), atol=0, rtol=0)


@pytest.mark.multiprocess
def test_processes_that_did_not_find_each_other_are_an_error(tmp_path):
    """A launch without ACCELERATE_USE_CPU on a machine without GPU: each process would train alone."""
    failed = run_script(tmp_path, processes=2, ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    assert failed.returncode != 0
    assert "2 processes were launched but accelerate sees 1" in failed.stderr
    assert not (tmp_path / "losses.jsonl").exists()


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
    with pytest.raises(ValueError, match=r"configuration: trainer.epochs is 1.5 there and 2 here \("):
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


# ---------------------------------------------------------------------- evaluation, averages, the best checkpoint


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.3}
    settings = {"eval_every": 2, "keep_checkpoints": 1, "checkpoint_every": 0}
    settings |= {"evaluate": lambda step, _: {"score": scores[step], "error": scores[step]}}
    toy.toy_trainer(tmp_path / "high", best_metric="score", **settings).run()
    assert [path.name for path in list_checkpoints(tmp_path / "high")] == ["step_000004", "step_000008"]
    assert read_best(tmp_path / "high") == {"step": 4, "metric": "score", "value": 0.9}
    toy.toy_trainer(tmp_path / "low", best_metric="-error", **settings).run()
    assert [path.name for path in list_checkpoints(tmp_path / "low")] == ["step_000002", "step_000008"]
    toy.toy_trainer(tmp_path / "none", **settings).run()
    assert [path.name for path in list_checkpoints(tmp_path / "none")] == ["step_000008"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_best_weights_are_those_that_were_evaluated(tmp_path, decay):
    """The averages where there are some, the weights themselves otherwise."""
    seen = {}

    def evaluate(step, objective):
        seen[step] = {name: value.clone() for name, value in objective.state_dict().items()}
        return {"score": float(step == 2)}

    settings = {"max_steps": 4, "ema_decay": decay, "eval_every": 2, "best_metric": "score", "evaluate": evaluate}
    trainer = toy.toy_trainer(tmp_path, **settings)
    trainer.run()
    last = trainer.state_dict()
    torch.testing.assert_close(last, seen[4], atol=0, rtol=0)
    torch.testing.assert_close(trainer.best_state_dict(last), seen[2], atol=0, rtol=0)
    assert not any(torch.equal(seen[2][name], value) for name, value in last.items())
    stored = weights_of(tmp_path, 2)
    assert all(torch.equal(seen[2][name], stored[name]) == (decay == 0) for name in last)


def test_a_kill_in_the_evaluation_of_the_best_checkpoint_does_not_lose_it(tmp_path):
    """It is evaluated at the next start, and noted."""
    settings = {"eval_every": 2, "keep_checkpoints": 1, "checkpoint_every": 0, "best_metric": "score"}

    def killed(step, _):
        if step == 4:
            raise KeyboardInterrupt
        return {"score": 0.5}

    with pytest.raises(KeyboardInterrupt):
        toy.toy_trainer(tmp_path, evaluate=killed, **settings).run()
    toy.toy_trainer(tmp_path, evaluate=lambda step, _: {"score": float(step == 4)}, **settings).run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000004", "step_000008"]
    assert [line["metrics"]["score"] for line in lines_of(tmp_path / "evaluations.jsonl")] == [0.5, 1.0, 0.0, 0.0]


def test_averages_resume_to_the_same_bytes(tmp_path):
    settings = {"ema_decay": 0.9, "dropout": 0.3}
    whole = toy.toy_trainer(tmp_path / "whole", **settings)
    whole.run()
    cut_short(tmp_path / "cut", 6, **settings)
    again = toy.toy_trainer(tmp_path / "cut", **settings)
    again.run()
    files = [f"{FOLDER}/step_000008/{name}" for name in (WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE)]
    assert_same_files(tmp_path / "cut", tmp_path / "whole", "losses.jsonl", *files)
    averages, weights = load_file(tmp_path / "whole" / files[2]), weights_of(tmp_path / "whole")
    assert averages.pop("num_updates") == 8
    assert averages.keys() == weights.keys()
    assert not any(torch.equal(averages[name], weights[name]) for name in weights)
    for trainer in (whole, again):
        torch.testing.assert_close(trainer.state_dict(), averages, atol=0, rtol=0)
    with pytest.raises(ValueError, match="trainer.ema_decay is 0.9 there and 0.5 here"):
        toy.toy_trainer(tmp_path / "cut", **{**settings, "ema_decay": 0.5}).run()


def test_evaluation_sees_averages_and_training_goes_on_with_its_own_weights(tmp_path):
    """The averages after 3 steps are those of a run that ends there; the run itself does not notice."""
    settings = {"ema_decay": 0.9, "checkpoint_every": 1, "keep_checkpoints": 0}
    toy.toy_trainer(tmp_path / "without", **settings).run()
    seen = {}

    def evaluate(step, objective):
        assert not torch.is_grad_enabled()
        seen[step] = {name: p.detach().clone() for name, p in objective.named_parameters()}
        return {"score": 1.0}

    toy.toy_trainer(tmp_path / "with", eval_every=3, evaluate=evaluate, **settings).run()
    assert_same_files(tmp_path / "with", tmp_path / "without", "losses.jsonl")
    torch.testing.assert_close(weights_of(tmp_path / "with"), weights_of(tmp_path / "without"), atol=0, rtol=0)
    assert sorted(seen) == [3, 6, 8]
    for step, weights in seen.items():
        averages = load_file(tmp_path / "without" / FOLDER / f"step_{step:06d}" / EMA_FILE)
        assert averages.pop("num_updates") == step
        torch.testing.assert_close(weights, averages, atol=0, rtol=0)


@pytest.mark.slow
def test_a_profile_leaves_no_checkpoint(tmp_path):
    settings = {"profile_steps": 1, "eval_every": 4, "best_metric": "score", "evaluate": lambda *_: {"score": 1.0}}
    for _ in range(2):  # a profile is to be taken again
        assert toy.toy_trainer(tmp_path, **settings).run()["status"] == "complete"
        table = (tmp_path / "profile.txt").read_text()
        assert all(name in table for name in ("data", "forward", "backward", "optimizer"))
        assert not (tmp_path / FOLDER).exists()


# ---------------------------------------------------------------------- failing


@pytest.mark.multiprocess
def test_error_in_a_data_worker_ends_the_run_with_its_own_message(tmp_path):
    settings = json.dumps({"num_workers": 2})
    failed = run_script(tmp_path, "--settings", settings, "--fail-index", "7")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "ValueError: toy-7 is broken: no picture"


@pytest.mark.multiprocess
def test_error_in_the_objective_ends_the_run_and_its_workers(tmp_path):
    failed = run_script(tmp_path, "--settings", json.dumps({"num_workers": 2}), "--fail-at", "2")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "KeyError: 'no such term'" and len(losses_of(tmp_path)) == 1


@pytest.mark.multiprocess
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


@pytest.mark.multiprocess
def test_busy_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = toy.toy_trainer(tmp_path, dataset=SlowDataset(), num_workers=2)
    batches.setup()
    iterator = batches.open_data()
    time.sleep(1)
    close_data(iterator)
    for worker in iterator._workers:
        worker.join(timeout=300)
        assert not worker.is_alive()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_to_the_whole_group_lets_the_step_finish(tmp_path, name):
    """What a terminal or a scheduler does: workers get the signal too, and go on until the step has its data."""

    def at_step(step):
        if step == 4:
            for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
                os.kill(process.pid, getattr(signal, name))

    settings = {"num_workers": 2, "accumulation": 2, "per_device_batch_size": 2, "checkpoint_every": 0}
    result = toy.toy_trainer(tmp_path, at_step=at_step, **settings).run()
    assert result["status"] == "interrupted" and 4 <= result["step"] <= 5
    assert not multiprocessing.active_children()


def test_non_finite_loss_names_step_and_samples(tmp_path):
    sampler = DistributedBatchSampler(10, 2, accumulation=2, seed=5)
    bad_batch = [index for _, index in sampler.keys_at(4, 1)]  # second step, second micro batch
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


def test_evaluation_without_anything_to_evaluate_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="eval_every"):
        toy.toy_trainer(tmp_path, eval_every=2)
