"""The training loop: optimizer steps over any objective, the same for any split over processes, exact on resumption.

The trainer knows no model. It works against two things:

    class Objective(nn.Module):
        def count_units(self, batch) -> dict[str, float]        # what a micro batch is averaged over; always these keys
        def forward(self, batch, counts) -> dict[str, Tensor]   # weighted loss terms: sums over units / counts[...]

    dataset[(epoch, index)]  and  collate(list of items) -> dict of tensors, with "sample_ids", a list of str, and
    "skipped_ids", those of bad samples that stand in the batch with nothing to learn from

The counts given to `forward` are summed over the micro batches and ranks of the optimizer step before its first
forward, so the gradient does not depend on how the global batch is split (DESIGN section 6). All randomness of a
step is seeded by (seed, step, rank): a resumed run goes on exactly where it was, with any number of data workers.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from instructsam.data.samplers import StepSampler, steps_for_epochs
from instructsam.models.placement import as_dtype
from instructsam.training.checkpointing import Checkpointer
from instructsam.training.optim import OptimConfig, build_optimizer, build_schedule, learning_rates
from instructsam.training.precision import AUTOCAST, cast_frozen, check_master_weights
from instructsam.training.tracking import Tracking, start_dashboards, tracker_names
from instructsam.training.workers import close_data, next_batch, start_worker

Batch = dict[str, Any]
PRECISIONS = ("no", "bf16", "fp16")
RESUMES = ("auto", "never")


@dataclass
class TrainerConfig:
    """How long, how fast and where to train. ValueError on nonsense.

    The length is given as max_steps (optimizer steps) or as epochs (passes over the data, not necessarily whole).
    per_device_batch_size x processes x accumulation samples make one optimizer step. precision is what autocast
    computes in ("no": float32); frozen_dtype, if given, is the dtype of the same name, and parameters that do not train
    are kept in it. clip_norm 0 switches clipping off; checkpoint_every 0 saves only at the end; eval_every 0 never
    evaluates; keep_checkpoints 0 keeps all. log_every governs console, progress.jsonl and dashboards, while
    losses.jsonl has every step. resume "auto" goes on from the newest sound checkpoint in output_dir, "never" refuses a
    directory that holds one. max_skipped: more samples than this left out as bad while training are an error.
    """

    output_dir: str
    max_steps: int | None = None
    epochs: float | None = None
    per_device_batch_size: int = 1
    accumulation: int = 1
    clip_norm: float = 1.0
    precision: str = "no"
    frozen_dtype: str | None = None
    seed: int = 0
    num_workers: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 0
    log_every: int = 10
    resume: str = "auto"
    max_skipped: int | None = None
    progress_bar: bool = True
    tensorboard: bool = False
    wandb: bool = False
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
        least = {"per_device_batch_size": 1, "accumulation": 1, "log_every": 1, "seed": 0}
        least |= {} if self.max_steps is None else {"max_steps": 1}
        least |= {} if self.max_skipped is None else {"max_skipped": 0}
        least |= dict.fromkeys(["num_workers", "checkpoint_every", "keep_checkpoints", "eval_every"], 0)
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be a whole number >= {minimum}, got {value!r}")
        if not isinstance(self.clip_norm, int | float) or not math.isfinite(self.clip_norm) or self.clip_norm < 0:
            raise ValueError(f"clip_norm must be a finite number >= 0 (0: no clipping), got {self.clip_norm!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.frozen_dtype is not None and self.frozen_dtype != AUTOCAST.get(self.precision):
            raise ValueError(
                f"frozen_dtype must be {AUTOCAST.get(self.precision)!r} or null with precision {self.precision!r}, got "
                f"{self.frozen_dtype!r}"
            )
        if self.resume not in RESUMES:
            raise ValueError(f"resume must be one of {RESUMES}, got {self.resume!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """From a plain mapping; ValueError for a key that does not exist."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown trainer settings {unknown}")
        return cls(**values)


