"""Training checkpoints: everything a killed run needs to go on to the same loss curve, whatever the engine.

    OUTPUT_DIR/checkpoints/step_000500/
        weights.safetensors     what trains (or everything: trainer.save_frozen) and stored buffers, under their names
        optimizer.safetensors   "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME": whole tensors
        ema.safetensors         with trainer.ema_decay: the averages, under the names of the weights
        rng.pt                  random states of torch, CUDA, numpy and Python, one entry a process
        state.json              step, place in the data, fingerprint of the configuration, checksums; written last

Tensors are whole, not cut up as an engine holds them: a run may go on under another engine and with another number of
processes. Only the main process writes; all read, so on several nodes the folder must be on a disk that they share.
What does not train is not stored (unless asked for): it comes from where it came from in the first place, and a
checksum tells whether it is still the same.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instructsam.training.checkpoint_files import (
    FOLDER,
    clean,
    fingerprint_differences,
    latest,
    path_of,
    prune,
    publish,
    read_state,
    remove,
    write_state,
)
from instructsam.training.engines import Engine, OptimizerState, stored_buffers

WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE, RNG_FILE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "rng.pt",
)


def load_weights(checkpoint: str | Path, objective: nn.Module) -> None:
    """Weights and buffers of a training checkpoint into an objective, before an engine takes it over.

    Raises ValueError if names or shapes do not agree: all that trains, and all that is stored, must be on both sides.
    """
    path = Path(checkpoint) / WEIGHTS_FILE
    stored = _read(path)
    parameters = dict(objective.named_parameters())
    buffers = stored_buffers(objective)
    here: dict[str, Tensor] = {**parameters, **buffers}
    needed = {name for name in here if name in buffers or parameters[name].requires_grad}
    problems = [f"{name} is missing" for name in sorted(needed - stored.keys())]
    problems += [f"{name} is not part of the model" for name in sorted(stored.keys() - here.keys())]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)} instead of {tuple(here[name].shape)}"
        for name in sorted(stored.keys() & here.keys())
        if stored[name].shape != here[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"cannot load {path}: {'; '.join(problems[:5])}{more}")
    with torch.no_grad():
        for name, value in stored.items():
            here[name].copy_(value)


def stored_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint has of the weights, averaged where it has averages."""
    return _read(checkpoint / WEIGHTS_FILE) | (_read(checkpoint / EMA_FILE) if (checkpoint / EMA_FILE).exists() else {})


def frozen_checksum(objective: nn.Module) -> int:
    """CRC-32 over names and bytes of the parameters that do not train; to be taken before an engine splits them."""
    value = 0
    for name, parameter in sorted(objective.named_parameters()):
        if not parameter.requires_grad:
            data: Any = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


