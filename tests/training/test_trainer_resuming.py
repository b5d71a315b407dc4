"""Runs that are stopped, killed, or go on in other circumstances: no sample is lost, none is seen twice."""

from __future__ import annotations

import json
import os
import signal

import multiprocess_toy as toy
import pytest
import torch
from double_precision import float32_is
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
from instructsam.training.checkpoint_files import FOLDER, list_checkpoints

# ---------------------------------------------------------------------- the same circumstances


@pytest.mark.multiprocess
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


@pytest.mark.multiprocess
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


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("workers", [0, 1])
def test_signal_saves_and_the_run_goes_on_at_the_very_next_step(tmp_path, capsys, name, workers):
    """No step is lost, none is repeated: the objective sees every sample as often as in an uninterrupted run."""
    before = signal.getsignal(getattr(signal, name))
    settings = {"dropout": 0.3, "checkpoint_every": 0, "num_workers": workers}
    whole = toy.toy_trainer(tmp_path / "whole", **settings)
    whole.run()
    first = toy.toy_trainer(
        tmp_path / "cut",
        at_step=lambda step: os.kill(os.getpid(), getattr(signal, name)) if step == 4 else None,
        **settings,
    )
    result = first.run()
    assert result["status"] == "interrupted" and 4 <= result["step"] <= 5
    assert f"stopped by {name} after step {result['step']}; checkpoint saved" in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == [f"step_{result['step']:06d}"]
    second = toy.toy_trainer(tmp_path / "cut", **settings)
    assert second.run()["status"] == "complete"
    assert first.objective.counted == result["step"] and second.objective.counted == 8 - result["step"]
    assert first.objective.keys + second.objective.keys == whole.objective.keys
    assert_same_files(tmp_path / "cut", tmp_path / "whole", "losses.jsonl")
    torch.testing.assert_close(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), atol=0, rtol=0)


def test_evaluation_missed_by_a_kill_is_made_up_for(tmp_path):
    def broken(step, _):
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        toy.toy_trainer(tmp_path, eval_every=3, evaluate=broken).run()
    seen = []
    toy.toy_trainer(tmp_path, eval_every=3, evaluate=lambda step, _: seen.append(step) or {"score": 1.0}).run()
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


def test_resume_fresh_begins_anew(tmp_path, capsys):
    """Whatever was there: other settings, a better best checkpoint, a complete run."""
    first = {"eval_every": 4, "best_metric": "score", "evaluate": lambda step, _: {"score": 10.0 - step}}
    toy.toy_trainer(tmp_path / "run", optim={"lr": 0.02}, **first).run()
    settings = {**first, "evaluate": lambda step, _: {"score": float(step)}}
    capsys.readouterr()
    result = toy.toy_trainer(tmp_path / "run", resume="fresh", **settings).run()
    assert result["status"] == "complete" and "resuming" not in capsys.readouterr().out
    toy.toy_trainer(tmp_path / "other", **settings).run()
    assert_same_files(tmp_path / "run", tmp_path / "other", "losses.jsonl", "evaluations.jsonl", f"{FOLDER}/best.json")
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == [path.name for path in list_checkpoints(tmp_path / "other")]


def test_every_start_is_recorded_with_its_overrides(tmp_path):
    cut_short(tmp_path, 6, overrides=["trainer.max_steps=8"])
    toy.toy_trainer(tmp_path, overrides=["trainer.max_steps=8", "trainer.log_every=1"]).run()
    toy.toy_trainer(tmp_path).run()  # complete: starts nothing
    starts = lines_of(tmp_path / "starts.jsonl")
    assert [(start["step"], start["overrides"]) for start in starts] == [
        (0, ["trainer.max_steps=8"]),
        (3, ["trainer.max_steps=8", "trainer.log_every=1"]),
    ]
    assert {start["engine"] for start in starts} == {"plain"} and starts[0]["global_batch_size"] == 4


def test_resume_never_refuses_an_old_run(tmp_path):
    toy.toy_trainer(tmp_path).run()
    with pytest.raises(ValueError, match="resume is 'never'"):
        toy.toy_trainer(tmp_path, resume="never").run()


# ---------------------------------------------------------------------- others


@float32_is(torch.float64)
def test_accumulation_may_change_between_two_starts(tmp_path, capsys):
    """The same global batch in other parts: the same run. A larger one: a note, and no sample lost or seen twice."""
    toy.toy_trainer(tmp_path / "whole").run()
    cut_short(tmp_path / "same", 6)
    capsys.readouterr()
    toy.toy_trainer(tmp_path / "same", per_device_batch_size=1, accumulation=4).run()
    assert "an optimizer step now takes" not in capsys.readouterr().out
    assert_same_training(tmp_path / "whole", tmp_path / "same")

    settings = {"max_steps": None, "epochs": 4, "optim": {"warmup_steps": 5}, "checkpoint_every": 3}
    cut_short(tmp_path / "larger", 4, **settings)
    second = toy.toy_trainer(tmp_path / "larger", accumulation=2, **settings)
    assert second.run()["step"] == 3 + 4  # 12 samples in steps of 4, 28 in steps of 8
    note = "an optimizer step now takes 8 samples instead of 4: the run goes on at sample 12"
    assert note in capsys.readouterr().out
    sampler = DistributedBatchSampler(10, 4, seed=5)
    expected = [f"{epoch}/{index}" for start in range(12, 44, 4) for epoch, index in sampler.keys_at(start)]
    assert second.objective.keys == expected
    rates = [row["lr"]["default"] for row in losses_of(tmp_path / "larger")]
    assert rates[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008]), "the warm-up goes on where it was"
    assert rates[5] < rates[4] == pytest.approx(0.01)


@pytest.mark.multiprocess
def test_every_sample_is_seen_once_an_epoch_whatever_becomes_of_the_number_of_processes(tmp_path):
    """2 processes, then 1, then 2 again, each stopped in the middle of an epoch: of 3 epochs each sample, once."""
    length, settings = 26, {"max_steps": None, "epochs": 3, "checkpoint_every": 0}

    def keys_on_two(*arguments: str) -> list[str]:
        done = run_script(
            tmp_path,
            *("--settings", json.dumps({**settings, "per_device_batch_size": 2}), "--length", length, *arguments),
            processes=2,
        )
        assert done.returncode == 0, done.stderr
        found = [line.split()[3:] for line in done.stdout.splitlines() if " keys " in line]
        assert len(found) == 2 and abs(len(found[0]) - len(found[1])) <= 2
        return found[0] + found[1]

    seen = keys_on_two("--die-by", "SIGTERM:4:1")
    assert 0 < len(seen) < length and len(seen) % 4 == 0
    trainer = toy.toy_trainer(
        tmp_path,
        dataset=toy.ToyDataset(length),
        at_step=lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 6 else None,
        **{**settings, "per_device_batch_size": 3},
    )
    assert trainer.run()["status"] == "interrupted"
    seen += trainer.objective.keys
    assert length < len(seen) < 2 * length
    seen += keys_on_two()
    whole = [f"{epoch}/{index}" for epoch in range(3) for index in range(length)]
    assert sorted(key for key in seen if not key.startswith("3/")) == sorted(whole)
    assert len(set(seen)) == len(seen) < len(whole) + 4
    records = losses_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
