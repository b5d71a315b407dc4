"""What a run writes down: exact records for comparing runs, timing for people, and optional dashboards.

    OUTPUT_DIR/losses.jsonl        one line a step; equal runs give equal bytes, also when killed and resumed
    OUTPUT_DIR/evaluations.jsonl   one line an evaluation during training
    OUTPUT_DIR/progress.jsonl      speed and memory, with wall-clock times; only ever appended to

TensorBoard and Weights & Biases are off by default and go through accelerate's trackers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

logger = logging.getLogger(__name__)

LOSSES_FILE, EVALUATIONS_FILE, PROGRESS_FILE = "losses.jsonl", "evaluations.jsonl", "progress.jsonl"


class Ledger:
    """A JSON-lines file of records with a `step`, which can be cut back to a step when a run resumes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line torn by a kill is left out."""
        return [json.loads(line) for line in self._whole_lines()]

    def truncate(self, step: int) -> None:
        """Drop the records after `step` and a torn last line; the rest keeps its bytes."""
        self.close()
        if not self.path.exists():
            return
        kept = "".join(line for line in self._whole_lines() if json.loads(line)["step"] <= step)
        if kept.encode() != self.path.read_bytes():
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text(kept, encoding="utf-8")
            temporary.replace(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; floats keep full precision, non-finite ones become null (JSON has none)."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(_json_able(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the lines on disk before a checkpoint claims that they are."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        whole = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            try:
                if not line.endswith("\n") or not isinstance(json.loads(line)["step"], int):
                    break
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: line %d is not a record; it and what follows are ignored", self.path, number)
                break
            whole.append(line)
        return whole


class Tracking:
    """All records of one run. Does nothing on ranks other than 0."""

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        max_steps: int,
        log_every: int,
        progress_bar: bool,
        max_epochs: float,
    ) -> None:
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.log_every = log_every
        folder = Path(output_dir)
        self.losses = Ledger(folder / LOSSES_FILE)
        self.evaluations = Ledger(folder / EVALUATIONS_FILE)
        self.progress = Ledger(folder / PROGRESS_FILE)
        self._max_steps = max_steps
        self._max_epochs = max_epochs
        self._wants_bar = progress_bar and self.is_main
        self._bar: tqdm | None = None
        self._since = (time.perf_counter(), 0)

    def start(self, step: int) -> None:
        """Get ready to record the steps after `step`."""
        if not self.is_main:
            return
        for ledger in (self.losses, self.evaluations):
            ledger.truncate(step)
        if len(self.losses.read()) != step:
            logger.warning("%s does not hold all of the first %d steps", self.losses.path, step)
        self.progress.append({"step": step, "event": "start", "time": time.time()})
        self._since = (time.perf_counter(), step)
        if self._wants_bar and sys.stderr.isatty():
            self._bar = tqdm(total=self._max_steps, initial=step, unit="step", dynamic_ncols=True)

    def record_step(self, record: Mapping[str, Any], samples_per_step: int, epoch: float) -> None:
        """Record one optimizer step: `record` holds step, loss, terms, lr, grad_norm."""
        if not self.is_main:
            return
        self.losses.append(record)
        step = record["step"]
        if self._bar is not None:
            self._bar.update(1)
        if step % self.log_every and step != self._max_steps:
            return
        speed = self._measure(step, samples_per_step)
        self.progress.append({"step": step, "time": time.time(), "epoch": epoch, **speed})
        self._show(record, speed["samples_per_second"], epoch)
        self._send({"loss": record["loss"], "grad_norm": record["grad_norm"], "epoch": epoch, **speed}, step, "train")
        self._send(record["terms"], step, "train/terms")
        self._send(record["lr"], step, "train/lr")

    def record_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record what an evaluation after `step` gave."""
        if self.is_main:
            self.evaluations.append({"step": step, "metrics": metrics})
            self._send({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step, "eval")
            numbers = " ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float))
            self.say(f"evaluation after step {step}: {numbers}")

    def say(self, text: str) -> None:
        """Tell the user something, once for all ranks, without tearing the progress bar."""
        if self.is_main:
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def sync(self) -> None:
        """Have the deterministic records on disk."""
        self.losses.sync()
        self.evaluations.sync()

    def close(self) -> None:
        """Close files, bar and dashboards."""
        for ledger in (self.losses, self.evaluations, self.progress):
            ledger.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def _measure(self, step: int, samples_per_step: int) -> dict[str, float]:
        then, first = self._since
        now = time.perf_counter()
        self._since = (now, step)
        seconds = max(now - then, 1e-9)
        steps = step - first
        speed = {
            "seconds_per_step": seconds / max(steps, 1),
            "samples_per_second": steps * samples_per_step / seconds,
        }
        if torch.cuda.is_available():
            speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return speed

    def _show(self, record: Mapping[str, Any], samples_per_second: float, epoch: float) -> None:
        epochs = f"epoch {epoch:.2f} of {self._max_epochs:.2f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{epochs}, loss {record['loss']:.4f}, {samples_per_second:.1f} samples/s")
        elif self._wants_bar:
            terms = ", ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
            print(
                f"step {record['step']}/{self._max_steps}: {epochs}, loss {record['loss']:.4f} ({terms}), "
                f"{samples_per_second:.1f} samples/s",
                flush=True,
            )

    def _send(self, values: Mapping[str, Any], step: int, prefix: str) -> None:
        if self.accelerator.trackers:
            self.accelerator.log({f"{prefix}/{name}": value for name, value in values.items()}, step=step)


def tracker_names(tensorboard: bool, wandb: bool) -> list[str]:
    """Names for accelerate's `log_with`; ValueError for one not installed (accelerate would drop it silently)."""
    names = [name for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)) if wanted]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is switched on but not installed: pip install {name}, or switch it off")
    return names


def start_dashboards(
    accelerator: Accelerator, output_dir: str | Path, project: str, step: int, config: Mapping[str, Any]
) -> None:
    """Start the trackers that the accelerator was made with, continuing those of an earlier part of the run."""
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    folder = Path(output_dir).resolve()
    options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1 if step else None}}
    if any(str(getattr(tracker, "value", tracker)) == "wandb" for tracker in accelerator.log_with):
        options["wandb"] = {"name": folder.name, "dir": str(folder), "id": _wandb_id(folder), "resume": "allow"}
    accelerator.init_trackers(project, config=_scalars(config), init_kwargs=options)


def _wandb_id(folder: Path) -> str:
    """Run id kept next to the checkpoints, so that a resumed run continues its own curves."""
    path = folder / "wandb_id.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(8).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    """TensorBoard takes numbers and texts only."""
    return {k: v if isinstance(v, int | float | str | bool) else json.dumps(v, default=str) for k, v in config.items()}


def _json_able(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_able(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch numbers and arrays
        return _json_able(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
