"""What a run writes down: exact records for comparing runs, timing for people, and optional dashboards.

    OUTPUT_DIR/losses.jsonl        one line a step; equal runs give equal bytes, also when killed and resumed
    OUTPUT_DIR/evaluations.jsonl   one line an evaluation during training
    OUTPUT_DIR/events.jsonl        loss spikes, skipped steps, bad samples, with sample ids (`training.health`)
    OUTPUT_DIR/progress.jsonl      speed and memory, with wall-clock times; only ever appended to
    OUTPUT_DIR/starts.jsonl        one line a start: revision, overrides, versions (`training.provenance`); likewise
    OUTPUT_DIR/samples/            pictures of evaluations, truth beside prediction

TensorBoard and Weights & Biases are off by default and go through accelerate's trackers; both get the curves, the
events, the pictures, the resolved configuration and what the run was started from.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from instructsam.files import replace_text
from instructsam.training.health import describe
from instructsam.training.meters import FLOPS_FILE, Meter, Work

logger = logging.getLogger(__name__)

LOSSES_FILE, EVALUATIONS_FILE, EVENTS_FILE = "losses.jsonl", "evaluations.jsonl", "events.jsonl"
PROGRESS_FILE, STARTS_FILE = "progress.jsonl", "starts.jsonl"
WANDB_ID_FILE = "wandb_id.txt"


def gallery_path(output_dir: str | Path, step: int) -> Path:
    """Where the pictures of the evaluation after `step` are."""
    return Path(output_dir) / "samples" / f"step_{step:06d}.png"


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
            replace_text(self.path, kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; floats keep full precision, non-finite ones become null (JSON has none).

        What a kill has left of a last line goes first: the record would be glued to it.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_torn_line()
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

    def _cut_torn_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)

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
    """All records of one run. Does nothing on ranks other than 0.

    Args:
        peak_flops: what a device could do a second, for the utilisation; None: unknown.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        max_steps: int,
        log_every: int,
        progress_bar: bool,
        max_epochs: float,
        peak_flops: float | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.log_every = log_every
        self.folder = Path(output_dir)
        self.losses = Ledger(self.folder / LOSSES_FILE)
        self.evaluations = Ledger(self.folder / EVALUATIONS_FILE)
        self.events = Ledger(self.folder / EVENTS_FILE)
        self.progress = Ledger(self.folder / PROGRESS_FILE)
        self._meter = Meter(accelerator.num_processes, peak_flops)
        self._max_steps = max_steps
        self._max_epochs = max_epochs
        self._wants_bar = progress_bar and self.is_main
        self._bar: tqdm | None = None

    def forget(self, project: str) -> None:
        """Remove the records of an earlier run, for one that begins anew: files, pictures, TensorBoard's curves, and
        the run id of W&B (whose own folder stays: it may not be synchronised yet). To be called before `start`."""
        if not self.is_main:
            return
        names = (LOSSES_FILE, EVALUATIONS_FILE, EVENTS_FILE, PROGRESS_FILE, STARTS_FILE, WANDB_ID_FILE, FLOPS_FILE)
        pictures = gallery_path(self.folder, 0).parent.glob("step_*.png")
        curves = (self.folder / project).glob("events.out.tfevents.*")
        for path in (*(self.folder / name for name in names), *pictures, *curves):
            path.unlink(missing_ok=True)

    def start(self, step: int) -> None:
        """Get ready to record the steps after `step`."""
        if not self.is_main:
            return
        for ledger in (self.losses, self.evaluations, self.events):
            ledger.truncate(step)
        if len(self.losses.read()) != step:
            logger.warning("%s does not hold all of the first %d steps", self.losses.path, step)
        self.progress.append({"step": step, "event": "start", "time": time.time()})
        self._meter.start()
        if self._wants_bar and sys.stderr.isatty():
            self._bar = tqdm(total=self._max_steps, initial=step, unit="step", dynamic_ncols=True)

    def record_start(self, start: Mapping[str, Any]) -> None:
        """Record what the run is started from (`provenance.describe_start`)."""
        if self.is_main:
            starts = Ledger(self.folder / STARTS_FILE)
            starts.append({**start, "time": time.time()})
            starts.close()

    def record_step(
        self,
        record: Mapping[str, Any],
        samples: float,
        epoch: float,
        work: Work | None = None,
        group_norms: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Record one optimizer step: `record` holds step, loss, terms, lr, grad_norm.

        Args:
            samples: of this step, over all ranks.
            work: what it took in and spent besides.
            group_norms: norm of the gradient of each parameter group before clipping; used on logging steps.
            last: of the run; logged as every `log_every`-th is.
        """
        if not self.is_main:
            return
        self.losses.append(record)
        self._meter.add(work or Work(samples))
        step = record["step"]
        if self._bar is not None:
            self._bar.update(1)
        if step % self.log_every and not last:
            return
        speed = self._meter.read()
        norms = {"group_norms": group_norms} if group_norms else {}
        self.progress.append({"step": step, "time": time.time(), "epoch": epoch, **speed, **norms})
        self._show(record, speed, epoch)
        self._send({"loss": record["loss"], "grad_norm": record["grad_norm"], "epoch": epoch}, step, "train")
        self._send(record["terms"], step, "train/terms")
        self._send(record["lr"], step, "train/lr")
        self._send(group_norms or {}, step, "train/grad_norm_of")
        self._send(speed, step, "speed")

    def record_event(self, event: Mapping[str, Any]) -> None:
        """Record something that should not be (see `health`), tell the user, and mark the step on the dashboards."""
        if self.is_main:
            self.events.append(event)
            self._send({event["event"]: event.get("loss", 1.0)}, event["step"], "events")
            self.say(describe(event))

    def record_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record what an evaluation after `step` gave."""
        if self.is_main:
            self.evaluations.append({"step": step, "metrics": metrics})
            self._send({k: v for k, v in metrics.items() if isinstance(v, int | float)}, step, "eval")
            self._send_picture(gallery_path(self.folder, step), step)
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
        for ledger in (self.losses, self.evaluations, self.events):
            ledger.sync()

    def close(self) -> None:
        """Close files, bar and dashboards."""
        for ledger in (self.losses, self.evaluations, self.events, self.progress):
            ledger.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def _show(self, record: Mapping[str, Any], speed: Mapping[str, float], epoch: float) -> None:
        epochs = f"epoch {epoch:.2f} of {self._max_epochs:.2f}"
        pace = f"{speed['samples_per_second']:.1f} samples/s"
        if speed["data_wait"] >= 0.1:
            pace += f", {speed['data_wait']:.0%} of the time waiting for data"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{epochs}, loss {record['loss']:.4f}, {pace}")
        elif self._wants_bar:
            terms = ", ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
            print(
                f"step {record['step']}/{self._max_steps}: {epochs}, loss {record['loss']:.4f} ({terms}), {pace}",
                flush=True,
            )

    def _send(self, values: Mapping[str, Any], step: int, prefix: str) -> None:
        if values and self.accelerator.trackers:
            self.accelerator.log({f"{prefix}/{name}": value for name, value in values.items()}, step=step)

    def _send_picture(self, path: Path, step: int) -> None:
        if not self.accelerator.trackers or not path.exists():
            return
        pixels_1HWC = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"eval/samples": pixels_1HWC}, step=step, **options)


