"""Spikes are told from noise, the same after a resumption; non-finite steps stop a run or are counted."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.training.health import NonFinitePolicy, SpikeDetector, count_skipped_steps, describe


def noisy_losses(count: int, seed: int = 0) -> list[float]:
    """A loss that falls from 6 to 2 with 5 % of noise."""
    rng = random.Random(seed)
    return [(2 + 4 * math.exp(-step / 200)) * (1 + 0.05 * rng.gauss(0, 1)) for step in range(count)]


def events_of(losses: list, **options) -> list:
    detector = SpikeDetector(**options)
    return [event for step, loss in enumerate(losses, 1) if (event := detector.check(step, loss))]


def test_noise_makes_no_spike_and_a_spike_is_found():
    losses = noisy_losses(1000)
    assert events_of(losses) == []
    losses[500] *= 3
    (event,) = events_of(losses)
    assert event["step"] == 501 and event["event"] == "spike" and event["loss"] == losses[500]
    window = sorted(losses[400:500])
    assert event["median"] == pytest.approx((window[49] + window[50]) / 2)
    deviations = sorted(abs(loss - event["median"]) for loss in window)
    assert event["spread"] == pytest.approx(1.4826 * (deviations[49] + deviations[50]) / 2)


def test_too_few_losses_say_nothing():
    assert events_of([1.0] * 19 + [100.0]) == []
    assert [event["step"] for event in events_of([1.0] * 20 + [100.0])] == [21]


def test_a_constant_loss_may_wiggle():
    assert events_of([1.0] * 50 + [1.05]) == []
    assert len(events_of([1.0] * 50 + [1.2])) == 1


def test_losses_below_zero_wiggle_as_those_above():
    assert events_of([-1.0] * 50 + [-0.95]) == []
    assert len(events_of([-1.0] * 50 + [-0.8])) == 1


def test_a_fall_is_no_spike():
    assert events_of([5.0] * 50 + [0.1]) == []


def test_a_loss_that_stays_high_becomes_normal():
    steps = [event["step"] for event in events_of([1.0] * 100 + [5.0] * 100)]
    assert steps[0] == 101 and steps == list(range(101, 101 + len(steps))) and 40 <= len(steps) <= 60


def test_factor_zero_is_off():
    assert events_of([1.0] * 50 + [1e9], factor=0.0) == []


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1e4), st.none(), st.just(math.nan), st.just(math.inf)), max_size=150),
    st.integers(0, 150),
    st.integers(20, 60),
)
def test_a_resumed_run_decides_as_an_uninterrupted_one(losses, cut, window):
    """The past is read from losses.jsonl, where what is not finite stands as null."""
    whole = events_of(losses, window=window, factor=4.0)
    past = [loss if loss is not None and math.isfinite(loss) else None for loss in losses[:cut]]
    resumed = SpikeDetector(past, window=window, factor=4.0)
    after = [event for step, loss in enumerate(losses, 1) if step > cut and (event := resumed.check(step, loss))]
    assert after == [event for event in whole if event["step"] > cut]


@pytest.mark.parametrize("cut", [19, 20, 21, 60, 199])
def test_no_loss_before_a_resumption_is_forgotten(cut):
    losses = noisy_losses(200)
    whole = events_of(losses, window=20, factor=1.0)
    assert len(whole) > 10
    resumed = SpikeDetector(losses[:cut], window=20, factor=1.0)
    after = [event for step, loss in enumerate(losses, 1) if step > cut and (event := resumed.check(step, loss))]
    assert after == [event for event in whole if event["step"] > cut]


def test_stop_names_step_and_samples():
    with pytest.raises(RuntimeError, match="loss is not finite in step 4; samples: toy-3, toy-7"):
        NonFinitePolicy("stop").handle(4, "loss", ["toy-3", "toy-7"])


def test_skip_counts_up_to_the_limit_and_goes_on_counting_after_a_resumption():
    policy = NonFinitePolicy("skip", max_nonfinite=2)
    events = [policy.handle(step, "gradient norm", ["a"]) for step in (3, 9)]
    assert events[1] == {"step": 9, "event": "skipped_step", "what": "gradient norm", "sample_ids": ["a"]}
    events.append({"step": 9, "event": "spike", "loss": 1.0, "median": 0.1})
    resumed = NonFinitePolicy("skip", max_nonfinite=2, skipped=count_skipped_steps(events))
    for again in (policy, resumed):
        with pytest.raises(RuntimeError, match=r"samples: b\. 3 steps were skipped .* trainer.max_nonfinite=2"):
            again.handle(12, "loss", ["b"])


def test_events_read_well():
    spike = {"step": 5, "event": "spike", "loss": 9.0, "median": 2.0, "sample_ids": [f"s{k}" for k in range(10)]}
    assert describe(spike).startswith("step 5: loss 9 after a median of 2; samples: s0, s1, ")
    assert describe(spike).endswith("s7 and 2 more")
    assert describe({"step": 6, "event": "bad_samples", "sample_ids": ["x"]}) == "step 6: bad samples; samples: x"
    assert "step skipped" in describe(NonFinitePolicy("skip").handle(7, "loss", ["x"]))