class Trainer:
    """Trains `objective` on `dataset`; `run()` does everything, and may be called again in a new process to go on.

    evaluate: called with the step on all ranks, without gradient, after every `eval_every` steps and at the end;
    returns metrics.
    fingerprint: nested, JSON-able settings (of model and data) that must not change when a run resumes; the trainer
    adds its own.
    group_by: a size for every sample; the samples of a step are then of similar size (see `StepSampler`).
    """

    def __init__(
        self,
        config: TrainerConfig,
        objective: nn.Module,
        dataset: Dataset,
        collate: Callable[[list[Any]], Batch],
        optim_config: OptimConfig,
        evaluate: Callable[[int], Mapping[str, Any]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        group_by: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if config.eval_every and evaluate is None:
            raise ValueError("eval_every is set but there is nothing to evaluate with: give evaluate, or set it to 0")
        self.config = config
        self.objective = objective
        self.dataset = dataset
        self.collate = collate
        self.optim_config = optim_config
        self.evaluate = evaluate
        self.fingerprint = dict(fingerprint or {})
        self.group_by = None if group_by is None else np.asarray(group_by, dtype=np.float64)
        self.finished_steps = 0
        self.skipped = 0
        self.last_record: dict[str, Any] = {}
        self.last_metrics: dict[str, Any] = {}
        self._term_names: list[str] | None = None

    # ------------------------------------------------------------------ the run as a whole

    def run(self) -> dict[str, Any]:
        """Set up, resume, train, save. Returns {"status", "step", "record", "metrics", "checkpoint", "output_dir"}
        where status is "complete", "already_complete" or "interrupted" (SIGINT or SIGTERM; a checkpoint is saved).

        Raises RuntimeError for a non-finite loss or gradient, ValueError for settings that cannot work.
        """
        self.setup()
        try:
            self.resume()
            if self.finished_steps >= self.max_steps:
                self.evaluate_if_due()
                self.tracking.say(
                    f"{self.config.output_dir} is complete ({self.finished_steps} steps): nothing to train"
                )
                return self._summary("already_complete")
            start_dashboards(
                self.accelerator, self.config.output_dir, self.config.project, self.finished_steps, self.fingerprint
            )
            with StopSignals() as stop:
                return self._summary(self.train(stop))
        finally:
            self.tracking.close()

    def setup(self) -> None:
        """Make accelerator, optimizer, schedule, data stream and records; wrap the objective in DDP where needed."""
        config = self.config
        self.accelerator = start_accelerator(config)
        self.sampler = StepSampler(
            len(cast(Any, self.dataset)),
            config.per_device_batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            config.accumulation,
            config.seed,
            group_by=self.group_by,
        )
        self.max_steps = config.max_steps or steps_for_epochs(
            self.sampler.dataset_length, self.sampler.global_batch_size, config.epochs or 0.0
        )
        optimizer = build_optimizer(self.objective, self.optim_config)
        check_master_weights(self.objective)
        if config.frozen_dtype is not None:
            cast_frozen(self.objective, as_dtype(config.frozen_dtype, "frozen_dtype", auto=False))
        # The schedule stays outside of `prepare`, which would step it once per process.
        self.scheduler = build_schedule(optimizer, self.optim_config, self.max_steps)
        self.model, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.fingerprint |= {
            "optim": asdict(self.optim_config),
            "trainer": {
                "max_steps": self.max_steps,
                "epochs": config.epochs,
                "global_batch_size": self.sampler.global_batch_size,
                "dataset_length": self.sampler.dataset_length,
                "group_by": None if self.group_by is None else zlib.crc32(self.group_by.tobytes()),
                "clip_norm": config.clip_norm,
                "precision": config.precision,
                "frozen_dtype": config.frozen_dtype,
                "seed": config.seed,
            },
        }
        self.checkpointer = Checkpointer(
            config.output_dir,
            self.accelerator,
            self.objective,
            self.optimizer,
            self.scheduler,
            self.fingerprint,
            config.keep_checkpoints,
        )
        self.tracking = Tracking(
            config.output_dir,
            self.accelerator,
            self.max_steps,
            config.log_every,
            config.progress_bar,
            self.sampler.epoch_of(self.max_steps),
        )

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one; cut the records back to it."""
        self.checkpointer.clean()
        checkpoint = self.checkpointer.find_latest()
        if checkpoint is not None:
            if self.config.resume == "never":
                raise ValueError(
                    f"resume is 'never' but {checkpoint} exists: choose another output_dir, or remove the old run"
                )
            self.finished_steps = self.checkpointer.load(checkpoint)
            self.tracking.say(f"resuming from {checkpoint}")
        self.tracking.start(self.finished_steps)
        skipped = [sum(r.get("skipped", 0) for r in self.tracking.losses.read()) if self.tracking.is_main else 0]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(skipped)
        self.skipped = skipped[0]

    def train(self, stop: StopSignals) -> str:
        """Steps until max_steps or a signal; returns the status."""
        # A kill between a checkpoint and the evaluation of the same step leaves the latter to be made up for.
        self.evaluate_if_due()
        batches = self.open_data()
        try:
            return self._train_on(batches, stop)
        finally:
            close_data(batches)

    def _train_on(self, batches: Iterator[Batch], stop: StopSignals) -> str:
        config = self.config
        self.model.train()
        while self.finished_steps < self.max_steps:
            micro_batches = [next_batch(batches) for _ in range(config.accumulation)]
            must_stop = self.step(micro_batches, stop.received is not None)
            done = self.finished_steps == self.max_steps
            if done or must_stop or (config.checkpoint_every and self.finished_steps % config.checkpoint_every == 0):
                self.save()
            if must_stop and not done:
                self.tracking.say(
                    f"stopped by {stop.received or 'a signal to another process'} after step "
                    f"{self.finished_steps}; checkpoint saved in "
                    f"{self.checkpointer.path_of(self.finished_steps)}. Run the same command again to resume."
                )
                return "interrupted"
            self.evaluate_if_due()
        self.tracking.say(f"finished {self.max_steps} steps; everything is in {config.output_dir}")
        return "complete"

    # ------------------------------------------------------------------ one optimizer step

    def step(self, batches: list[Batch], stop_wanted: bool = False) -> bool:
        """One optimizer step on this rank's micro batches; returns whether any rank wants to stop after it."""
        self.seed_step()
        batches = [send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in batches]
        counts = self.count(batches)
        terms, losses = self.forward_backward(batches, counts)
        max_norm = self.config.clip_norm or math.inf
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        # One reduction and one wait for the device a step: terms, flags for trouble and stopping, skipped samples.
        bad = ~torch.isfinite(losses)
        skipped_ids = [name for batch in batches for name in batch.get("skipped_ids", ())]
        flags = torch.tensor([float(stop_wanted), float(len(skipped_ids))], device=losses.device)
        total = torch.cat([terms, bad.any().reshape(1).to(terms), flags.to(terms)])
        total = cast(Tensor, self.accelerator.reduce(total, reduction="sum"))
        *values, any_bad, stop, skipped, norm = torch.cat(
            [total, torch.as_tensor(grad_norm).reshape(1).to(total)]
        ).tolist()
        if any_bad:
            self._fail("loss", [batch for batch, is_bad in zip(batches, bad.tolist(), strict=True) if is_bad])
        if not math.isfinite(norm) and self.config.precision != "fp16":  # fp16's scaler skips such a step by itself
            self._fail("gradient norm", batches)
        rates = learning_rates(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.finished_steps += 1
        self.log(dict(zip(self._term_names or [], values, strict=True)), rates, norm, int(skipped))
        if skipped:
            self._count_skipped(int(skipped), skipped_ids)
        return bool(stop)

    def seed_step(self) -> None:
        """Seed everything random in the model by (seed, step, rank): resumption leans on no stored random state."""
        words = np.random.SeedSequence(
            [self.config.seed, self.finished_steps, self.accelerator.process_index]
        ).generate_state(3)
        torch.manual_seed(int(words[0]))  # seeds the devices too
        np.random.seed(int(words[1]))
        random.seed(int(words[2]))

    def count(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Units of the whole optimizer step, over all micro batches and ranks: float32 scalars on the device."""
        local = [self.objective.count_units(batch) for batch in batches]  # type: ignore[operator]
        names = sorted(local[0])
        if any(sorted(units) != names for units in local):
            raise ValueError(f"count_units must always give the same keys, got {[sorted(units) for units in local]}")
        sums = torch.tensor([float(sum(units[name] for units in local)) for name in names], dtype=torch.float64)
        reduced = cast(Tensor, self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum"))
        return dict(zip(names, reduced.float(), strict=True))

    def forward_backward(self, batches: list[Batch], counts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Accumulate gradients. Returns this rank's (sum of each term (T,) float64, total of each micro batch (M,))."""
        sums: list[Tensor] = []
        totals: list[Tensor] = []
        for number, batch in enumerate(batches, start=1):
            # Gradients travel between the ranks once a step, with the last micro batch.
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                terms = self.model(batch, counts)
                names = sorted(terms)
                self._term_names = self._term_names or names
                if names != self._term_names:
                    raise ValueError(
                        f"the objective gave the terms {names} after {self._term_names}: they must not change"
                    )
                loss = torch.stack([terms[name] for name in names]).sum()
                # Terms are divided by global counts already; DDP divides by the number of ranks once more.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            sums.append(torch.stack([terms[name].detach() for name in names]).double())
            totals.append(loss.detach())
        return torch.stack(sums).sum(0), torch.stack(totals)

    def log(self, terms: dict[str, float], rates: dict[str, float], grad_norm: float, skipped: int) -> None:
        """Record the step just finished: terms over the global batch, the learning rates it used, the norm before
        clipping, and how many bad samples it left out, if any."""
        self.last_record = {
            "step": self.finished_steps,
            "loss": math.fsum(terms.values()),
            "terms": terms,
            "lr": rates,
            "grad_norm": grad_norm,
        }
        if skipped:
            self.last_record["skipped"] = skipped
        samples = self.sampler.global_batch_size
        self.tracking.record_step(self.last_record, samples, self.sampler.epoch_of(self.finished_steps))

    # ------------------------------------------------------------------ around the steps

    def open_data(self) -> Iterator[Batch]:
        """Endless micro batches of this rank from the first unfinished step on."""
        self.sampler.start_step = self.finished_steps
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=start_worker,
            # Without a generator of its own the loader would draw from the global one.
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        return iter(loader)

    def evaluate_if_due(self) -> None:
        """Evaluate after the finished steps, when it is time and has not been done."""
        step, config = self.finished_steps, self.config
        if not config.eval_every or not step or (step % config.eval_every and step != self.max_steps):
            return
        done = [any(r["step"] == step for r in self.tracking.evaluations.read()) if self.tracking.is_main else False]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(done)
        if done[0] or self.evaluate is None:
            return
        with torch.no_grad():
            self.last_metrics = dict(self.evaluate(step))
        self.tracking.record_evaluation(step, self.last_metrics)
        self.model.train()

    def save(self) -> Path:
        """Checkpoint after the finished steps, with the records it relies on safely on disk."""
        self.tracking.sync()
        return self.checkpointer.save(self.finished_steps)

    def _count_skipped(self, skipped: int, ids_here: list[str]) -> None:
        """Count bad samples of all ranks; called on every rank, so that all stop together where the limit is passed."""
        self.skipped += skipped
        limit = self.config.max_skipped
        if limit is not None and self.skipped > limit:
            ids = gather_object([str(name) for name in ids_here])
            raise RuntimeError(
                f"{self.skipped} bad samples by step {self.finished_steps}, more than trainer.max_skipped={limit}; "
                f"in this step: {', '.join(ids)}"
            )

    def _summary(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "step": self.finished_steps,
            "record": self.last_record or (self.tracking.losses.read() or [{}])[-1],
            "metrics": self.last_metrics or (self.tracking.evaluations.read() or [{}])[-1].get("metrics", {}),
            "checkpoint": str(self.checkpointer.path_of(self.finished_steps)),
            "output_dir": self.config.output_dir,
        }

    def _fail(self, what: str, batches: list[Batch]) -> None:
        """RuntimeError with the samples of all ranks' `batches`; called on every rank, before the optimizer moves."""
        ids = gather_object([str(name) for batch in batches for name in batch.get("sample_ids", ["(no sample_ids)"])])
        raise RuntimeError(f"{what} is not finite in step {self.finished_steps + 1}; samples: {', '.join(ids)}")


class StopSignals:
    """While active, SIGINT and SIGTERM only note their name in `received`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def start_accelerator(config: TrainerConfig) -> Accelerator:
    """Accelerator for a run.

    Raises RuntimeError when the launcher's processes did not find each other, ValueError for an unsupported engine.
    """
    accelerator = Accelerator(
        mixed_precision=config.precision,
        # A plugin rather than a number: a launcher's environment would override the number and rescale every loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=tracker_names(config.tensorboard, config.wandb) or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes}: they would "
            "train independently. On CPU set ACCELERATE_USE_CPU=true and launch with torchrun or "
            "`accelerate launch --multi_gpu`."
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"the trainer runs plain or under DDP, not under {accelerator.distributed_type.value}")
    return accelerator