def tracker_names(tensorboard: bool, wandb: bool) -> list[str]:
    """Names for accelerate's `log_with`; ValueError for one not installed (accelerate would drop it silently)."""
    names = [name for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb)) if wanted]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is switched on but not installed: pip install {name}, or switch it off")
    return names


def start_dashboards(
    accelerator: Accelerator,
    output_dir: str | Path,
    project: str,
    step: int,
    config: Mapping[str, Any],
    start: Mapping[str, Any] | None = None,
    wandb_mode: str | None = None,
) -> None:
    """Start the trackers that the accelerator was made with, continuing those of an earlier part of the run.

    Args:
        step: finished steps.
        config: resolved configuration, nested.
        start: what the run is started from (`provenance.describe_start`).
        wandb_mode: one of `config.WANDB_MODES`; None: the environment's WANDB_MODE, or else offline, which sends
            nothing anywhere (`wandb sync` does later).
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    folder = Path(output_dir).resolve()
    # What a part of the run that was killed has logged after this step is not shown; at step 0 all of it.
    options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1 if step else 0}}
    if any(str(getattr(tracker, "value", tracker)) == "wandb" for tracker in accelerator.log_with):
        mode = wandb_mode or os.environ.get("WANDB_MODE") or "offline"
        options["wandb"] = {"name": folder.name, "dir": str(folder), "id": _wandb_id(folder), "mode": mode}
        if mode == "online":  # offline parts of a run have one id and become one when they are synchronised
            options["wandb"]["resume"] = "allow"
    accelerator.init_trackers(project, init_kwargs=options)
    texts = {"config": _json_able(config), **({"start": _json_able(start)} if start else {})}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.store_init_configuration({**texts["config"], **({"start": texts["start"]} if start else {})})
        else:  # as text: hyperparameters proper would become a run of their own at each start
            for name, values in texts.items():
                lines = json.dumps(values, indent=2, ensure_ascii=False, default=str).splitlines()
                tracker.log({name: "".join(f"    {line}\n" for line in lines)}, step=step)  # indented: Markdown's code


def _wandb_id(folder: Path) -> str:
    """Run id kept next to the checkpoints, so that a resumed run continues its own curves; anew where damaged."""
    path = folder / WANDB_ID_FILE
    found = path.read_bytes().decode("ascii", "replace").strip() if path.exists() else ""
    if not re.fullmatch("[0-9a-f]{16}", found):
        found = os.urandom(8).hex()
        replace_text(path, found)
    return found


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
