"""Parameter groups: strict about patterns, exact about membership; and the values of the schedule."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_fixtures import settings_of
from torch import nn

from instructsam.models.factory import build_model
from instructsam.training.optim import (
    OptimConfig,
    base_learning_rate,
    build_optimizer,
    freeze_others,
    freeze_parameters,
    group_parameters,
    learning_rate_factor,
    learning_rates,
    set_learning_rates,
    warmup_steps,
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
        ({"groups": {"a": group("language", layer_decay=0.9)}}, "layer_decay of group 'a' has no effect"),
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
        ({"groups": {"a": {"match": ["x"], "lr": 1.0, "layer_decay": 0.0}}}, "layer_decay of group 'a' must lie in"),
        ({"groups": {"a": {"match": ["x"], "lr": 1.0, "layer_decay": 1.5}}}, "layer_decay of group 'a' must lie in"),
        ({"groups": {"a": {"match": ["x"], "lr": 1.0, "layer_decay": "0.9"}}}, "layer_decay of group 'a' must be a"),
        ({"optimizer": "adam"}, "optimizer must be one of"),
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


def test_a_part_of_a_warmup_step_is_a_whole_one():
    assert [warmup_steps(OptimConfig(warmup_ratio=0.03), steps) for steps in (1, 33, 34, 100)] == [1, 1, 2, 3]


def test_warmup_longer_than_training_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps 9 is longer than the training of 8 steps"):
        warmup_steps(OptimConfig(warmup_steps=9), 8)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_fractions_of_a_step_lie_between_whole_ones(schedule):
    config = OptimConfig(warmup_steps=3, schedule=schedule)
    whole = [learning_rate_factor(step, config, 10) for step in range(11)]
    for step in range(10):
        between = [learning_rate_factor(step + part / 8, config, 10) for part in range(8)]
        assert between[0] == whole[step] and max(between) <= 1.0
        low, high = sorted(whole[step : step + 2])
        assert all(low - 1e-12 <= value <= high + 1e-12 for value in between)
    # Half of the way, counted in steps of half the size: the same place in the schedule.
    plain = OptimConfig(schedule=schedule)
    assert learning_rate_factor(7.5, plain, 10) == pytest.approx(learning_rate_factor(15, plain, 20))


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


def test_factor_scales_all_groups():
    config = OptimConfig(lr=1.0, weight_decay=0.1, groups={"vision": group("vision", lr=0.1)})
    optimizer = build_optimizer(Model(), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for factor in (0.5, 1.0, 0.25):
        set_learning_rates(optimizer, config, factor)
        assert learning_rates(optimizer) == pytest.approx({"vision": 0.1 * factor, "default": factor})
        assert all(
            g["lr"] == pytest.approx({"vision": 0.1}.get(g["name"][:6], 1.0) * factor) for g in optimizer.param_groups
        )


def test_rates_come_from_the_configuration_and_never_from_a_checkpoint():
    saved = build_optimizer(Model(), OptimConfig(lr=1.0)).state_dict()
    config = OptimConfig(lr=0.5)
    optimizer = build_optimizer(Model(), config)
    optimizer.load_state_dict(saved)
    assert learning_rates(optimizer) == {"default": 1.0}  # as PyTorch restores it
    set_learning_rates(optimizer, config, 0.5)
    assert learning_rates(optimizer) == {"default": 0.25}


# ---- layer-wise learning rates


class Tower(nn.Module):
    """Embeddings, norm, three layers, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.norm = nn.LayerNorm(4)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(2, 4))
        self.text = Tower()
        self.vision = nn.Module()
        self.vision.scale_layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])  # no layer of a tower
        self.vision.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.vision.head = nn.Module()
        self.vision.head.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))  # a small MLP, no tower


def rates_by_name(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] for g in group_parameters(model, config) for p in g["params"]}


def test_rates_shrink_towards_the_input_of_each_tower():
    config = OptimConfig(lr=1.0, groups={"text": group("^text", lr=2.0, layer_decay=0.5)})
    rates = rates_by_name(TwoTowers(), config)
    expected = {"embed.weight": 0.25, "norm.weight": 2.0, "norm.bias": 2.0}
    for layer, rate in enumerate((0.5, 1.0, 2.0)):
        expected |= {f"layers.{layer}.{name}": rate for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert {name.removeprefix("text."): rate for name, rate in rates.items() if name.startswith("text.")} == expected
    assert {rate for name, rate in rates.items() if not name.startswith("text.")} == {1.0}
    vision = OptimConfig(lr=1.0, groups={"vision": group("^vision", lr=1.0, layer_decay=0.5)})
    rates = rates_by_name(TwoTowers(), vision)
    found = {name.rpartition(".")[0].removeprefix("vision."): r for name, r in rates.items() if name[0] == "v"}
    assert found == {
        "scale_layers.0.0": 0.25,
        "blocks.0.0": 0.5,
        "blocks.1.0": 1.0,
        "head.layers.0": 1.0,
        "head.layers.1": 1.0,
    }


def test_depths_have_groups_of_their_own_and_one_rate_in_the_log():
    config = OptimConfig(lr=1.0, weight_decay=0.1, groups={"text": group("^text", lr=2.0, layer_decay=0.5)})
    optimizer = build_optimizer(TwoTowers(), config)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("text", 2.0, 0.1),
        ("text/no_decay", 2.0, 0.0),
        ("text/depth_1", 1.0, 0.1),
        ("text/depth_1/no_decay", 1.0, 0.0),
        ("text/depth_2", 0.5, 0.1),
        ("text/depth_2/no_decay", 0.5, 0.0),
        ("text/depth_3/no_decay", 0.25, 0.0),
        ("default", 1.0, 0.1),
        ("default/no_decay", 1.0, 0.0),
    ]
    assert learning_rates(optimizer) == {"text": 2.0, "default": 1.0}
    set_learning_rates(optimizer, config, 0.5)
    assert [g["lr"] for g in optimizer.param_groups][::2] == [1.0, 0.5, 0.25, 0.125, 0.5]
    assert learning_rates(optimizer) == {"text": 1.0, "default": 0.5}
    assert base_learning_rate("text/depth_2/no_decay", config) == 0.5


