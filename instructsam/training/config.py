"""How long, how fast and where to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from instructsam.data.reader_options import from_settings
from instructsam.training.health import LEAST_STEPS
from instructsam.training.precision import AUTOCAST

PRECISIONS = ("no", "bf16", "fp16")
RESUMES = ("auto", "never", "fresh")
NONFINITE = ("stop", "skip")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class TrainerConfig:
    """How long, how fast and where to train. ValueError on nonsense.

    Length: max_steps (optimizer steps) or epochs (passes over the data, not necessarily whole).

    Batches: per_device_batch_size x processes x accumulation samples make one optimizer step; or, with
    per_device_batch_size null, a micro batch is filled up to tokens_per_batch (input tokens, padding included) and
    phrases_per_batch.

    Numbers: precision is what autocast computes in ("no": float32); frozen_dtype, if given, is the dtype of the same
    name, and parameters that do not train are kept in it. clip_norm 0 switches clipping off. ema_decay 0 keeps no
    moving averages of the weights.

    Trouble: nonfinite "stop" ends the run at a loss or gradient that is not finite, "skip" leaves the step out, up to
    max_nonfinite of them (with fp16 this is about losses; such gradients its scaler leaves out, looking for a scale).
    A loss above the median of the last spike_window by spike_factor deviations is noted with its samples (0: never).
    max_skipped: more samples than this left out as bad while training are an error. resume "auto" goes on from the
    newest sound checkpoint in output_dir, "never" refuses a directory that holds one, "fresh" removes what is there.

    Checkpoints: checkpoint_every 0 saves only at the end; keep_checkpoints 0 keeps all; best_metric, a figure of the
    evaluation, keeps the checkpoint where it was highest too ("-NAME": lowest); save_frozen also stores what does not
    train. eval_every 0 never evaluates.

    Records: log_every governs console, progress.jsonl and dashboards, while losses.jsonl has every step. peak_tflops:
    of one device, for the share of it that is used (null: known devices only). profile_steps: so many steps are
    profiled. wandb_mode: online, offline (default) or disabled.
    """

    output_dir: str
    max_steps: int | None = None
    epochs: float | None = None
    per_device_batch_size: int | None = 1
    tokens_per_batch: int | None = None
    phrases_per_batch: int | None = None
    accumulation: int = 1
    clip_norm: float = 1.0
    precision: str = "no"
    frozen_dtype: str | None = None
    ema_decay: float = 0.0
    nonfinite: str = "stop"
    max_nonfinite: int = 10
    spike_window: int = 100
    spike_factor: float = 8.0
    seed: int = 0
    num_workers: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    best_metric: str | None = None
    save_frozen: bool = False
    eval_every: int = 0
    log_every: int = 10
    resume: str = "auto"
    max_skipped: int | None = None
    profile_steps: int = 0
    peak_tflops: float | None = None
    progress_bar: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_mode: str | None = None
    project: str = "instructsam"

    def __post_init__(self) -> None:
        if not str(self.output_dir).strip():
            raise ValueError("output_dir must not be empty")
        self.output_dir = str(self.output_dir)
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"give exactly one of max_steps and epochs, got max_steps {self.max_steps!r} and epochs {self.epochs!r}"
            )
        number = isinstance(self.epochs, int | float) and not isinstance(self.epochs, bool)
        if self.epochs is not None and not (number and math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs must be a finite number > 0, got {self.epochs!r}")
        budgets = ("tokens_per_batch", "phrases_per_batch")
        if (self.per_device_batch_size is None) == all(getattr(self, name) is None for name in budgets):
            raise ValueError(
                "give either per_device_batch_size or, with it null, tokens_per_batch and phrases_per_batch, got "
                + ", ".join(f"{name} {getattr(self, name)!r}" for name in ("per_device_batch_size", *budgets))
            )
        least = dict.fromkeys(["max_steps", "per_device_batch_size", *budgets, "accumulation", "log_every"], 1)
        least |= dict.fromkeys(["seed", "num_workers", "checkpoint_every", "keep_checkpoints", "eval_every"], 0)
        least |= dict.fromkeys(["max_skipped", "max_nonfinite", "profile_steps"], 0) | {"spike_window": LEAST_STEPS}
        optional = {field.name for field in fields(self) if str(field.type).endswith("| None")}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be a whole number >= {minimum}, got {value!r}")
        for name, meaning in (("clip_norm", "no clipping"), ("spike_factor", "never")):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number >= 0 (0: {meaning}), got {value!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.frozen_dtype is not None and self.frozen_dtype != AUTOCAST.get(self.precision):
            raise ValueError(
                f"frozen_dtype must be {AUTOCAST.get(self.precision)!r} or null with precision {self.precision!r}, got "
                f"{self.frozen_dtype!r}"
            )
        for name, values in (("resume", RESUMES), ("nonfinite", NONFINITE), ("wandb_mode", (None, *WANDB_MODES))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if not isinstance(self.ema_decay, int | float) or not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1) (0: no averages), got {self.ema_decay!r}")
        if self.best_metric is not None and not self.eval_every:
            raise ValueError(f"best_metric={self.best_metric} needs evaluations: set eval_every")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """From a plain mapping; ValueError for a key that does not exist."""
        return from_settings(cls, "trainer", values)
