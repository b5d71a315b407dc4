"""LoRA on the language model's attention, through peft: adding, saving, loading and merging it (DESIGN sections 4, 8).

A checkpoint with LoRA is an ordinary one, whose tensors are the base under their ordinary names and which loads without
peft, plus an adapter in peft's own format:

    CHECKPOINT/config.json, model.safetensors     base weights without the adapter, and everything else that trained
    CHECKPOINT/adapter/adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_utils import PreTrainedModel

ADAPTER_FOLDER = "adapter"
WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
# The whole name of every adapted module; the vision tower's are called otherwise (blocks.*.attn.qkv).
TARGETS = r"vlm\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
NAME = "default"  # peft's name of a lone adapter
PREFIX = "base_model.model."  # of tensor names in peft's files
# Entries of adapter_config.json that do not change what the adapter computes.
INDIFFERENT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version"}
INDIFFERENT |= {"revision", "task_type", "megatron_core"}


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale (alpha / r) and dropout of the adapters; the defaults are the release's. ValueError on nonsense."""

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora: r must be a whole number >= 1, got {self.r!r}")
        for name, limit in (("alpha", math.inf), ("dropout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < limit:
                raise ValueError(f"lora: {name} must be a number >= 0 and < {limit:g}, got {value!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LoraSettings:
        """From a plain mapping (a configuration file); ValueError for a key that does not exist."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"lora: unknown settings {', '.join(unknown)}; known are r, alpha, dropout")
        return cls(**values)


def has_lora(model: nn.Module) -> bool:
    """Does the model carry adapters that are not merged?"""
    return bool(getattr(model, "peft_config", None))


def lora_settings(model: nn.Module) -> LoraSettings | None:
    """The settings of the model's adapters; None without any."""
    if not has_lora(model):
        return None
    config = _peft_config_of(model)
    return LoraSettings(config.r, config.lora_alpha, config.lora_dropout)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of every adapted projection."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def add_lora(model: PreTrainedModel, settings: LoraSettings | None = None, seed: int = 0) -> None:
    """Put fresh adapters on q, k, v and o of every language layer, in place; the model computes what it did before.

    The adapted weights are frozen; every other parameter keeps its ``requires_grad``. The adapters have the dtype of
    the weights that they adapt.

    Args:
        settings: None = the release's.
        seed: of the adapters' weights; the same seed gives the same ones whatever was drawn before.

    Raises:
        ValueError: peft is not installed; the model has LoRA already.
    """
    peft = _peft()
    if has_lora(model):
        raise ValueError("the model has LoRA already: merge it first")
    flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(settings or LoraSettings()), model, adapter_name=NAME)
    # peft froze everything but the adapters.
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(id(parameter), True))
    for _, layer in lora_layers(model):
        layer.trained_without_lora = layer.base_layer.weight.requires_grad
        layer.base_layer.weight.requires_grad_(False)
        layer.train(model.training)  # new modules are in training mode, with dropout


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapters to the weights that they adapt, in place: modules, names and flags as before `add_lora`.

    The sum is taken in float32 and rounded to the weights' dtype once.

    Raises:
        ValueError: the model has no LoRA; an adapter holds NaN or infinity (named, nothing is changed).
    """
    if not has_lora(model):
        raise ValueError("the model has no LoRA to merge")
    layers = list(lora_layers(model))
    for name, layer in layers:
        for part in ("lora_A", "lora_B"):
            if not torch.isfinite(getattr(layer, part)[NAME].weight).all():
                raise ValueError(f"{name}.{part} is not finite: merging would ruin the model")
    for name, layer in layers:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        base.to(dtype).weight.requires_grad_(layer.trained_without_lora)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    del model.peft_config


# ---- files ----------------------------------------------------------------------------------------------------------


def has_adapter(folder: str | Path) -> bool:
    """Does a checkpoint folder hold an adapter beside the model?"""
    return (Path(folder) / ADAPTER_FOLDER).is_dir()


def save_with_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    **save_kwargs: Any,
) -> None:
    """Save a model, with its adapter in a folder of its own if it has one; the model itself stays as it is.

    Args:
        dtype: of every floating-point tensor in the files; None keeps the model's.
        state_dict: what to save in place of the model's own tensors, where these are split over processes.
        save_kwargs: for ``save_pretrained``.

    Raises:
        ValueError: without `dtype`, parameters of several dtypes (a checkpoint has one).
    """
    folder = Path(folder)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"the parameters are {', '.join(sorted(map(str, dtypes)))}: say which dtype to save")
    dtype = dtype or dtypes.pop()

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    if (folder / ADAPTER_FOLDER).exists():
        shutil.rmtree(folder / ADAPTER_FOLDER)  # of an earlier save
    if has_lora(model):
        (folder / ADAPTER_FOLDER).mkdir(parents=True)
        adapter = {
            PREFIX + name: cast(tensor).contiguous() for name, tensor in _adapter_state(model, state_dict).items()
        }
        save_file(adapter, folder / ADAPTER_FOLDER / WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.deepcopy(_peft_config_of(model))
        config.inference_mode = True
        config.save_pretrained(str(folder / ADAPTER_FOLDER))
    state = {name: cast(tensor) for name, tensor in base_state_dict(model, state_dict).items()}
    model.save_pretrained(folder, state_dict=state, **save_kwargs)
    if save_kwargs.get("is_main_process", True):
        saved = copy.deepcopy(model.config)
        saved.dtype = str(dtype).removeprefix("torch.")  # save_pretrained notes the model's own
        saved.save_pretrained(folder)


def base_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The model's tensors (or those of `state_dict`) without adapters, under the names that they have without LoRA."""
    state = model.state_dict() if state_dict is None else state_dict
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def load_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Give a model the adapter of a checkpoint that `save_with_adapter` wrote.

    Args:
        model: with the checkpoint's base weights; LoRA is added where it has none.
        folder: the checkpoint, or the adapter's own folder.

    Raises:
        ValueError: peft is not installed; missing or damaged files; an adapter of another kind or with other settings
            than the model's; missing, unexpected or mis-shaped tensors (named).
    """
    peft = _peft()
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).exists():
        folder = folder / ADAPTER_FOLDER
    settings = _read_settings(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: cannot be read: {error}") from error
    if not has_lora(model):
        add_lora(model, settings)
    elif lora_settings(model) != settings:
        raise ValueError(f"{folder}: was trained with {settings}, the model has {lora_settings(model)}")
    expected = {PREFIX + name: tuple(tensor.shape) for name, tensor in _adapter_state(model).items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} instead of {expected[name]}"
        for name in sorted(expected.keys() & tensors.keys())
        if tuple(tensors[name].shape) != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder / WEIGHTS_FILE}: does not fit the model: {'; '.join(problems[:3])}{more}")
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    result = peft.set_peft_model_state_dict(model, bare, adapter_name=NAME)
    assert not result.unexpected_keys, result.unexpected_keys


def _read_settings(folder: Path) -> LoraSettings:
    """The settings of a saved adapter. ValueError for anything but LoRA as `add_lora` makes it."""
    path = folder / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        settings = LoraSettings(values["r"], values["lora_alpha"], values["lora_dropout"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), so there is no adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a LoRA adapter ({error!r})") from error
    ours = json.loads(json.dumps(_peft_config(settings).to_dict(), default=list))
    differences = [
        f"{key} is {value!r} instead of {ours.get(key)!r}"
        for key, value in sorted(values.items())
        if key not in INDIFFERENT and value != ours.get(key) and (key in ours or value)
    ]
    if differences:
        raise ValueError(f"{path}: an adapter of another kind: {'; '.join(differences)}")
    return settings


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError('LoRA needs peft, which is not installed: pip install -e ".[lora]"') from error
    return peft


def _peft_config(settings: LoraSettings) -> Any:
    return _peft().LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=TARGETS,
        bias="none",
    )


def _peft_config_of(model: Any) -> Any:
    return model.peft_config[NAME]


def _adapter_state(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    return _peft().get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=NAME, save_embedding_layers=False
    )
