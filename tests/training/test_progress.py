"""How far a run is: in steps, in epochs, and across a change of the batch size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.data.budgets import Budgets
from instructsam.data.samplers import DistributedBatchSampler
from instructsam.training.optim import OptimConfig, learning_rate_factor
from instructsam.training.progress import Progress


def progress(length: int, batch: int, *, steps: int | None = None, epochs: float | None = None, **sampler) -> Progress:
    return Progress(DistributedBatchSampler(length, batch, **sampler), steps, epochs)


def saved(old: Progress) -> dict:
    return json.loads(json.dumps(old.state_dict()))


def advance(run: Progress, steps: int) -> None:
    for _ in range(steps):
        run.advance()


def factor(run: Progress, config: OptimConfig) -> float:
    step, steps = run.schedule()
    return learning_rate_factor(step, config, steps)


def to_the_end(run: Progress) -> int:
    """Steps taken until it is done."""
    taken = 0
    while not run.done:
        run.advance()
        taken += 1
    return taken


def test_length_in_steps():
    run = progress(10, 4, steps=5)
    assert (run.total_steps, run.total_epochs, run.epochs, run.schedule()) == (5, 2.0, 0.0, (0.0, 5.0))
    assert run.advance() == 4
    assert (run.finished_steps, run.sampler.position, run.epochs, run.schedule()) == (1, 4, 0.4, (1.0, 5.0))
    assert to_the_end(run) == 4 and run.epochs == 2.0 and run.total_epochs == 2.0


def test_length_in_epochs():
    run = progress(10, 2, epochs=1.5, accumulation=2)
    assert (run.total_steps, run.total_epochs, run.schedule()) == (4, 1.6, (0.0, 4))  # 15 samples in steps of 4
    advance(run, 3)
    assert not run.done and run.schedule() == (3.0, 4) and run.total_steps == 4
    run.advance()
    assert run.done and run.epochs == run.total_epochs == 1.6


def test_the_same_batch_size_goes_on_without_a_word():
    old = progress(10, 4, epochs=3)
    advance(old, 3)
    for changed in ({"batch": 2, "accumulation": 2}, {"batch": 1, "world_size": 4, "rank": 3}):
        new = progress(10, epochs=3, **changed)
        assert new.load(3, saved(old)) is None
        assert (new.finished_steps, new.schedule(), new.total_steps) == (3, old.schedule(), old.total_steps)
        assert new.sampler.position == old.sampler.position == 12


@given(
    length=st.integers(1, 60),
    epochs=st.floats(0.1, 6),
    first=st.integers(1, 16),
    second=st.integers(1, 16),
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    part=st.floats(0, 1),
    warmup=st.one_of(st.integers(1, 4), st.floats(0, 0.5)),
)
def test_another_batch_size_in_the_middle(length, epochs, first, second, world_size, accumulation, part, warmup):
    """Every sample counts once, the learning rate goes on where it was, and the length is known again."""
    old = progress(length, first, epochs=epochs)
    there = old.total_steps
    steps = math.floor(part * there)
    advance(old, steps)
    new = progress(length, second, epochs=epochs, world_size=world_size, accumulation=accumulation)
    note = new.load(steps, saved(old))
    per_step = second * world_size * accumulation
    assert (note is None) == (per_step == first)
    assert (
        note is None
        or f"takes {per_step} samples instead of {first}: the run goes on at sample {first * steps}" in note
    )
    assert (new.finished_steps, new.sampler.position, new.epochs) == (steps, old.sampler.position, old.epochs)
    assert new.schedule() == old.schedule()
    share = {"warmup_ratio": warmup} if isinstance(warmup, float) else {"warmup_steps": min(warmup, there)}
    config = OptimConfig(lr=1.0, min_ratio=0.0, **share)
    assert factor(new, config) == factor(old, config)
    total, end = new.total_steps, new.total_epochs
    again = progress(length, first, epochs=epochs)  # and back, from a checkpoint in between
    if not new.done:
        new.advance()
        again.load(new.finished_steps, saved(new))
        assert again.schedule() == (new.sampler.position / first, there)
    to_the_end(new)
    assert new.finished_steps == new.total_steps == total and new.epochs == end
    samples = math.ceil(length * epochs)
    assert samples <= new.sampler.position < samples + max(per_step, first)


def test_length_in_steps_does_not_change_with_the_batch_size():
    old = progress(10, 4, steps=9)
    advance(old, 3)
    new = progress(10, 8, steps=9)
    assert "takes 8 samples instead of 4: the run goes on at sample 12" in new.load(3, saved(old))
    assert (new.schedule(), new.total_steps) == ((3.0, 9.0), 9)
    assert new.total_epochs == (12 + 6 * 8) / 10
    assert to_the_end(new) == 6 and new.epochs == new.total_epochs


def with_budgets(sizes: np.ndarray, epochs: float, world_size: int = 1) -> Progress:
    budgets = Budgets(phrases_per_batch=6, num_phrases=lambda epoch: sizes)
    return progress(len(sizes), None, epochs=epochs, world_size=world_size, budgets=budgets)


@pytest.mark.parametrize("world_size", [1, 2])
def test_budgets_of_equal_samples_are_like_batches_of_that_many(world_size):
    run = with_budgets(np.full(12, 2.0), 2, world_size)
    assert run.sampler.samples_per_step == 3 * world_size
    assert (run.total_steps, run.schedule()) == (8 // world_size, (0.0, 8 // world_size))
    assert run.advance() == 3 * world_size
    assert to_the_end(run) == 8 // world_size - 1 and run.epochs == 2.0


def test_budgets_are_followed_sample_by_sample_over_a_change_of_the_number_of_processes():
    sizes = np.random.default_rng(0).integers(1, 6, 30).astype(float)
    old = with_budgets(sizes, 3, 2)
    taken = [old.advance() for _ in range(4)]
    assert len(set(taken)) > 1 and sum(taken) == old.sampler.position
    new = with_budgets(sizes, 3)
    assert "the run goes on at sample" in new.load(4, saved(old))
    assert new.sampler.position == sum(taken) and new.schedule() == old.schedule()
    ends = set(
        np.cumsum([new.advance() for _ in range(len(new.sampler.plan(0).ends) * 3) if not new.done]) + sum(taken)
    )
    assert {30, 60, 90} - {sum(taken)} <= ends, "an epoch ends with a batch"
    assert new.done and new.epochs == 3.0
