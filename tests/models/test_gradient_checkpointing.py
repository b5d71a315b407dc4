"""Gradient checkpointing: the same gradients, with every layer that grows with the input run a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from double_precision import CLOSE, difference, float64
from tiny_fixtures import settings_of

from instructsam.models.gradient_checkpointing import enable_gradient_checkpointing
from instructsam.models.lora import LoraSettings, add_lora
from instructsam.training.build import Task, build_task
from instructsam.training.optim import freeze_parameters

# One module inside a layer of every kind; not the last one, since the second run stops where nothing more is needed.
WATCHED = {
    "language": "vlm.language_model.layers.1.self_attn",
    "vlm vision": "vlm.visual.blocks.1.attn",
    "sam vision": "detector.vision_encoder.backbone.layers.1.attention",
    "fusion encoder": "detector.detr_encoder.layers.0.self_attn",
    "decoder": "detector.detr_decoder.layers.0.self_attn",
    "pixel decoder": "detector.mask_decoder.pixel_decoder.conv_layers.0",
}
TOWERS = {"vlm vision", "sam vision"}
FROZEN = [r"vlm\.visual\.(?!merger)", r"detector\.vision_encoder", r"language_model\.layers\.\d+\.(mlp|\w+norm)"]


def make_task(world, *more: str) -> Task:
    task = build_task(settings_of("train", f"data.root={world}", "data.turns_per_image=3", *more))
    task.model.train()
    return task


def run(task: Task) -> tuple[Counter, dict[str, torch.Tensor]]:
    """Calls of the watched modules, and gradients, of one step; dropout draws the same every time."""
    calls: Counter = Counter()
    hooks = [
        task.model.get_submodule(module).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in WATCHED.items()
    ]
    batch = task.collate([task.dataset[(0, index)] for index in range(2)])
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    task.objective.zero_grad()
    torch.manual_seed(0)
    sum(task.objective(batch, counts).values()).backward()
    for hook in hooks:
        hook.remove()
    return calls, {name: p.grad.clone() for name, p in task.objective.named_parameters() if p.grad is not None}


def times(number: int, names: Iterable[str]) -> dict[str, int]:
    return dict.fromkeys(names, number)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen towers and LoRA"])
@pytest.mark.parametrize("presence", ["false", "true"])
def test_same_gradients_from_recomputed_layers(world, frozen, presence):
    task = make_task(world, f"model.config.presence_token={presence}")
    if frozen:
        freeze_parameters(task.objective, FROZEN)
        add_lora(task.model, LoraSettings(r=4, alpha=8, dropout=0.3))
        for name, parameter in task.model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    names = list(task.model.state_dict())
    task.objective.double()
    with float64():
        calls, expected = run(task)
        assert calls == times(1, WATCHED)
        enable_gradient_checkpointing(task.model)
        calls, found = run(task)
    assert calls == (times(2, WATCHED.keys() - TOWERS) | times(1, TOWERS) if frozen else times(2, WATCHED))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert difference(gradient, expected[name]) < CLOSE, name
    assert list(task.model.state_dict()) == names


def test_on_twice_is_on_once_and_off_in_evaluation(world):
    task = make_task(world)
    embeddings = task.model.get_input_embeddings()
    for _ in range(2):
        task.model.gradient_checkpointing_enable({"use_reentrant": False})
        enable_gradient_checkpointing(task.model)
    modules = [embeddings, task.model.vlm.visual.patch_embed, *task.model.detector.vision_encoder.modules()]
    assert not any(module._forward_hooks for module in modules), "outputs of frozen layers would require gradients"
    task.model.eval()
    assert run(task)[0] == times(1, WATCHED)


def test_the_setting_switches_it_on(world):
    assert run(make_task(world, "model.gradient_checkpointing=true"))[0] == times(2, WATCHED)
