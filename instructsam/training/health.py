"""Signs of a run going wrong: losses far above the recent ones, and losses or gradients that are not finite.

Both decide from figures that are the same on every rank and are stored with the run, so all ranks decide alike, and a
resumed run decides as an uninterrupted one. What they find are events, lines of OUTPUT_DIR/events.jsonl:

    {"step": 120, "event": "spike", "loss": 9.1, "median": 2.3, "spread": 0.2, "sample_ids": [...]}
    {"step": 340, "event": "skipped_step", "what": "gradient norm", "sample_ids": [...]}
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SPIKE, SKIPPED_STEP, BAD_SAMPLES = "spike", "skipped_step", "bad_samples"
LEAST_STEPS = 20  # of the window: a median of fewer losses says little
_MAD_TO_SIGMA = 1.4826  # median absolute deviation → standard deviation, for a normal distribution
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves does not make a spike of every wiggle


class SpikeDetector:
    """Compares the loss of each step with the median of those before it.

    A loss is a spike when it exceeds median + factor x spread, where spread is the median absolute deviation of the
    window, scaled to a standard deviation, or 1 % of the median where that is more. Spikes stay in the window (a
    median bears them), so that a loss which stays high is no news for longer than half a window. It speaks only after
    20 losses. Losses that are None or not finite (skipped steps) are passed over.

    Args: (`TrainerConfig` refuses nonsense)
        losses: of the steps so far, oldest first, as read from losses.jsonl; None for a skipped step.
        window: how many losses to compare with, at least 20.
        factor: how many standard deviations; 0 switches the detector off.
    """

    def __init__(self, losses: Iterable[float | None] = (), window: int = 100, factor: float = 8.0) -> None:
        self.factor = factor
        self._window: deque[float] = deque(maxlen=window)
        for loss in losses:
            self._add(loss)

    def check(self, step: int, loss: float | None) -> dict[str, Any] | None:
        """Take in the loss of a step; an event (without sample ids) if it is a spike."""
        event = None
        if self.factor and loss is not None and math.isfinite(loss) and len(self._window) >= LEAST_STEPS:
            median = statistics.median(self._window)
            spread = _MAD_TO_SIGMA * statistics.median(abs(other - median) for other in self._window)
            spread = max(spread, _LEAST_SPREAD * abs(median))
            if loss > median + self.factor * spread:
                event = {"step": step, "event": SPIKE, "loss": loss, "median": median, "spread": spread}
        self._add(loss)
        return event

    def _add(self, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self._window.append(loss)


class NonFinitePolicy:
    """What happens when a loss or a gradient is not finite: the run stops, or the step is left out.

    To be called on every rank with the same arguments, before the optimizer moves.

    Args: (`TrainerConfig` refuses nonsense)
        policy: "stop" or "skip".
        max_nonfinite: more skipped steps than this in a run are an error; weights that have become NaN, where every
            step is skipped, end here.
        skipped: how many steps the run has skipped before (`count_skipped_steps`).
    """

    def __init__(self, policy: str = "stop", max_nonfinite: int = 10, skipped: int = 0) -> None:
        self.policy = policy
        self.max_nonfinite = max_nonfinite
        self.skipped = skipped

    def handle(self, step: int, what: str, sample_ids: Sequence[str]) -> dict[str, Any]:
        """The event of a step to be left out.

        Args:
            step: the step that would be finished now, from 1.
            what: "loss" or "gradient norm".
            sample_ids: of the micro batches concerned, of all ranks.

        Raises:
            RuntimeError: the policy is to stop, or too many steps have been skipped; names step and samples.
        """
        ids = [str(name) for name in sample_ids]
        trouble = f"{what} is not finite in step {step}; samples: {', '.join(ids)}"
        if self.policy == "stop":
            raise RuntimeError(trouble)
        self.skipped += 1
        if self.skipped > self.max_nonfinite:
            raise RuntimeError(
                f"{trouble}. {self.skipped} steps were skipped so far, more than trainer.max_nonfinite="
                f"{self.max_nonfinite}: lower the learning rate, look at these samples, or raise the limit"
            )
        return {"step": step, "event": SKIPPED_STEP, "what": what, "sample_ids": ids}


def count_skipped_steps(events: Iterable[Mapping[str, Any]]) -> int:
    """How many steps the lines of events.jsonl say were skipped."""
    return sum(event["event"] == SKIPPED_STEP for event in events)


def describe(event: Mapping[str, Any]) -> str:
    """An event as a line for people; at most 8 sample ids."""
    ids = list(event.get("sample_ids", ()))
    names = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    kind, samples = event["event"], f"; samples: {names}" if ids else ""
    if kind == SPIKE:
        return f"step {event['step']}: loss {event['loss']:.4g} after a median of {event['median']:.4g}{samples}"
    if kind == SKIPPED_STEP:
        return f"step {event['step']}: {event['what']} is not finite, step skipped{samples}"
    return f"step {event['step']}: {kind.replace('_', ' ')}{samples}"
