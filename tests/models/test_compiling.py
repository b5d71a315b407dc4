"""The compiled vision encoder: the same maps and gradients, the same names, and nothing compiled that trains."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from double_precision import difference, doubled
from tiny_fixtures import settings_of

from instructsam.models.compiling import compile_frozen_vision
from instructsam.models.factory import build_model
from instructsam.models.modeling import InstructSAMModel
from instructsam.training.build import build_task
from instructsam.training.optim import OptimConfig, select_parameters

ENCODER = r"detector\.vision_encoder\."


def compiled(model: InstructSAMModel) -> set[str]:
    return {name for name, module in model.named_modules() if module._compiled_call_impl is not None}


@pytest.mark.slow
def test_what_trains_is_not_compiled(world):
    model, _ = build_model(settings_of("train", f"data.root={world}")["model"])
    with pytest.raises(ValueError, match=r"there train backbone\.embeddings\S*, \S*, \S* and \d+ more: freeze it"):
        compile_frozen_vision(model)
    select_parameters(model, OptimConfig(freeze=[ENCODER + "backbone"]))
    with pytest.raises(ValueError, match=r"there train neck\.fpn_layers\.0"):
        compile_frozen_vision(model)
    assert compiled(model) == set()
    select_parameters(model, OptimConfig(freeze=[ENCODER]))
    names = list(model.state_dict())
    compile_frozen_vision(model)
    assert compiled(model) == {f"detector.vision_encoder.backbone.layers.{layer}" for layer in range(3)}
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch.compile fails under it")
def test_a_training_step_is_the_same(world, tmp_path):
    """Maps, loss terms and gradients, with gradient checkpointing and LoRA; then the file that is saved.

    In float64, but losses and norms cast to float32 on the way, and the compiler rounds constants to it: neither can be
    told otherwise here, and one rounding is 1e-7.
    """
    from torch._dynamo.utils import counters

    more = ("data.turns_per_image=2", "model.gradient_checkpointing=true", "model.lora={r: 4, alpha: 8, dropout: 0.0}")
    task = build_task(settings_of("train", f"data.root={world}", *more))
    select_parameters(task.objective, OptimConfig(freeze=[ENCODER]))
    task.objective.double().train()
    batch = doubled(task.collate([task.dataset[(0, index)] for index in range(2)]))
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}

    def step() -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        maps = task.model.detector.encode_image(batch["detector_pixel_values"]).maps
        task.objective.zero_grad()
        terms = task.objective(batch, counts)
        sum(terms.values()).backward()
        gradients = {name: p.grad.clone() for name, p in task.objective.named_parameters() if p.grad is not None}
        return maps, {name: value.detach() for name, value in terms.items()}, gradients

    eager_maps, eager_terms, eager_gradients = step()
    compile_frozen_vision(task.model)
    counters.clear()
    maps, terms, gradients = step()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # one for all three layers
    for found, expected in zip(maps, eager_maps, strict=True):
        assert found.grad_fn is None and difference(found, expected) < 1e-6
        assert found.any()
    assert terms.keys() == eager_terms.keys() and gradients.keys() == eager_gradients.keys()
    for name, value in eager_terms.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5), name
    for name, expected in eager_gradients.items():
        assert difference(gradients[name], expected) < 1e-5, name
    assert not any("vision_encoder" in name for name in gradients)
    task.model.save_pretrained(tmp_path)
    again = InstructSAMModel.from_pretrained(tmp_path)
    assert compiled(again) == set() and list(again.state_dict()) == list(task.model.state_dict())
