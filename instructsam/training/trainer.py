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
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from instructsam.data.budgets import Budgets, Sizes
from instructsam.data.samplers import DistributedBatchSampler
from instructsam.models.placement import as_dtype
from instructsam.training.checkpoint_files import forget_best_after, note_best, path_of, prune, read_best
from instructsam.training.checkpointing import Checkpointer, stored_weights
from instructsam.training.config import TrainerConfig
from instructsam.training.ema import EMA
from instructsam.training.engines import start_engine
from instructsam.training.health import BAD_SAMPLES, NonFinitePolicy, SpikeDetector, count_skipped_steps
from instructsam.training.meters import (
    NOT_TRAINING,
    FlopEstimate,
    PhaseTimer,
    Work,
    count_inputs,
    group_norms,
    peak_of,
)
from instructsam.training.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate_factor,
    learning_rates,
    set_learning_rates,
    warmup_steps,
)
from instructsam.training.precision import cast_frozen, check_master_weights
from instructsam.training.profiling import Profiler
from instructsam.training.progress import Progress
from instructsam.training.provenance import describe_start, one_line
from instructsam.training.signals import StopSignals
from instructsam.training.tracking import Tracking, start_dashboards, tracker_names
from instructsam.training.workers import close_data, next_batch, start_worker

Batch = dict[str, Any]


