"""Parameter groups: strict about patterns, exact about membership; and the values of the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from instructsam.training.optim import (
    OptimConfig,
    build_optimizer,
    build_schedule,
    freeze_others,
    freeze_parameters,
    group_parameters,
    learning_rate_factor,
    learning_rates,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.language = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.vision = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def names_by_group(model: nn.Module, config: OptimConfig) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in group_parameters(model, config)}


def group(*patterns: str, lr: float = 1e-3, **others) -> dict:
    return {"match": list(patterns), "lr": lr, **others}


def test_groups_hold_every_trainable_parameter_once():
    config = OptimConfig(lr=0.5, groups={"language": group(r"^language\.", "norm"), "vision": group("vision", lr=0.1)})
    assert names_by_group(Model(), config) == {
        "language": {"language.weight", "language.bias", "norm.weight", "norm.bias"},
        "vision": {"vision.weight", "vision.bias"},
        "default": {"embed.weight"},
    }
    optimizer = build_optimizer(Model(), config)
    assert learning_rates(optimizer) == {"language": 1e-3, "vision": 0.1, "default": 0.5}


def test_weight_decay_spares_vectors_and_embeddings():
    config = OptimConfig(weight_decay=0.1, groups={"vision": group("vision", weight_decay=0.0)})
    assert names_by_group(Model(), config) == {
        "vision": {"vision.weight", "vision.bias"},
        "default": {"language.weight"},
        "default/no_decay": {"embed.weight", "language.bias", "norm.weight", "norm.bias"},
    }
    groups = {g["name"]: g for g in group_parameters(Model(), config)}
    assert groups["default"]["weight_decay"] == 0.1
    assert groups["default/no_decay"]["weight_decay"] == 0.0 == groups["vision"]["weight_decay"]
    everything = OptimConfig(weight_decay=0.1, decay_all=True)
    assert list(names_by_group(Model(), everything)) == ["default"]


def test_tied_parameter_answers_to_both_names():
    assert names_by_group(Model(), OptimConfig(groups={"head": group("^head")}))["head"] == {"embed.weight"}


def test_frozen_parameters_are_in_no_group():
    model = Model()
    config = OptimConfig(freeze=["vision"], groups={"vision": group("vision"), "language": group("language")})
    frozen_elements = freeze_parameters(model, config.freeze)
    assert frozen_elements == 20 and not model.vision.weight.requires_grad
    assert set(names_by_group(model, config)) == {"language", "default"}


def test_only_what_the_allow_list_finds_trains():
    model = Model()
    config = OptimConfig(train=["^language", "norm"], freeze=["norm.bias"], groups={"vision": group("vision")})
    build_optimizer(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"language.weight", "language.bias", "norm.weight"}
    assert names_by_group(model, config) == {"default": trained}


def test_the_allow_list_wakes_nothing_up():
    model = Model()
    model.vision.bias.requires_grad_(False)
    assert freeze_others(model, ["vision", "head"]) == 20 + 8
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"vision.weight", "embed.weight"}


def test_without_an_allow_list_all_trains():
    model = Model()
    build_optimizer(model, OptimConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (
            {"groups": {"a": group("language"), "b": group("weight")}},
            r"'language.weight' is matched by several groups: a, b",
        ),
        ({"groups": {"a": group("language", "lnaguage")}}, r"pattern 'lnaguage' of group 'a' matches no parameter"),
        ({"freeze": ["visoin"]}, "freeze pattern 'visoin' matches no parameter"),
        ({"train": ["language", "visoin"]}, "train pattern 'visoin' matches no parameter"),
        ({"freeze": ["."]}, "no parameter is trainable"),
    ],
)
def test_grouping_errors_name_the_culprit(settings_, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(Model(), OptimConfig(**settings_))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"schedule": "step"}, "schedule"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "not both"),
        ({"min_ratio": 2.0}, "min_ratio"),
        ({"train": "vision"}, "train must be a list"),
        ({"freeze": "vision"}, "freeze must be a list"),
        ({"train": ["("]}, "train: '\\(' is not a regular expression"),
        ({"groups": {"a": {"match": "text", "lr": 1.0}}}, "list of regular expressions"),
        ({"groups": {"a": {"match": ["x"]}}}, "needs 'lr'"),
        ({"groups": {"a": {"match": ["x"], "lr": 1.0, "wd": 1.0}}}, "unknown keys"),
        ({"groups": {"a": {"match": ["("], "lr": 1.0}}}, "not a regular expression"),
        ({"groups": {"default": {"match": ["x"], "lr": 1.0}}}, "not allowed"),
    ],
)
def test_nonsense_settings_are_errors(settings_, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings_)


def test_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="learning_rate"):
        OptimConfig.from_dict({"learning_rate": 1.0})


def test_schedule_values():
    config = OptimConfig(lr=1.0, warmup_steps=4, min_ratio=0.2)
    factors = [learning_rate_factor(step, config, 12) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.6)  # half of the way from 1 to 0.2
    assert factors[6] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[12] == factors[13] == pytest.approx(0.2)


def test_warmup_ratio_and_constant():
    config = OptimConfig(warmup_ratio=0.03, schedule="constant")
    assert [learning_rate_factor(step, config, 100) for step in (0, 1, 2, 50, 99)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1]
    )


def test_warmup_longer_than_training_is_an_error():
    optimizer = build_optimizer(Model(), OptimConfig())
    with pytest.raises(ValueError, match="warmup_steps 9 is longer than the training of 8 steps"):
        build_schedule(optimizer, OptimConfig(warmup_steps=9), 8)


@given(
    warmup=st.integers(0, 20),
    rest=st.integers(1, 50),
    minimum=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "constant"]),
)
@settings(deadline=None, max_examples=50)
def test_schedule_rises_then_falls_within_bounds(warmup, rest, minimum, kind):
    config = OptimConfig(warmup_steps=warmup, min_ratio=minimum, schedule=kind)
    factors = [learning_rate_factor(step, config, warmup + rest) for step in range(warmup + rest)]
    assert all(0 < f <= 1 + 1e-12 for f in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[-1] >= minimum - 1e-12 or rest == 0


def test_schedule_scales_all_groups():
    config = OptimConfig(lr=1.0, groups={"vision": group("vision", lr=0.1)}, warmup_steps=2)
    optimizer = build_optimizer(Model(), config)
    schedule = build_schedule(optimizer, config, 10)
    assert learning_rates(optimizer) == pytest.approx({"vision": 0.05, "default": 0.5})
    optimizer.step()
    schedule.step()
    assert learning_rates(optimizer) == pytest.approx({"vision": 0.1, "default": 1.0})
    assert isinstance(optimizer, torch.optim.AdamW)
