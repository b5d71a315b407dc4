"""How far a run is and how far it goes, in optimizer steps and in samples.

A run may go on with another number of processes or another batch size: samples then count on from where they were, and
so do the steps of its records, though each step now takes another number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from instructsam.data.samplers import DistributedBatchSampler


class Progress:
    """Steps done and samples seen.

    Args:
        sampler: whose position is the number of samples that all processes have seen.
        max_steps, epochs: the length of the run; one of them is None.

    Attributes:
        finished_steps: optimizer steps done.
    """

    def __init__(self, sampler: DistributedBatchSampler, max_steps: int | None, epochs: float | None) -> None:
        assert (max_steps is None) != (epochs is None)
        self.sampler = sampler
        self.finished_steps = 0
        self._unit = sampler.samples_per_step
        self._max_steps = max_steps
        self._samples = None if epochs is None else sampler.total_samples(epochs)

    @property
    def done(self) -> bool:
        if self._samples is not None:
            return self.sampler.position >= self._samples
        assert self._max_steps is not None
        return self.finished_steps >= self._max_steps

    @property
    def total_steps(self) -> int:
        """Of the whole run, with steps as they are now from here on; an estimate where batches vary."""
        if self._samples is None:
            assert self._max_steps is not None
            return self._max_steps
        left = max(0, self._samples - self.sampler.position)
        return self.finished_steps + math.ceil(left / self.sampler.samples_per_step)

    @property
    def epochs(self) -> float:
        """Passes over the data done."""
        return self.sampler.epoch_of(self.sampler.position)

    @property
    def total_epochs(self) -> float:
        """Passes over the data that the whole run makes."""
        left = (self.total_steps - self.finished_steps) * self.sampler.samples_per_step
        return self.sampler.epoch_of(round(self.sampler.position + left))

    def schedule(self) -> tuple[float, float]:
        """(steps done, steps of the whole run) for the learning rate. By epochs, in steps of the size that the run
        began with, however many samples a step takes by now: the rate goes on where it was when the batch size changes,
        in the middle of a warm-up too."""
        if self._samples is None:
            return float(self.finished_steps), float(self.total_steps)
        return self.sampler.position / self._unit, math.ceil(self._samples / self._unit)

    def advance(self) -> int:
        """Count a finished step; returns its samples, over all processes."""
        samples = self.sampler.samples_in_step(self.sampler.position)
        self.finished_steps += 1
        self.sampler.position += samples
        return samples

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; fit for JSON."""
        return {
            "samples_per_step": self.sampler.samples_per_step,
            "samples_per_first_step": self._unit,
            "sampler": self.sampler.state_dict(),
        }

    def load(self, step: int, state: Mapping[str, Any]) -> str | None:
        """Go on after `step` steps, where `state_dict` was taken; a note for the user if steps have changed."""
        self.finished_steps = step
        self.sampler.load_state_dict(state["sampler"])
        self._unit = state["samples_per_first_step"]
        there, here = state["samples_per_step"], self.sampler.samples_per_step
        if there == here:
            return None
        return (
            f"an optimizer step now takes {here:g} samples instead of {there:g}: the run goes on at sample "
            f"{self.sampler.position}, with the learning rate as configured"
        )
