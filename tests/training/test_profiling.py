"""The table of phases, the operations and the trace; what happens when the run is too short."""

from __future__ import annotations

import json
import re

import pytest
import torch

from instructsam.training import meters
from instructsam.training.profiling import TRACED_STEPS, WARMUP_STEPS, Profiler


class Clock:
    """Time that passes only when told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def one_step(profiler: Profiler, clock: Clock, factor: float = 1.0) -> dict:
    weights = torch.ones(16, 16, requires_grad=True)
    with profiler.phase("data"):
        clock.now += 0.001 * factor
    with profiler.phase("forward"):
        loss = (weights @ weights).sum()
        clock.now += 0.006 * factor
    with profiler.phase("backward"):
        loss.backward()
        clock.now += 0.012 * factor
    clock.now += 0.001 * factor
    return profiler.take()


def test_a_whole_profile(tmp_path, clock):
    said = []
    profiler = Profiler(tmp_path, 4, torch.device("cpu"), said.append)
    for step in range(WARMUP_STEPS + 4 + TRACED_STEPS):
        assert not said
        timed = WARMUP_STEPS <= step < WARMUP_STEPS + 4
        seconds = one_step(profiler, clock, 1.0 if timed else 10.0)
        assert seconds["forward"] == pytest.approx(0.006 if timed else 0.06)
    (text,) = said
    assert (tmp_path / "profile.txt").read_text() == text
    rows = dict(re.findall(r"^(\w+) +([\d.]+ +[\d.]+)$", text.split("Most expensive")[0], re.MULTILINE))
    assert {name: [float(cell) for cell in row.split()] for name, row in rows.items()} == {
        "data": [1.0, 5.0],
        "forward": [6.0, 30.0],
        "backward": [12.0, 60.0],
        "other": [1.0, 5.0],
        "step": [20.0, 100.0],
    }
    assert list(rows) == ["data", "forward", "backward", "other", "step"]
    assert "waiting for data: 5.0%" in text and profiler.data_wait == pytest.approx(0.05)
    assert "aten::mm" in text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert names.count("forward") == TRACED_STEPS and names.count("aten::mm") == 3 * TRACED_STEPS
    one_step(profiler, clock)
    profiler.finish()
    assert len(said) == 1, "once"


def test_phases_are_listed_from_the_wait_for_data_on(tmp_path, clock):
    said = []
    profiler = Profiler(tmp_path, 2, torch.device("cpu"), said.append)
    for _ in range(WARMUP_STEPS + 2):
        for name in ("data", "forward", "logging"):
            with profiler.phase(name):
                clock.now += 0.001
                if name == "logging":
                    profiler.take()
                    clock.now += 0.001
    profiler.finish()
    rows = [line.split() for line in said[0].split("\n\n")[0].splitlines()[2:-1]]
    assert [row[0] for row in rows] == ["data", "forward", "logging", "other", "step"]
    assert float(rows[2][1]) == 2.0, "both parts"


def test_a_run_that_ends_early_gives_what_there_is(tmp_path, clock):
    said = []
    profiler = Profiler(tmp_path, 100, torch.device("cpu"), said.append)
    for _ in range(WARMUP_STEPS + 2):
        one_step(profiler, clock)
    profiler.finish()
    assert "mean of 2 steps" in said[0] and "Most expensive" not in said[0]
    assert not (tmp_path / "trace.json").exists()
    profiler = Profiler(tmp_path, 100, torch.device("cpu"), said.append)
    one_step(profiler, clock)
    profiler.finish()
    assert "ended after 1 steps" in said[1] and "106" in said[1]


def test_other_ranks_write_nothing(tmp_path, clock):
    profiler = Profiler(None, 1, torch.device("cpu"), pytest.fail)
    for _ in range(WARMUP_STEPS + 1 + TRACED_STEPS):
        one_step(profiler, clock)
    assert not list(tmp_path.iterdir())


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="profile_steps"):
        Profiler(tmp_path, 0, torch.device("cpu"), print)
