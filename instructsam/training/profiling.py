"""Where the time of a training step goes: a table of phases, the most expensive operations, a trace to look at.

    OUTPUT_DIR/profile.txt   both tables
    OUTPUT_DIR/trace.json    a few steps in full, for chrome://tracing or ui.perfetto.dev

After a warm-up come the timed steps, in which the device is waited for at the edges of phases: phases are exact, and
the whole is somewhat slower than a run that is not profiled. The operations are recorded in a few further steps, for
recording slows everything down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from instructsam.training.meters import OTHER, PhaseTimer

WARMUP_STEPS, TRACED_STEPS = 3, 3
DATA = "data"
PROFILE_FILE, TRACE_FILE = "profile.txt", "trace.json"
_MOST_OPERATIONS = 20


class Profiler(PhaseTimer):
    """A `PhaseTimer` that also profiles the first steps of a run.

    Args:
        output_dir: gets profile.txt and trace.json.
        steps: how many steps to time, after 3 of warm-up; 3 more are traced.
        device: what the phases wait for.
        say: takes the finished table.

    Every rank that profiles waits for its device and is slowed down alike, so make one on all ranks and let rank 0
    write: the others take `output_dir` None.
    """

    def __init__(self, output_dir: str | Path | None, steps: int, device: torch.device, say: Callable[[str], None]):
        if steps < 1:
            raise ValueError(f"profile_steps must be at least 1, got {steps}")
        self._folder = None if output_dir is None else Path(output_dir)
        self._steps = steps
        self._device = device
        self._say = say
        self._done = 0
        self._timed = 0
        self._totals: dict[str, float] = defaultdict(float)
        self._trace: Any = None
        self._finished = False
        super().__init__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside under `name`, and mark it in the trace."""
        with super().phase(name):
            if self._trace is None:
                yield
            else:
                with torch.profiler.record_function(name):
                    yield

    def take(self) -> dict[str, float]:
        """As of `PhaseTimer`; to be called once a step, when it ends."""
        seconds = super().take()
        if self._finished:
            return seconds
        self._done += 1
        if WARMUP_STEPS < self._done <= WARMUP_STEPS + self._steps:
            self._timed += 1
            for name, value in seconds.items():
                self._totals[name] += value
        if self._done == WARMUP_STEPS + self._steps:
            self._start_trace()
        elif self._done == WARMUP_STEPS + self._steps + TRACED_STEPS:
            self.finish()
        return seconds

    def finish(self) -> None:
        """Write and say what there is; to be called when the training ends (nothing happens the second time)."""
        if self._finished:
            return
        self._finished = True
        parts = [self.table()]
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.stop()
            parts.append(_operations(trace, self._device))
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                trace.export_chrome_trace(str(self._folder / TRACE_FILE))
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "\n\n".join(parts) + "\n"
            (self._folder / PROFILE_FILE).write_text(text, encoding="utf-8")
            self._say(text)

    def table(self) -> str:
        """Phases of the timed steps in their order, from the wait for data on: milliseconds a step and percent."""
        if not self._timed:
            return (
                f"profile: the run ended after {self._done} steps, before any was timed: it takes more than "
                f"{WARMUP_STEPS} (all in all {WARMUP_STEPS + self._steps + TRACED_STEPS})"
            )
        whole = sum(self._totals.values())
        names = [name for name in self._totals if name != OTHER]
        first = names.index(DATA) if DATA in names else 0  # what ends a step may be booked after `take`
        names = [*names[first:], *names[:first], OTHER]
        lines = [f"Where the time of a step goes (mean of {self._timed} steps):", f"{'phase':<20}{'ms':>10}{'%':>8}"]
        for name in names:
            seconds = self._totals.get(name, 0.0)
            lines.append(f"{name:<20}{1e3 * seconds / self._timed:>10.2f}{100 * seconds / whole:>8.1f}")
        lines.append(f"{'step':<20}{1e3 * whole / self._timed:>10.2f}{100:>8.1f}")
        lines.append(f"waiting for data: {self.data_wait:.1%} of the time")
        return "\n".join(lines)

    @property
    def data_wait(self) -> float:
        """Part of the timed steps spent waiting for batches, 0 to 1."""
        return self._totals.get(DATA, 0.0) / max(sum(self._totals.values()), 1e-9)

    def _start_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._trace = torch.profiler.profile(activities=activities, record_shapes=False, profile_memory=False)
        self._trace.start()

    def _now(self) -> float:
        if self._device.type == "cuda" and not self._finished:
            torch.cuda.synchronize(self._device)
        return super()._now()


def _operations(trace: Any, device: torch.device) -> str:
    sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=sort, row_limit=_MOST_OPERATIONS, max_name_column_width=50)
    return f"Most expensive operations ({TRACED_STEPS} steps, recorded: slower than the steps above):\n{table}"