def capture_rng() -> dict[str, Any]:
    """Random states of this process, as tensors and numbers."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
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
    """Saves and loads the checkpoints of one run; every method is called by all processes together.

    fingerprint: nested, JSON-able settings that must not change between the parts of a run.
    keep: how many of the newest checkpoints stay on disk beside the best one (0: all).
    save_frozen: also store what does not train.
    """

    def __init__(
        self,
        output_dir: str | Path,
        engine: Engine,
        fingerprint: Mapping[str, Any],
        keep: int = 2,
        save_frozen: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.engine = engine
        self.accelerator = engine.accelerator
        # Through JSON once, so that tuples and lists compare equal to what a checkpoint holds.
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self.keep = keep
        self.save_frozen = save_frozen
        self.frozen: int | None = None

    def find_latest(self) -> Path | None:
        """Newest sound checkpoint, as rank 0 sees it (ranks must not disagree over a slow file system)."""
        found = [str(latest(self.output_dir) or "") if self.accelerator.is_main_process else ""]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        return Path(found[0]) if found[0] else None

    def load_model(self, checkpoint: Path | None, objective: nn.Module) -> dict[str, Any]:
        """Weights of a checkpoint, if there is one, into an objective that no engine has taken over yet, with its
        parameters frozen already; returns the checkpoint's state, or {}.

        Raises ValueError, before anything is changed, when it was made with other settings or other frozen weights.
        """
        frozen = frozen_checksum(objective)
        self.frozen = None if self.save_frozen else frozen
        if checkpoint is None:
            return {}
        state = read_state(checkpoint)
        differences = fingerprint_differences(state["fingerprint"], self.fingerprint)
        if differences:
            raise ValueError(
                f"{checkpoint} was made with another configuration: {'; '.join(differences)} (choose another "
                "output_dir, or restore the setting)"
            )
        if state["frozen"] not in (None, frozen):
            raise ValueError(
                f"{checkpoint} was made with other weights in what does not train. They are not stored, but come from "
                "where the run started (the checkpoint or pretrained models that `model` names, or the seed): restore "
                "these, choose another output_dir, or start runs with trainer.save_frozen=true"
            )
        load_weights(checkpoint, objective)
        if state["frozen"] is None and not self.save_frozen:  # it brought them along
            self.frozen = frozen_checksum(objective)
        return state

    def load_rest(self, checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """All but the weights, when the engine has taken over; returns the averages of the weights, if stored."""
        self.engine.load_optimizer_state(_unflatten(_read(checkpoint / OPTIMIZER_FILE), state["optimizer_numbers"]))
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rng = torch.load(checkpoint / RNG_FILE, map_location="cpu", weights_only=True)
        # A run may go on with another number of processes; the trainer seeds every step anyway.
        if len(rng) == self.accelerator.num_processes:
            restore_rng(rng[self.accelerator.process_index])
        return _read(checkpoint / EMA_FILE) if (checkpoint / EMA_FILE).exists() else {}

    def save(self, step: int, place: Mapping[str, Any], ema: Mapping[str, Tensor] | None = None) -> Path:
        """Write the checkpoint after `step` finished steps, then remove the oldest ones over `keep`.

        place: where in the data the run is, for state.json. ema: averages of the weights, whole, on the main process.
        """
        final = path_of(self.output_dir, step)
        temporary = final.with_name(final.name + ".tmp")
        rng = gather_object([capture_rng()])
        weights = self.engine.weights(self.save_frozen)
        tensors, numbers = _flatten_state(self.engine.optimizer_state())
        if self.accelerator.is_main_process:
            remove(temporary)
            temporary.mkdir(parents=True)
            save_file(weights, temporary / WEIGHTS_FILE)
            save_file(tensors, temporary / OPTIMIZER_FILE)
            if ema is not None:
                save_file({name: average.contiguous() for name, average in ema.items()}, temporary / EMA_FILE)
            torch.save(rng, temporary / RNG_FILE)
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                **place,
                "engine": self.engine.name,
                "processes": self.accelerator.num_processes,
                "frozen": self.frozen,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "optimizer_numbers": numbers,
                "fingerprint": self.fingerprint,
            }
            write_state(temporary, state)
            publish(temporary, final)
            prune(self.output_dir, self.keep, step)
        self.accelerator.wait_for_everyone()
        return final

    def clean(self, all_of_them: bool = False) -> None:
        """Remove what killed runs left behind unfinished, or all checkpoints."""
        if self.accelerator.is_main_process:
            if all_of_them:
                remove(self.output_dir / FOLDER)
            clean(self.output_dir)
        self.accelerator.wait_for_everyone()


def _flatten_state(state: OptimizerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "KEY/NAME" for a file, and what is no tensor, likewise."""
    flat = {f"{key}/{name}": value for name, values in state.items() for key, value in values.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _unflatten(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> OptimizerState:
    state: OptimizerState = {}
    for flat, value in {**tensors, **numbers}.items():
        key, name = flat.split("/", 1)
        state.setdefault(name, {})[key] = value
    return state


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot load {path}: {error}") from error