def test_frozen_layers_count_in_the_depth_of_the_others():
    config = OptimConfig(lr=1.0, freeze=[r"layers\.[02]\."], groups={"text": group("^text", lr=2.0, layer_decay=0.5)})
    model = TwoTowers()
    freeze_parameters(model, config.freeze)
    rates = rates_by_name(model, config)
    assert rates["text.layers.1.0.weight"] == 1.0 and rates["text.embed.weight"] == 0.25
    assert not any(".layers.0." in name and name.startswith("text") for name in rates)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_layers_of_the_tiny_model(world, lora):
    """In its three large towers, under their real names, with and without LoRA around them."""
    model, _ = build_model(
        settings_of(
            "train", f"data.root={world}", f"model.lora={'{r: 4, alpha: 8, dropout: 0.0}' if lora else 'null'}"
        )["model"]
    )
    groups = {
        "words": group(r"vlm\.language_model", lr=1.0, layer_decay=0.5),
        "sight": group(r"vlm\.visual", lr=1.0, layer_decay=0.5),
        "sam": group(r"detector\.vision_encoder", lr=1.0, layer_decay=0.5),
    }
    rates = rates_by_name(model, OptimConfig(lr=3.0, groups=groups))
    adapted = ".lora_A.default" if lora else ""
    expected = {
        "vlm.visual.patch_embed.proj.weight": 1 / 8,
        "vlm.visual.pos_embed.weight": 1 / 8,
        "vlm.visual.blocks.0.attn.qkv.weight": 1 / 4,
        "vlm.visual.blocks.2.mlp.linear_fc2.bias": 1.0,
        "vlm.visual.merger.linear_fc1.weight": 1.0,
        "vlm.visual.deepstack_merger_list.0.norm.weight": 1.0,
        "vlm.language_model.embed_tokens.weight": 1 / 16,
        f"vlm.language_model.layers.0.self_attn.q_proj{adapted}.weight": 1 / 8,
        f"vlm.language_model.layers.3.self_attn.q_proj{adapted}.weight": 1.0,
        "detector.vision_encoder.backbone.embeddings.patch_embeddings.projection.weight": 1 / 8,
        "detector.vision_encoder.backbone.layer_norm.weight": 1 / 8,
        "detector.vision_encoder.backbone.layers.1.mlp.fc1.weight": 1 / 2,
        "detector.vision_encoder.neck.fpn_layers.0.proj1.weight": 1.0,
        "query_bank.weight": 3.0,
        "detector.mask_decoder.mask_embedder.layers.0.weight": 3.0,
    }
    if not lora:
        expected["vlm.language_model.norm.weight"] = 1.0
    assert {name: rates.get(name) for name in expected} == expected


# ---- 8 bits


def test_8_bit_adamw_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optimizer=adamw_8bit needs bitsandbytes .*: pip install bitsandbytes"):
        build_optimizer(Model(), OptimConfig(optimizer="adamw_8bit"))


@pytest.mark.slow
def test_8_bit_adamw_trains_nearly_as_adamw_and_goes_on_exactly():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    def make(kind: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(96, 64)
        return model, build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, optimizer=kind))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
        for step in steps:
            inputs = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(inputs) - inputs[:, :64]).square().mean().backward()
            optimizer.step()
        return model.weight.detach().clone()

    plain, eight = make("adamw"), make("adamw_8bit")
    start = plain[0].weight.detach().clone()
    expected, found = (train(*each, range(20)) for each in (plain, eight))
    assert isinstance(eight[1], AdamW8bit) and [g["name"] for g in eight[1].param_groups] == [
        "default",
        "default/no_decay",
    ]
    assert eight[1].state[eight[0].weight]["state1"].dtype == torch.uint8
    assert float((found - expected).norm() / (expected - start).norm()) < 0.1 and not torch.equal(found, expected)

    model, optimizer = make("adamw_8bit")
    train(model, optimizer, range(10))
    again, resumed = make("adamw_8bit")
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(again, resumed, range(10, 20)), found)
