"""From configuration to optimizer: which parameters train, in which group, with which learning rate over time.

Groups are named lists of regular expressions over parameter names (`re.search`). The rules are strict on purpose: a
typo in a pattern would otherwise train a whole tower with the wrong learning rate without a word.

Learning rates are a function of the configuration and the step alone (`set_learning_rates`); nothing about them has to
be saved, and nothing that a checkpoint says can change them.

Under ZeRO and FSDP2 too: groups are made of the module's own parameters before the engine wraps them, and every engine
keeps a group's ``name``, which is all that is read later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from instructsam.data.reader_options import from_settings
from instructsam.training.layer_decay import depths_below_top

DEFAULT_GROUP = "default"
NO_DECAY_SUFFIX = "/no_decay"
DEPTH = "/depth_"
SCHEDULES = ("cosine", "constant")
GROUP_KEYS = ("match", "lr", "weight_decay", "layer_decay")
OPTIMIZERS = ("adamw", "adamw_8bit")


@dataclass
class OptimConfig:
    """What the optimizer is made of.

    optimizer: "adamw", or "adamw_8bit" (bitsandbytes), whose two moments take a quarter of the memory.
    lr, weight_decay: of the default group, which takes every trainable parameter that no group claims.
    groups: name -> {"match": [regex, ...], "lr": float, "weight_decay": float (optional: else as the default group),
        "layer_decay": float (optional: layer i of the n of a tower has the rate lr * layer_decay ** (n - 1 - i), and
        what comes before the layers lr * layer_decay ** n, see `layer_decay`)}.
    train: patterns of the parameters that train, all others are frozen; empty: no such limit.
    freeze: patterns of parameters that do not train; freezing wins over `train` and over groups.
    decay_all: apply weight decay also to biases, norms (1-d parameters) and embeddings.
    schedule: "cosine" (to min_ratio of each group's lr at max_steps) or "constant", after a linear warm-up of
    `warmup_steps`, or of `warmup_ratio` of all steps (at most one of the two).
    """

    optimizer: str = "adamw"
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)
    decay_all: bool = False
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        for name in ("train", "freeze"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of regular expressions, got {getattr(self, name)!r}")
            setattr(self, name, list(getattr(self, name)))
        self.groups = {name: dict(spec) for name, spec in self.groups.items()}
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        _check_rate("lr", self.lr)
        _check_rate("weight_decay", self.weight_decay)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.warmup_steps < 0 or not 0.0 <= self.warmup_ratio < 1.0 or not 0.0 <= self.min_ratio <= 1.0:
            raise ValueError(
                "warmup_steps must be >= 0, warmup_ratio in [0, 1) and min_ratio in [0, 1], got "
                f"{self.warmup_steps}, {self.warmup_ratio}, {self.min_ratio}"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        for name, spec in self.groups.items():
            self._check_group(name, spec)
        for name in ("train", "freeze"):
            for pattern in getattr(self, name):
                _compile(pattern, name)

    def _check_group(self, name: str, spec: Mapping[str, Any]) -> None:
        if name == DEFAULT_GROUP or "/" in name:
            raise ValueError(f"group name {name!r} is not allowed: {DEFAULT_GROUP!r} is taken and '/' is reserved")
        if unknown := sorted(set(spec) - set(GROUP_KEYS)):
            raise ValueError(f"group {name!r} has unknown keys {unknown}; known are {', '.join(GROUP_KEYS)}")
        patterns = spec.get("match")
        if isinstance(patterns, str) or not isinstance(patterns, Sequence) or not patterns:
            raise ValueError(f"group {name!r} needs 'match', a list of regular expressions, got {patterns!r}")
        for pattern in patterns:
            _compile(pattern, f"group {name!r}")
        if "lr" not in spec:
            raise ValueError(f"group {name!r} needs 'lr'")
        _check_rate(f"lr of group {name!r}", spec["lr"])
        if spec.get("weight_decay") is not None:
            _check_rate(f"weight_decay of group {name!r}", spec["weight_decay"])
        if (decay := spec.get("layer_decay")) is not None:
            _check_rate(f"layer_decay of group {name!r}", decay)
            if not 0 < decay <= 1:
                raise ValueError(f"layer_decay of group {name!r} must lie in (0, 1], got {decay!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimConfig:
        """From a plain mapping; ValueError for a key that does not exist."""
        return from_settings(cls, "optim", values)


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> int:
    """Set requires_grad to False on every parameter whose name a pattern finds; returns how many elements that are.

    Raises ValueError naming a pattern that finds no parameter.
    """
    found = _found_by(module, patterns, "freeze")
    for parameter in found.values():
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in found.values())


def freeze_others(module: nn.Module, patterns: Sequence[str]) -> int:
    """Set requires_grad to False on every parameter whose name no pattern finds; returns how many elements that are.

    Never the other way round: what is frozen already (tensors without use, weights under LoRA) stays so though found.
    Raises ValueError naming a pattern that finds no parameter.
    """
    kept = _found_by(module, patterns, "train")
    others = [parameter for parameter in module.parameters() if id(parameter) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in others)


def select_parameters(module: nn.Module, config: OptimConfig) -> None:
    """Freeze what does not train according to `config`: all but `train` (if given), then `freeze`."""
    if config.train:
        freeze_others(module, config.train)
    freeze_parameters(module, config.freeze)


def group_parameters(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, each with a `name`; every trainable parameter is in exactly one of them.

    A group with layer_decay is split by depth: NAME (full rate), NAME/depth_1, NAME/depth_2, ... One whose weight decay
    is not zero is split in two: NAME and NAME/no_decay (1-d parameters and embeddings). Groups left without trainable
    parameters are omitted. A parameter with several names (tied) counts once.

    Raises ValueError for a pattern that matches no parameter (frozen ones count), a parameter that two groups
    match, layer_decay in a group that holds no layers, or nothing to train.
    """
    owners: dict[int, set[str]] = {}
    names = _names_of(module)
    for group, spec in config.groups.items():
        for pattern in spec["match"]:
            regex = _compile(pattern, f"group {group!r}")
            found = [parameter for name, parameter in names if regex.search(name)]
            if not found:
                raise ValueError(f"pattern {pattern!r} of group {group!r} matches no parameter")
            for parameter in found:
                owners.setdefault(id(parameter), set()).add(group)

    embeddings = {
        id(p) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters(False)
    }
    depths = depths_below_top([name for name, _ in module.named_parameters()])
    _check_layers(module, config, owners, depths)
    members: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        claimed = owners.get(id(parameter), {DEFAULT_GROUP})
        if len(claimed) > 1:
            raise ValueError(f"parameter {name!r} is matched by several groups: {', '.join(sorted(claimed))}")
        (group,) = claimed
        depth = depths[name] if _layer_decay(config, group) < 1 else 0
        spares = not config.decay_all and (_ndim(parameter) < 2 or id(parameter) in embeddings)
        members.setdefault((group, depth, spares and _weight_decay(config, group) > 0), []).append(parameter)
    if not members:
        raise ValueError("no parameter is trainable: everything is frozen")

    order = [*config.groups, DEFAULT_GROUP]
    groups = []
    for group, depth, spared in sorted(members, key=lambda key: (order.index(key[0]), *key[1:])):
        name = group + (f"{DEPTH}{depth}" if depth else "") + (NO_DECAY_SUFFIX if spared else "")
        rate, decay = base_learning_rate(name, config), 0.0 if spared else _weight_decay(config, group)
        groups.append({"name": name, "params": members[group, depth, spared], "lr": rate, "weight_decay": decay})
    return groups


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """Freeze, group, and make the optimizer; raises what `select_parameters` and `group_parameters` raise.

    adamw_8bit keeps moments of tensors below 4,096 elements in 32 bits, as bitsandbytes does. It works on plain tensors
    (one process, DDP), not on FSDP2's DTensors.

    Raises:
        ValueError: adamw_8bit without bitsandbytes.
    """
    select_parameters(module, config)
    groups = group_parameters(module, config)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optim.optimizer=adamw_8bit needs bitsandbytes ({error}): pip install bitsandbytes; or set it to adamw"
        ) from error
    return AdamW8bit(groups, **settings)


