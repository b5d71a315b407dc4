"""Model folders: saving whole, loading strictly, taking parts of one checkpoint into another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.modeling import InstructSAM


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> InstructSAM:
    """Load a folder written by ``save_pretrained``; every tensor must be there and fit.

    Raises:
        ValueError: no such folder, not a checkpoint, another architecture, missing or unexpected tensors (named).
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.exists():
        raise ValueError(f"{path}: no config.json there, so this is not a checkpoint folder")
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file}: not valid JSON ({error})") from error
    if model_type != InstructSAMConfig.model_type:
        raise ValueError(f"{path}: holds a {model_type!r} model, not {InstructSAMConfig.model_type!r}")
    try:
        model, report = InstructSAM.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: weights cannot be loaded: {error}") from error
    problems = [
        f"{len(report[kind])} {kind.replace('_', ' ')} (first: {sorted(map(str, report[kind]))[0]})"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(kind)
    ]
    if problems:
        raise ValueError(f"{path}: the tensors do not fit the configuration: {'; '.join(problems)}")
    return model


def fresh_model(config: InstructSAMConfig, seed: int) -> InstructSAM:
    """A model with new weights; the same seed gives the same weights whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InstructSAM(config)
        if config.embedding_std is not None:
            embeddings = model.get_input_embeddings().weight
            torch.nn.init.normal_(embeddings, std=config.embedding_std)
            model.query_bank.initialise(config.query_init, config.embedding_std, embeddings[config.token_ids["seg"]])
        return model


def take_modules(model: InstructSAM, path: str | Path, modules: Sequence[str]) -> None:
    """Copy the named modules (e.g. ``detector``, ``phrase_projector``) of another checkpoint into `model`.

    Raises:
        ValueError: unknown module, tensors of another shape (names module and path).
    """
    source = load_model(path)
    for name in modules:
        if name not in dict(model.named_children()) or name not in dict(source.named_children()):
            raise ValueError(
                f"init from {path}: no module {name!r}; there are {[n for n, _ in model.named_children()]}"
            )
        try:
            model.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict(), strict=True)
        except RuntimeError as error:
            first_line = str(error).splitlines()[-1].strip()
            raise ValueError(f"init from {path}: module {name!r} does not fit: {first_line}") from error