class Trainer:
    """Trains `objective` on `dataset`; `run()` does everything, and may be called again in a new process to go on.

    evaluate: called with the step and the objective (a copy of it, where the engine splits parameters) on all ranks,
    without gradient, after every `eval_every` steps and at the end; returns metrics.
    fingerprint: nested, JSON-able settings (of model and data) that must not change when a run resumes; the trainer
    adds its own.
    group_by: a size for every sample, or a function of the epoch that gives them; samples of similar size then come
    together (see `DistributedBatchSampler`).
    sizes: (tokens, phrases) of every sample as functions of the epoch, for budgets.
    settings, overrides: the resolved configuration and what of it the user gave, for the records.
    """

    def __init__(
        self,
        config: TrainerConfig,
        objective: nn.Module,
        dataset: Dataset,
        collate: Callable[[list[Any]], Batch],
        optim_config: OptimConfig,
        evaluate: Callable[[int, nn.Module], Mapping[str, Any]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        group_by: Sequence[float] | np.ndarray | Sizes | None = None,
        sizes: tuple[Sizes, Sizes] | None = None,
        settings: Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
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
        self.group_by = group_by
        self.sizes = sizes
        self.settings = dict(settings or {})
        self.overrides = list(overrides)
        self.skipped = 0
        self.last_record: dict[str, Any] = {}
        self.last_metrics: dict[str, Any] = {}
        self._term_names: list[str] | None = None

    # ------------------------------------------------------------------ the run as a whole

    def run(self) -> dict[str, Any]:
        """Set up, resume, train, save. Returns {"status", "step", "record", "metrics", "checkpoint", "output_dir"}
        where status is "complete", "already_complete" or "interrupted" (by a signal; a checkpoint is saved).

        Raises RuntimeError for a non-finite loss or gradient, ValueError for settings that cannot work.
        """
        self.setup()
        try:
            if self.progress.done:
                self.evaluate_if_due()
                self.tracking.say(
                    f"{self.config.output_dir} is complete ({self.progress.finished_steps} steps): nothing to train"
                )
                return self._summary("already_complete")
            self.tracking.say(one_line(self.start_record))
            self.tracking.record_start(self.start_record)
            if self.settings and self.tracking.is_main:
                text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
                (Path(self.config.output_dir) / "config.yaml").write_text(text, encoding="utf-8")
            start_dashboards(
                self.accelerator,
                self.config.output_dir,
                self.config.project,
                self.progress.finished_steps,
                self.settings or self.fingerprint,
                self.start_record,
                self.config.wandb_mode,
            )
            with StopSignals() as stop:
                return self._summary(self.train(stop))
        finally:
            self.tracking.close()

    def setup(self) -> None:
        """Make everything, go on from the newest sound checkpoint if there is one, cut the records back to it."""
        config = self.config
        trackers = tracker_names(config.tensorboard, config.wandb)
        self.engine = start_engine(config.precision, config.output_dir, trackers)
        self.accelerator = self.engine.accelerator
        self.sampler = self.make_sampler()
        self.progress = Progress(self.sampler, config.max_steps, config.epochs)

        optimizer = build_optimizer(self.objective, self.optim_config)
        check_master_weights(self.objective)
        if config.frozen_dtype is not None:
            cast_frozen(self.objective, as_dtype(config.frozen_dtype, "frozen_dtype", auto=False))
        self.fingerprint |= {"optim": asdict(self.optim_config), "trainer": self._fingerprint()}
        self.checkpointer = Checkpointer(
            config.output_dir, self.engine, self.fingerprint, config.keep_checkpoints, config.save_frozen
        )
        checkpoint = self.find_checkpoint()
        state = self.checkpointer.load_model(checkpoint, self.objective)
        if self.accelerator.is_main_process:  # now that the checkpoint is accepted
            forget_best_after(config.output_dir, checkpoint)
        self.engine.prepare(self.objective, optimizer, config.clip_norm, evaluates=bool(config.eval_every))
        self.optimizer = self.engine.optimizer
        self.ema = self.make_averages()
        notes = [] if checkpoint is None else self.restore(checkpoint, state)
        warmup_steps(self.optim_config, self.progress.schedule()[1])
        self.start_record = describe_start(
            self.engine, self.progress.finished_steps, self.overrides, self.sampler.samples_per_step
        )
        self.tracking = Tracking(
            config.output_dir,
            self.accelerator,
            self.progress.total_steps,
            config.log_every,
            config.progress_bar,
            self.progress.total_epochs,
            peak_of(self.accelerator.device, config.precision, config.peak_tflops),
        )
        for note in notes:
            self.tracking.say(note)
        if config.resume == "fresh":
            self.tracking.forget(config.project)
        self.tracking.start(self.progress.finished_steps)
        self.recall()

    def make_sampler(self) -> DistributedBatchSampler:
        """Which samples each rank sees in each step."""
        config = self.config
        budgets = None
        if config.per_device_batch_size is None:
            tokens, phrases = self.sizes or (None, None)
            budgets = Budgets(config.tokens_per_batch, config.phrases_per_batch, tokens, phrases)
        return DistributedBatchSampler(
            len(cast(Any, self.dataset)),
            config.per_device_batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            config.accumulation,
            config.seed,
            group_by=self.group_by,
            budgets=budgets,
        )

    def make_averages(self) -> EMA | None:
        """Moving averages of what trains, if asked for; after the engine has put its own parameters in place."""
        if not self.config.ema_decay:
            return None
        trained = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        return EMA(trained, self.config.ema_decay, self.engine.parameters_changed)

    def find_checkpoint(self) -> Path | None:
        """The newest sound checkpoint of this run, if there is one."""
        self.checkpointer.clean(all_of_them=self.config.resume == "fresh")
        checkpoint = self.checkpointer.find_latest()
        if checkpoint is not None and self.config.resume == "never":
            raise ValueError(
                f"resume is 'never' but {checkpoint} exists: choose another output_dir, or remove the old run"
            )
        return checkpoint

    def restore(self, checkpoint: Path, state: Mapping[str, Any]) -> list[str]:
        """Go on from a checkpoint whose weights are loaded already; returns what the user should know."""
        averages = self.checkpointer.load_rest(checkpoint, state)
        if self.ema is not None:
            self.ema.load_state_dict(averages)
        changed = self.progress.load(int(state["step"]), state)
        return [f"resuming from {checkpoint}", *([changed] if changed else [])]

    def recall(self) -> None:
        """What was counted before this start; every rank must know it to decide as the others do."""
        config = self.config
        past: list[Any] = [None]
        if self.tracking.is_main:
            losses = self.tracking.losses.read()
            skipped = sum(record.get("skipped", 0) for record in losses)
            recent = [record["loss"] for record in losses if record["loss"] is not None][-config.spike_window :]
            past = [(skipped, recent, count_skipped_steps(self.tracking.events.read()))]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(past)
        self.skipped, recent, skipped_steps = past[0]
        self.spikes = SpikeDetector(recent, config.spike_window, config.spike_factor)
        self.nonfinite = NonFinitePolicy(config.nonfinite, config.max_nonfinite, skipped_steps)

    def train(self, stop: StopSignals) -> str:
        """Steps until the end or a signal; returns the status."""
        # A kill between a checkpoint and the evaluation of the same step leaves the latter to be made up for.
        self.evaluate_if_due()
        self.timer = self.make_timer()
        counted = self.config.accumulation if self.tracking.is_main else 0
        self.flops = FlopEstimate(self.objective, self.config.output_dir, self.progress.finished_steps, counted)
        batches = self.open_data()
        try:
            return self._train_on(batches, stop)
        finally:
            close_data(batches)
            if isinstance(self.timer, Profiler):
                self.timer.finish()

    def _train_on(self, batches: Iterator[Batch], stop: StopSignals) -> str:
        config = self.config
        self.engine.model.train()
        while not self.progress.done:
            started = time.perf_counter()
            with self.timer.phase("data"):
                micro_batches = [next_batch(batches) for _ in range(config.accumulation)]
            must_stop = self.step(micro_batches, stop, time.perf_counter() - started)
            if self._saves_now() or (must_stop and not config.profile_steps):
                with self.timer.phase("checkpoint"):
                    self.save()
            if must_stop and not self.progress.done:
                self.tracking.say(self._farewell(stop))
                return "interrupted"
            with self.timer.phase("evaluation"):
                self.evaluate_if_due()
        self.tracking.say(f"finished {self.progress.finished_steps} steps; everything is in {config.output_dir}")
        return "complete"

    # ------------------------------------------------------------------ one optimizer step

    def step(self, batches: list[Batch], stop: StopSignals, data_seconds: float = 0.0) -> bool:
        """One optimizer step on this rank's micro batches; returns whether any rank wants to stop after it."""
        phase, device = self.timer.phase, self.accelerator.device
        self.seed_step()
        set_learning_rates(self.optimizer, self.optim_config, self.learning_rate_factor())
        inputs = [count_inputs(batch) for batch in batches]
        skipped_ids = [str(name) for batch in batches for name in batch.get("skipped_ids", ())]
        counts = self.count(batches)  # before they are on the device, which it would wait for
        with phase("to device"):
            batches = [send_to_device(batch, device, non_blocking=True) for batch in batches]
        terms, losses = self.forward_backward(batches, counts, inputs)
        with phase("clip gradients"):
            grad_norm = self.engine.clip()
        logs = _is_time(self.progress.finished_steps + 1, self.config.log_every)  # before the gradients are gone
        norms = group_norms(self.optimizer, grad_norm, self.config.clip_norm or math.inf) if logs else {}
        own = {
            "stop": float(stop.received is not None),
            "skipped": float(len(skipped_ids)),
            "data_seconds": data_seconds / self.accelerator.num_processes,
            "tokens": sum(size["tokens"] for size in inputs),
            "phrases": sum(size["phrases"] for size in inputs),
        }
        with phase("wait for the losses"):
            seen = self.reduce(terms, losses, grad_norm, own)
        with phase("optimizer"):
            self.move(seen, losses, batches)
        samples = self.progress.advance()
        with phase("logging"):
            self.log(seen, samples, norms)
            self.watch(batches)
            if seen.own["skipped"]:
                self._count_skipped(int(seen.own["skipped"]), skipped_ids)
        return bool(seen.own["stop"])

    def learning_rate_factor(self) -> float:
        """What the learning rates of the step to come are multiplied with."""
        step, steps = self.progress.schedule()
        return learning_rate_factor(step, self.optim_config, steps)

    def seed_step(self) -> None:
        """Seed everything random in the model by (seed, step, rank): resumption leans on no stored random state."""
        words = np.random.SeedSequence(
            [self.config.seed, self.progress.finished_steps, self.accelerator.process_index]
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

    def forward_backward(
        self, batches: list[Batch], counts: dict[str, Tensor], inputs: list[dict[str, float]]
    ) -> tuple[Tensor, Tensor]:
        """Accumulate gradients. Returns this rank's (sum of each term (T,) float64, total of each micro batch (M,))."""
        sums: list[Tensor] = []
        totals: list[Tensor] = []
        for number, (batch, size) in enumerate(zip(batches, inputs, strict=True), start=1):
            last = number == len(batches)
            with self.engine.micro_batch(last), self.flops.counting(size):
                with self.timer.phase("forward"):
                    terms = self.engine.forward(batch, counts)
                    names = sorted(terms)
                    self._term_names = self._term_names or names
                    if names != self._term_names:
                        raise ValueError(
                            f"the objective gave the terms {names} after {self._term_names}: they must not change"
                        )
                    loss = torch.stack([terms[name] for name in names]).sum()
                with self.timer.phase("backward"):
                    self.engine.backward(loss)
            sums.append(torch.stack([terms[name].detach() for name in names]).double())
            totals.append(loss.detach())
        return torch.stack(sums).sum(0), torch.stack(totals)

    def reduce(self, terms: Tensor, losses: Tensor, grad_norm: Tensor | None, own: dict[str, float]) -> Seen:
        """What all ranks must know of the step: one reduction and one wait for the device.

        own: numbers of this rank, to be summed up over all.
        """
        bad = (~torch.isfinite(losses)).any().reshape(1)
        local = torch.cat([terms, bad.to(terms), torch.tensor([*own.values()], device=terms.device).to(terms)])
        total = cast(Tensor, self.accelerator.reduce(local, reduction="sum"))
        norm = torch.full((1,), math.nan) if grad_norm is None else torch.as_tensor(grad_norm).reshape(1)
        *values, grad_norm_before = torch.cat([total, norm.to(total)]).tolist()
        names = [*(self._term_names or []), "bad", *own]
        by_name = dict(zip(names, values, strict=True))
        return Seen(
            terms={name: by_name[name] for name in self._term_names or []},
            bad=bool(by_name["bad"]),
            own={name: by_name[name] for name in own},
            grad_norm=grad_norm_before,
        )

    def move(self, seen: Seen, losses: Tensor, batches: list[Batch]) -> None:
        """Take the step, unless something is not finite."""
        if seen.bad:
            bad = (~torch.isfinite(losses)).tolist()
            self._not_finite("loss", [batch for batch, is_bad in zip(batches, bad, strict=True) if is_bad])
            self.engine.skip()
            return
        if self.engine.clips_in_step:
            seen.grad_norm = self.engine.step()
        # fp16's scaler leaves out a step with such gradients by itself, as it looks for its scale.
        if not math.isfinite(seen.grad_norm) and self.config.precision != "fp16":
            self._not_finite("gradient norm", batches)
            if not self.engine.clips_in_step:  # else it has left the step out
                self.engine.skip()
            return
        if not self.engine.clips_in_step:
            self.engine.step()
        if self.ema is not None and not self.engine.left_out:
            self.ema.update()

    def log(self, seen: Seen, samples: int, norms: Mapping[str, Tensor]) -> None:
        """Record the step just finished: terms over the global batch, the learning rates it used, the norm before
        clipping, and how many bad samples it left out, if any."""
        self.last_record = {
            "step": self.progress.finished_steps,
            "loss": math.fsum(seen.terms.values()) if not seen.bad else math.nan,
            "terms": seen.terms,
            "lr": learning_rates(self.optimizer),
            "grad_norm": seen.grad_norm,
        }
        if seen.own["skipped"]:
            self.last_record["skipped"] = int(seen.own["skipped"])
        seconds = self.timer.take()
        idle = sum(seconds.get(name, 0.0) for name in NOT_TRAINING)
        measured = {name: seen.own[name] for name in ("tokens", "phrases", "data_seconds")}
        flops = self.flops.of({"samples": samples, "tokens": seen.own["tokens"]})
        self.tracking.record_step(
            self.last_record,
            samples,
            self.progress.epochs,
            Work(samples, flops=flops, idle_seconds=idle, **measured),
            {name: float(norm) for name, norm in norms.items()} if self.tracking.is_main else None,
            last=self.progress.done,
        )

    def watch(self, batches: list[Batch]) -> None:
        """Note a loss that is far above those before it, with the samples of all ranks."""
        event = self.spikes.check(self.progress.finished_steps, self.last_record["loss"])
        if event is not None:
            self.tracking.record_event({**event, "sample_ids": _gather_ids(batches)})

    # ------------------------------------------------------------------ around the steps

    def open_data(self) -> Iterator[Batch]:
        """Endless micro batches of this rank from the first unfinished step on."""
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

    def make_timer(self) -> PhaseTimer:
        """Plain clocks, or the profiler."""
        config = self.config
        if not config.profile_steps:
            return PhaseTimer()
        folder = config.output_dir if self.tracking.is_main else None
        return Profiler(folder, config.profile_steps, self.accelerator.device, self.tracking.say)

    def evaluate_if_due(self) -> None:
        """Evaluate after the finished steps, when it is time and has not been done."""
        if not self._evaluates_now() or self.evaluate is None:
            return
        step = self.progress.finished_steps
        done = [any(r["step"] == step for r in self.tracking.evaluations.read()) if self.tracking.is_main else False]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(done)
        if not done[0]:
            with torch.no_grad(), self._averaged(), self.engine.plain_objective() as objective:
                self.last_metrics = dict(self.evaluate(step, objective))
            self.tracking.record_evaluation(step, self.last_metrics)
            self.engine.model.train()
        # Without a checkpoint there is nothing to keep.
        if self.config.best_metric is not None and not self.config.profile_steps and self.tracking.is_main:
            note_best(self.config.output_dir, self.config.best_metric, self.tracking.evaluations.read()[-1])
            prune(self.config.output_dir, self.config.keep_checkpoints, step)

    def save(self) -> Path:
        """Checkpoint after the finished steps, with the records it relies on safely on disk."""
        self.tracking.sync()
        ema = None if self.ema is None else self.ema.state_dict(keep=self.accelerator.is_main_process)
        return self.checkpointer.save(self.progress.finished_steps, self.progress.state_dict(), ema)

    def state_dict(self) -> dict[str, Tensor]:
        """The objective's state dict as it is to be kept: on the main process, whole, with averaged parameters if there
        are averages. Called by all processes; the others get {}."""
        with self._averaged():
            return self.engine.state_dict()

    def best_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """`state_dict`, given as `state`, with what trained as it was at the best evaluation; None if there was none.
        For the main process."""
        best = read_best(self.config.output_dir)
        if best is None:
            return None
        stored = stored_weights(path_of(self.config.output_dir, best["step"]))
        first = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        every = self.objective.named_parameters(remove_duplicate=False)
        stored_as = {name: first[id(parameter)] for name, parameter in every}  # tied ones have the first name
        return {name: stored.get(stored_as.get(name, name), value) for name, value in state.items()}

    def _averaged(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.ema is None else self.ema.swapped()

    def _farewell(self, stop: StopSignals) -> str:
        step, config = self.progress.finished_steps, self.config
        said = f"stopped by {stop.received or 'a signal to another process'} after step {step}"
        if config.profile_steps:
            return said
        again = "" if config.resume == "auto" else " with trainer.resume=auto"
        place = path_of(config.output_dir, step)
        return f"{said}; checkpoint saved in {place}. Run the same command again{again} to resume."

    def _saves_now(self) -> bool:
        config = self.config
        if config.profile_steps:  # a profile is to be taken again
            return False
        best = config.best_metric is not None and self._evaluates_now()
        return self.progress.done or best or _is_time(self.progress.finished_steps, config.checkpoint_every)

    def _evaluates_now(self) -> bool:
        every, step = self.config.eval_every, self.progress.finished_steps
        return bool(every and step and (step % every == 0 or self.progress.done))

    def _count_skipped(self, skipped: int, ids_here: list[str]) -> None:
        """Count bad samples of all ranks; called on every rank, so that all stop together where the limit is passed."""
        self.skipped += skipped
        ids = gather_object(ids_here)
        self.tracking.record_event({"step": self.progress.finished_steps, "event": BAD_SAMPLES, "sample_ids": ids})
        limit = self.config.max_skipped
        if limit is not None and self.skipped > limit:
            raise RuntimeError(
                f"{self.skipped} bad samples by step {self.progress.finished_steps}, more than trainer.max_skipped="
                f"{limit}; in this step: {', '.join(ids)}"
            )

    def _not_finite(self, what: str, batches: list[Batch]) -> None:
        """Stop, or note that the step is left out; called on every rank, before anything moves."""
        self.tracking.record_event(self.nonfinite.handle(self.progress.finished_steps + 1, what, _gather_ids(batches)))

    def _fingerprint(self) -> dict[str, Any]:
        config = self.config
        names = ("max_steps", "epochs", "clip_norm", "precision", "frozen_dtype", "seed", "ema_decay")
        sizes = self.group_by(0) if callable(self.group_by) else self.group_by
        return {
            **{name: getattr(config, name) for name in names},
            "dataset_length": self.sampler.dataset_length,
            "group_by": None if sizes is None else zlib.crc32(np.asarray(sizes, dtype=np.float64).tobytes()),
        }

    def _summary(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "step": self.progress.finished_steps,
            "record": self.last_record or (self.tracking.losses.read() or [{}])[-1],
            "metrics": self.last_metrics or (self.tracking.evaluations.read() or [{}])[-1].get("metrics", {}),
            "checkpoint": str(path_of(self.config.output_dir, self.progress.finished_steps)),
            "output_dir": self.config.output_dir,
        }


@dataclass
class Seen:
    """What all ranks know of a step, the same on each.

    terms: over the global batch. bad: the loss of some micro batch is not finite. own: sums of what each rank gave.
    grad_norm: before clipping; not a number where only the step itself tells.
    """

    terms: dict[str, float]
    bad: bool
    own: dict[str, float]
    grad_norm: float


def _is_time(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _gather_ids(batches: list[Batch]) -> list[str]:
    """Sample ids of all ranks; called on every rank."""
    return gather_object([str(name) for batch in batches for name in batch.get("sample_ids", ["(no sample_ids)"])])