def learning_rate_factor(step: float, config: OptimConfig, max_steps: float) -> float:
    """What the learning rates are multiplied with in optimizer step `step` (from 0) of `max_steps`.

    Warm-up rises from 1/warmup in the first step to 1 in step warmup - 1 (no step is lost to a zero rate); the
    cosine reaches min_ratio after the last step. Both may be fractions: a run that goes on with another batch size
    counts in steps of the size that it began with.
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return config.min_ratio + (1.0 - config.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(config: OptimConfig, max_steps: float) -> int:
    """Length of the warm-up in optimizer steps; ValueError when longer than the training."""
    steps = config.warmup_steps or math.ceil(config.warmup_ratio * max_steps)
    if steps > math.ceil(max_steps):
        raise ValueError(f"warmup_steps {steps} is longer than the training of {max_steps} steps")
    return steps


def set_learning_rates(optimizer: Optimizer, config: OptimConfig, factor: float) -> None:
    """Give every group its configured rate times `factor`, whatever rate it has (from a checkpoint, say)."""
    for group in optimizer.param_groups:
        group["lr"] = base_learning_rate(group["name"], config) * factor


def base_learning_rate(name: str, config: OptimConfig) -> float:
    """The configured rate of one of the groups that `group_parameters` makes, by its name."""
    group, depth = (name.removesuffix(NO_DECAY_SUFFIX).split(DEPTH) + ["0"])[:2]
    return float(config.groups.get(group, {}).get("lr", config.lr)) * _layer_decay(config, group) ** int(depth)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Current learning rate of each configured group: where it is split by depth, that of the topmost part."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = group["name"].partition("/")[0]
        rates[name] = max(group["lr"], rates.get(name, 0.0))
    return rates


def _layer_decay(config: OptimConfig, group: str) -> float:
    decay = config.groups.get(group, {}).get("layer_decay")
    return 1.0 if decay is None else float(decay)


def _weight_decay(config: OptimConfig, group: str) -> float:
    decay = config.groups.get(group, {}).get("weight_decay")
    return float(config.weight_decay if decay is None else decay)


def _ndim(parameter: nn.Parameter) -> int:
    """Of the whole tensor: under ZeRO-3 the parameter itself may be an empty placeholder."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _check_layers(
    module: nn.Module, config: OptimConfig, owners: Mapping[int, set[str]], depths: Mapping[str, int]
) -> None:
    deep = {group for name, p in module.named_parameters() if depths[name] for group in owners.get(id(p), ())}
    for group in config.groups:
        if _layer_decay(config, group) < 1 and group not in deep:
            raise ValueError(
                f"layer_decay of group {group!r} has no effect: none of its parameters lies below the last layer of a "
                "tower (NAME.layers.0., NAME.blocks.0., ...); leave layer_decay out"
            )


def _found_by(module: nn.Module, patterns: Sequence[str], where: str) -> dict[int, nn.Parameter]:
    """The parameters that a pattern finds, by id. ValueError naming a pattern that finds none."""
    names = _names_of(module)
    found: dict[int, nn.Parameter] = {}
    for pattern in patterns:
        regex = _compile(pattern, where)
        by_this = {id(parameter): parameter for name, parameter in names if regex.search(name)}
        if not by_this:
            raise ValueError(f"{where} pattern {pattern!r} matches no parameter")
        found |= by_this
    return found


def _names_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every name of every parameter: a tied parameter is listed under each of its names."""
    return list(module.named_parameters(remove_duplicate=False))


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression ({error})") from None


def _check_rate(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
