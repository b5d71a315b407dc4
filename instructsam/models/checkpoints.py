"""New weights, parts of one checkpoint taken into another model, and checkpoint folders that appear when complete."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.layouts import FIRST_ROWS
from instructsam.models.modeling import InstructSAMModel


def fresh_model(config: InstructSAMConfig, seed: int) -> InstructSAMModel:
    """A model with new weights; the same seed gives the same weights whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InstructSAMModel(config)
        if config.embedding_std is not None:
            embeddings = model.get_input_embeddings().weight
            torch.nn.init.normal_(embeddings, std=config.embedding_std)
            model.query_bank.initialise(config.query_init, config.embedding_std, embeddings[config.token_ids["seg"]])
        return model


def take_modules(model: InstructSAMModel, path: str | Path, modules: Sequence[str]) -> list[str]:
    """Copy the named modules (e.g. ``detector``, ``phrase_projector``) of another checkpoint into `model`.

    Of the detector's learned queries and reference points (`FIRST_ROWS`) the first are taken, as they are from SAM 3,
    if the two models differ in their number of queries; rows that the other does not have stay as they are.

    Returns:
        What was not taken whole, a line each.

    Raises:
        ValueError: unknown module, tensors of another shape (names module and path).
    """
    source = InstructSAMModel.from_pretrained(path)
    own, others, notes = model.state_dict(), source.state_dict(), []
    for name in modules:
        if name not in dict(model.named_children()) or name not in dict(source.named_children()):
            raise ValueError(
                f"init from {path}: no module {name!r}; there are {[n for n, _ in model.named_children()]}"
            )
        taken = {key: tensor for key, tensor in others.items() if key.startswith(f"{name}.")}
        for key in set(FIRST_ROWS) & set(taken):
            here, there = own[key], taken[key]
            if len(here) != len(there):
                notes.append(f"init from {path}: {key}: the first {len(here)} rows, of which it has {len(there)}")
                taken[key] = torch.cat([there[: len(here)].to(here), here[len(there) :]])
        try:
            model.get_submodule(name).load_state_dict(
                {key.removeprefix(f"{name}."): tensor for key, tensor in taken.items()}, strict=True
            )
        except RuntimeError as error:
            first_line = str(error).splitlines()[-1].strip()
            raise ValueError(f"init from {path}: module {name!r} does not fit: {first_line}") from error
    return notes


def make_readable(folder: Path) -> None:
    """Let whoever may read a checkpoint's config.json read its weights too: safetensors writes for the owner alone."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `output` when the block ends, and is removed if it fails.

    Raises:
        ValueError: `output` exists and is not an empty folder; a checkpoint is never overwritten.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder; name another one, or remove it")
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        make_readable(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replace_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` when the block ends, and is removed if it fails.

    A kill leaves the older folder or the new one under the name. Only where the system cannot exchange two folders is
    there a moment with neither; both are then complete, as `.NAME.old` and `.NAME.tmp` beside it. For one process at a
    time: leftovers of a killed one are removed.
    """
    output = Path(output)
    unfinished, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        make_readable(unfinished)
        if not output.exists():
            unfinished.rename(output)
        elif not _exchange(unfinished, output):
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
            unfinished.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # the older folder after an exchange


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    try:
        result = ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    return result == 0
