"""Training checkpoints: everything a killed run needs to go on to the same loss curve, written atomically.

    OUTPUT_DIR/checkpoints/step_000500/
        objective.safetensors   weights and buffers of what is trained
        training.pt             optimizer, scheduler, gradient scaler (tensors and numbers; read with weights_only=True)
        rng.pt                  random states of torch, CUDA, numpy and Python, one entry a rank
        state.json              step, fingerprint of the configuration, size and checksum of the files; written last

A checkpoint is written to `step_000500.tmp` and renamed, so a directory without the suffix is whole, bar damage to the
disk, which the checksums find. Only rank 0 writes. The two `_..._training_state` methods are the place where an engine
that shards its state comes in.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "checkpoints"
WEIGHTS_FILE, TRAINING_FILE, RNG_FILE, STATE_FILE = "objective.safetensors", "training.pt", "rng.pt", "state.json"
_NAME = re.compile(r"^step_(\d+)$")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint directories of a run from oldest to newest step, whole or damaged, without unfinished (.tmp) ones."""
    folder = Path(output_dir) / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def find_damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be used (missing, truncated or altered files), or None for a sound one."""
    checkpoint = Path(checkpoint)
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    for name, expected in state["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _checksum(path) != expected["crc32"]:
            return f"the checksum of {name} is wrong"
    return None


def latest(output_dir: str | Path) -> Path | None:
    """Newest sound checkpoint of a run, or None; damaged ones are passed over with a warning."""
    for path in reversed(list_checkpoints(output_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("skipping damaged checkpoint %s: %s", path, damage)
    return None


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state.json of a checkpoint: format, step, fingerprint, files. ValueError if missing or not one of ours."""
    path = Path(checkpoint) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or not {"step", "fingerprint", "files"} <= set(state)
    ):
        raise ValueError(f"{path} is not the state of a checkpoint of format {FORMAT}")
    return state


def load_weights(checkpoint: str | Path, objective: nn.Module) -> None:
    """Weights and buffers of a training checkpoint into an objective of the same shape (nothing else is restored).

    Raises ValueError if the names or shapes do not agree.
    """
    path = Path(checkpoint) / WEIGHTS_FILE
    try:
        load_model(objective, path, strict=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"cannot load {path}: {error}") from error


def fingerprint_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two nested configurations, one text each: 'optim.lr is 0.1 there and 0.2 here'."""
    old, new = _flatten(there), _flatten(here)
    missing = "absent"
    differences = []
    for key in sorted({*old, *new}):
        first, second = old.get(key, missing), new.get(key, missing)
        if first != second:
            differences.append(f"{key} is {first!r} there and {second!r} here")
    return differences


def capture_rng() -> dict[str, Any]:
    """Random states of this process, as tensors and numbers."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": (version, list(words), gauss_next),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Undo everything drawn since `capture_rng`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))


class Checkpointer:
    """Saves and loads the checkpoints of one run; every method is called by all ranks together.

    fingerprint: nested, JSON-able settings that must not change between the parts of a run.
    keep: how many of the newest checkpoints stay on disk (0: all).
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: Any,
        scheduler: Any,
        fingerprint: Mapping[str, Any],
        keep: int = 2,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.accelerator = accelerator
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        # Through JSON once, so that tuples and lists compare equal to what a checkpoint holds.
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self.keep = keep

    def path_of(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lives."""
        return self.output_dir / FOLDER / f"step_{step:06d}"

    def find_latest(self) -> Path | None:
        """Newest sound checkpoint, as rank 0 sees it (ranks must not disagree over a slow file system)."""
        found = [str(latest(self.output_dir) or "") if self.accelerator.is_main_process else ""]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return Path(found[0]) if found[0] else None

    def save(self, step: int) -> Path:
        """Write the checkpoint after `step` finished steps, then remove the oldest ones over `keep`."""
        final = self.path_of(step)
        temporary = final.with_name(final.name + ".tmp")
        rng = gather_object([capture_rng()])
        if self.accelerator.is_main_process:
            _remove(temporary)
            temporary.mkdir(parents=True)
            self._write_training_state(temporary)
            torch.save(rng, temporary / RNG_FILE)
            self._write_state_json(temporary, step)
            self._publish(temporary, final)
            self._prune()
        self.accelerator.wait_for_everyone()
        return final

    def load(self, checkpoint: str | Path) -> int:
        """Restore everything from a checkpoint; returns its step.

        Raises ValueError, before anything is changed, when it was made with other settings.
        """
        state = read_state(checkpoint)
        differences = fingerprint_differences(state["fingerprint"], self.fingerprint)
        if differences:
            raise ValueError(
                f"{checkpoint} was made with another configuration: {'; '.join(differences)} (choose another "
                "output_dir, or restore the setting)"
            )
        self._read_training_state(Path(checkpoint))
        rng = torch.load(Path(checkpoint) / RNG_FILE, map_location="cpu", weights_only=True)
        # A run may go on with another number of ranks; the trainer seeds every step anyway.
        if len(rng) == self.accelerator.num_processes:
            restore_rng(rng[self.accelerator.process_index])
        return int(state["step"])

    def clean(self) -> None:
        """Remove what killed runs left behind unfinished."""
        folder = self.output_dir / FOLDER
        if self.accelerator.is_main_process and folder.is_dir():
            for path in folder.glob("step_*.tmp"):
                _remove(path)

    def _write_training_state(self, folder: Path) -> None:
        # save_model stores a tensor that is shared under several names once, and load_model ties it again.
        save_model(self.objective, str(folder / WEIGHTS_FILE))
        scaler = self.accelerator.scaler
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        torch.save(training, folder / TRAINING_FILE)

    def _read_training_state(self, folder: Path) -> None:
        load_weights(folder, self.objective)
        training = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        if training["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(training["scaler"])

    def _write_state_json(self, folder: Path, step: int) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path)} for path in sorted(folder.iterdir())
        }
        state = {"format": FORMAT, "step": step, "fingerprint": self.fingerprint, "files": files}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def _publish(self, temporary: Path, final: Path) -> None:
        """Make the data durable first and visible second."""
        for path in [*temporary.iterdir(), temporary]:
            _flush_to_disk(path)
        replaced = final.with_name(final.name + ".old.tmp")
        _remove(replaced)
        if final.exists():  # a damaged one that the run has come past again
            final.rename(replaced)
        temporary.rename(final)
        _flush_to_disk(final.parent)
        _remove(replaced)

    def _prune(self) -> None:
        if self.keep:
            for path in list_checkpoints(self.output_dir)[: -self.keep]:
                # Renamed first: a kill in the middle must not leave half a checkpoint under a good name.
                doomed = path.with_name(path.name + ".tmp")
                _remove(doomed)
                path.rename(doomed)
                _remove(doomed)


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: values}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
