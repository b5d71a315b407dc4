"""Losses and gradients that are not finite, spikes, bad samples: noted with their ids, counted over the whole run."""

from __future__ import annotations

import json

import multiprocess_toy as toy
import pytest
import torch
from double_precision import CLOSE, float32_is
from safetensors.torch import load_file
from toy_runs import (
    assert_same_files,
    cut_short,
    events_of,
    losses_of,
    on_cpu,  # noqa: F401
    run_script,
    weights_of,
)

from instructsam.data.samplers import DistributedBatchSampler
from instructsam.training import trainer as trainer_module
from instructsam.training.checkpoint_files import FOLDER
from instructsam.training.checkpointing import EMA_FILE, OPTIMIZER_FILE, WEIGHTS_FILE
from instructsam.training.engines import Engine, start_engine

# ---------------------------------------------------------------------- steps that are left out


class Snapshots:
    """Weights as each step begins."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.trainer = None

    def __call__(self, step: int) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in self.trainer.objective.parameters()]))


class SteepRoot(toy.ToyObjective):
    """With sample 7, the root of something that is always zero: worth nothing, of infinite slope."""

    def forward(self, batch, counts):
        terms = super().forward(batch, counts)
        nothing = (self.out.weight * 0).sum()
        return {**terms, "root": nothing.sqrt() if "toy-7" in batch["sample_ids"] else nothing}


def steps_with(index: int, steps: int = 8, batch: int = 4) -> dict[int, list[str]]:
    """Steps that have the sample → ids of all of their samples."""
    sampler = DistributedBatchSampler(10, batch, seed=5)
    ids = {step: [f"toy-{i}" for _, i in sampler.keys_at((step - 1) * batch)] for step in range(1, steps + 1)}
    return {step: names for step, names in ids.items() if f"toy-{index}" in names}


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, what):
    bad = steps_with(7)
    assert 2 <= len(bad) <= 4
    snapshots = Snapshots()
    dataset = toy.ToyDataset(bad_index=7 if what == "loss" else None)
    trainer = toy.toy_trainer(tmp_path, dataset=dataset, at_step=snapshots, nonfinite="skip", ema_decay=0.9)
    if what == "gradient norm":
        trainer.objective = SteepRoot(at_step=snapshots)
    snapshots.trainer = trainer
    assert trainer.run()["status"] == "complete"
    snapshots(9)
    same = {step for step in range(1, 9) if torch.equal(*snapshots.weights[step - 1 : step + 1])}
    assert same == set(bad), "and no other step leaves the weights as they are"
    state = load_file(tmp_path / FOLDER / "step_000008" / OPTIMIZER_FILE)
    assert {int(value) for name, value in state.items() if name.startswith("step/")} == {8 - len(bad)}
    assert load_file(tmp_path / FOLDER / "step_000008" / EMA_FILE)["num_updates"] == 8 - len(bad)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert events_of(tmp_path) == [
        {"step": step, "event": "skipped_step", "what": what, "sample_ids": ids} for step, ids in bad.items()
    ]
    records = losses_of(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert {r["step"] for r in records if r["loss"] is None} == (set(bad) if what == "loss" else set())
    assert {r["step"] for r in records if r["grad_norm"] is None} == set(bad)


class ScalingEngine(Engine):
    """What accelerate makes of fp16, which needs a GPU, but with float32 in place of autocast."""

    def prepare(self, *given, **more) -> None:
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        super().prepare(*given, **more)

    def clip(self):
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return super().clip()


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_steps_that_the_scaler_leaves_out_are_not_averaged(tmp_path, monkeypatch, what):
    """Weights and averages are those of a run without scaler that leaves the same steps out: scales are powers of 2."""
    settings = {"dataset": toy.ToyDataset(bad_index=7 if what == "loss" else None), "nonfinite": "skip"}

    def run(folder: str, **more):
        trainer = toy.toy_trainer(tmp_path / folder, ema_decay=0.9, **settings, **more)
        if what == "gradient norm":
            trainer.objective = SteepRoot()
        trainer.run()
        return trainer

    run("plain")

    def start(precision: str, *rest) -> Engine:
        return ScalingEngine(start_engine("no", *rest).accelerator, precision)

    monkeypatch.setattr(trainer_module, "start_engine", start)
    scaler = run("scaled", precision="fp16").accelerator.scaler
    files = [f"{FOLDER}/step_000008/{name}" for name in (WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE)]
    assert load_file(tmp_path / "scaled" / files[2])["num_updates"].item() == 8 - len(steps_with(7))
    assert_same_files(tmp_path / "scaled", tmp_path / "plain", *files)
    assert scaler.get_scale() == 2.0 ** (16 - len(steps_with(7))), "halved with every step left out"
    assert (tmp_path / "plain" / "events.jsonl").exists()
    assert (tmp_path / "scaled" / "events.jsonl").exists() == (what == "loss"), "a scale that is too large is no event"


def test_a_step_left_out_is_as_if_its_gradient_had_not_been(tmp_path):
    """The same weights as from a run whose optimizer was told to do nothing in these steps."""
    bad = steps_with(7)
    settings = {"nonfinite": "skip", "optim": {"warmup_steps": 0, "schedule": "constant"}}
    toy.toy_trainer(tmp_path / "skipped", dataset=toy.ToyDataset(bad_index=7), **settings).run()
    trainer = toy.toy_trainer(tmp_path / "told", **settings)
    trainer.setup()
    move, trainer.setup = trainer.engine.step, lambda: None
    trainer.engine.step = lambda: trainer.engine.skip() if trainer.progress.finished_steps + 1 in bad else move()
    trainer.run()
    torch.testing.assert_close(weights_of(tmp_path / "skipped"), weights_of(tmp_path / "told"), atol=0, rtol=0)


def test_too_many_steps_left_out_end_the_run_and_earlier_starts_count(tmp_path):
    bad = sorted(steps_with(7, 20))
    settings = {"dataset": toy.ToyDataset(bad_index=7), "max_steps": 20, "checkpoint_every": 1}
    settings |= {"nonfinite": "skip", "max_nonfinite": 2}
    message = (
        rf"^loss is not finite in step {bad[2]}; samples: .*toy-7.*\. 3 steps were skipped so far, more than "
        r"trainer.max_nonfinite=2"
    )
    with pytest.raises(RuntimeError, match=message):
        toy.toy_trainer(tmp_path / "whole", **settings).run()
    assert len(losses_of(tmp_path / "whole")) == bad[2] - 1
    cut_short(tmp_path / "cut", bad[1] + 1, **settings)
    with pytest.raises(RuntimeError, match=message):
        toy.toy_trainer(tmp_path / "cut", **settings).run()
    assert_same_files(tmp_path / "cut", tmp_path / "whole", "losses.jsonl", "events.jsonl")
    assert [event["step"] for event in events_of(tmp_path / "cut")] == bad[:2]


def test_a_skipped_step_after_the_checkpoint_is_counted_once(tmp_path):
    """It comes again when the run resumes, and does not count twice."""
    bad = sorted(steps_with(7, 20))
    settings = {"dataset": toy.ToyDataset(bad_index=7), "max_steps": bad[1] + 3, "checkpoint_every": bad[1] - 1}
    settings |= {"nonfinite": "skip", "max_nonfinite": 2}
    cut_short(tmp_path, bad[1] + 1, **settings)
    assert toy.toy_trainer(tmp_path, **settings).run()["status"] == "complete"
    assert [event["step"] for event in events_of(tmp_path)] == [step for step in bad if step <= bad[1] + 3]


@pytest.mark.multiprocess
@float32_is(torch.float64)
def test_two_processes_leave_a_step_out_together(tmp_path):
    """Only one of them has the bad sample; the run is that of a single process, and both end with the same weights."""
    bad = steps_with(7)
    settings = {"nonfinite": "skip", "ema_decay": 0.9}
    script = ["--settings", json.dumps({**settings, "per_device_batch_size": 2}), "--bad-index", "7"]
    done = run_script(tmp_path / "two", *script, processes=2, exact=True)
    assert done.returncode == 0, done.stderr
    weights = {line.split()[3] for line in done.stdout.splitlines() if " weights " in line}
    assert done.stdout.count(" weights ") == 2 and len(weights) == 1
    toy.toy_trainer(tmp_path / "one", dataset=toy.ToyDataset(bad_index=7), **settings).run()
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), atol=CLOSE, rtol=0)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert {row["step"] for row in two if row["loss"] is None} == set(bad)
    assert [r["loss"] for r in two if r["loss"]] == pytest.approx([r["loss"] for r in one if r["loss"]], abs=CLOSE)
    events = events_of(tmp_path / "two")
    assert [event["step"] for event in events] == list(bad)
    for event in events:  # only the micro batches that were not finite, of whichever process
        assert "toy-7" in event["sample_ids"] and len(event["sample_ids"]) == 2
        assert set(event["sample_ids"]) <= set(bad[event["step"]])


@pytest.mark.multiprocess
def test_non_finite_loss_on_one_of_two_processes_stops_both(tmp_path):
    settings = json.dumps({"per_device_batch_size": 2})
    failed = run_script(tmp_path, "--settings", settings, "--bad-index", "7", processes=2)
    assert failed.returncode != 0
    message = [line for line in failed.stderr.splitlines() if "loss is not finite in step" in line]
    assert message and "toy-7" in message[0]


# ---------------------------------------------------------------------- loss spikes


@pytest.mark.slow
def test_loss_spikes_are_events_with_their_samples_also_after_a_resume(tmp_path):
    """Sample 3 is far off once, in epoch 10; the window of losses comes from the records."""
    sampler = DistributedBatchSampler(10, 4, seed=5)
    step = next(s for s in range(26, 30) if (10, 3) in sampler.keys_at((s - 1) * 4))
    settings = {"dataset": toy.ToyDataset(far_off=(10, 3)), "max_steps": 32, "checkpoint_every": 10}
    settings |= {"spike_window": 20}
    toy.toy_trainer(tmp_path / "whole", **settings).run()
    (event,) = events_of(tmp_path / "whole")
    assert (event["event"], event["step"]) == ("spike", step)
    assert event["sample_ids"] == [f"toy-{index}" for _, index in sampler.keys_at((step - 1) * 4)]
    assert event["loss"] == losses_of(tmp_path / "whole")[step - 1]["loss"] > 100 * event["median"]
    for name, at in (("before", 22), ("after", step + 1)):  # both resume from step 20
        cut_short(tmp_path / name, at, **settings)
        toy.toy_trainer(tmp_path / name, **settings).run()
        assert_same_files(tmp_path / name, tmp_path / "whole", "events.jsonl", "losses.jsonl")
    toy.toy_trainer(tmp_path / "off", **settings, spike_factor=0).run()
    assert not (tmp_path / "off" / "events.jsonl").exists()


# ---------------------------------------------------------------------- bad samples


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
