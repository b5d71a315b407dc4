"""LoRA: on the right layers only, saved beside a base that needs no peft, loaded strictly, merged exactly."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from double_precision import CLOSE, difference, doubled, float64
from safetensors.torch import load_file, save_file

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.models.lora import (
    ADAPTER_FOLDER,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    LoraSettings,
    add_lora,
    base_state_dict,
    has_adapter,
    has_lora,
    load_adapter,
    lora_layers,
    lora_settings,
    merge_lora,
    save_with_adapter,
)
from instructsam.models.modeling import InstructSAMModel
from instructsam.processing.processor import InstructSAMProcessor

pytestmark = pytest.mark.slow

SMALL = LoraSettings(r=4, alpha=8, dropout=0.1)
PROJECTIONS = [f"vlm.language_model.layers.{k}.self_attn.{x}_proj" for k in range(4) for x in "kqvo"]


@pytest.fixture
def model(checkpoint) -> InstructSAMModel:
    return InstructSAMModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def batch(checkpoint, world) -> dict:
    processor = InstructSAMProcessor.from_pretrained(checkpoint)
    samples = read_coco_instructions(world, "train")[:2]
    return processor.collate([processor.encode_sample(sample, True) for sample in samples])


def outputs(model: InstructSAMModel, batch: dict) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
    with torch.no_grad():
        output = model(*(batch[name] for name in names), turn_ids=batch["turn_ids"])
    found = output.detections
    return {"hidden": output.language.hidden_BLC, "masks": found.pred_masks, "logits": found.pred_logits}


def with_adapter(model: InstructSAMModel, std: float = 0.2) -> InstructSAMModel:
    """The model with adapters that do something."""
    add_lora(model, SMALL)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
    return model


def describe(model: InstructSAMModel) -> list[tuple]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules + [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A checkpoint with an adapter."""
    folder = tmp_path / "saved"
    save_with_adapter(with_adapter(model), folder)
    return folder


# ---- adding ---------------------------------------------------------------------------------------------------------


def test_exactly_the_language_models_attention(model):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    add_lora(model, SMALL)
    assert sorted(name for name, _ in lora_layers(model)) == sorted(PROJECTIONS)
    new = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(new) == 2 * len(PROJECTIONS)
    now = {name.replace(".base_layer.", "."): p.requires_grad for name, p in model.named_parameters()}
    assert all(now[name] for name in new)
    changed = {name for name, flag in before.items() if now[name] != flag}
    assert changed == {f"{name}.weight" for name in PROJECTIONS}
    assert not any(now[name] for name in changed)


def test_fresh_adapters_change_nothing_and_come_from_the_seed(model, batch):
    before = outputs(model, batch)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    add_lora(model, SMALL, seed=3)
    torch.rand(7)
    random_state = torch.get_rng_state()
    add_lora(twin, SMALL, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    add_lora(other, SMALL, seed=4)
    torch.testing.assert_close(outputs(model, batch), before, atol=0, rtol=0)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), atol=0, rtol=0)
    name = f"{PROJECTIONS[0]}.lora_A.default.weight"
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])


def test_settings_are_those_of_the_release_by_default(model):
    assert not has_lora(model) and lora_settings(model) is None
    add_lora(model)
    assert has_lora(model) and lora_settings(model) == LoraSettings(64, 16, 0.05)
    layer = dict(lora_layers(model))[PROJECTIONS[0]]
    assert layer.scaling["default"] == 0.25 and layer.lora_dropout["default"].p == 0.05
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model)


@pytest.mark.parametrize("values", [{"r": 0}, {"r": 2.0}, {"alpha": -1}, {"dropout": 1.0}, {"alpha": float("nan")}])
def test_nonsense_settings_are_errors(values):
    with pytest.raises(ValueError, match=f"lora: {next(iter(values))} must be"):
        LoraSettings.from_mapping(values)


def test_unknown_settings_are_errors():
    with pytest.raises(ValueError, match="unknown settings rank"):
        LoraSettings.from_mapping({"rank": 8})


def test_without_peft_the_error_says_how_to_get_it(model, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: add_lora(model), lambda: InstructSAMModel.from_pretrained(saved)):
        with pytest.raises(ValueError, match=re.escape('pip install -e ".[lora]"')):
            call()


def test_dropout_follows_the_models_mode(model, saved):
    modes = {
        layer.lora_dropout["default"].training for _, layer in lora_layers(InstructSAMModel.from_pretrained(saved))
    }
    assert modes == {False}
    merge_lora(model)
    add_lora(model.train(), SMALL)
    assert all(layer.lora_dropout["default"].training for _, layer in lora_layers(model))


# ---- saving and loading ---------------------------------------------------------------------------------------------


def test_round_trip(model, saved, batch):
    loaded = InstructSAMModel.from_pretrained(saved).eval()
    assert lora_settings(loaded) == SMALL
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch), atol=0, rtol=0)


def test_the_base_loads_without_peft(checkpoint, saved, batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    original = load_file(checkpoint / "model.safetensors")
    torch.testing.assert_close(load_file(saved / "model.safetensors"), original, atol=0, rtol=0)
    shutil.rmtree(saved / ADAPTER_FOLDER)
    base = InstructSAMModel.from_pretrained(saved).eval()
    assert not has_lora(base)
    plain = InstructSAMModel.from_pretrained(checkpoint).eval()
    torch.testing.assert_close(outputs(base, batch), outputs(plain, batch), atol=0, rtol=0)


def test_peft_itself_reads_the_adapter(checkpoint, model, saved, batch):
    import peft

    theirs = peft.PeftModel.from_pretrained(
        InstructSAMModel.from_pretrained(checkpoint), str(saved / ADAPTER_FOLDER)
    ).eval()
    expected = outputs(model, batch)
    torch.testing.assert_close(outputs(theirs.get_base_model(), batch), expected, atol=0, rtol=0)
    plain = outputs(InstructSAMModel.from_pretrained(checkpoint).eval(), batch)
    assert not torch.allclose(plain["masks"], expected["masks"], atol=1e-3)


def test_load_adapter_takes_either_folder_and_a_model_with_or_without_lora(checkpoint, model, saved):
    for folder, prepared in ((saved, False), (saved / ADAPTER_FOLDER, True)):
        base = InstructSAMModel.from_pretrained(checkpoint)
        if prepared:
            add_lora(base, SMALL, seed=9)
        load_adapter(base, folder)
        torch.testing.assert_close(base.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_one_dtype_in_the_files_and_none_of_it_in_the_model(model, tmp_path):
    with_adapter(model)
    for name, parameter in model.named_parameters():
        if name.startswith("detector.vision_encoder"):
            parameter.data = parameter.data.to(torch.bfloat16)
    before = describe(model)
    with pytest.raises(ValueError, match=re.escape("torch.bfloat16, torch.float32: say which dtype")):
        save_with_adapter(model, tmp_path)
    save_with_adapter(model, tmp_path, torch.bfloat16)
    assert describe(model) == before
    for path in (tmp_path / "model.safetensors", tmp_path / ADAPTER_FOLDER / WEIGHTS_FILE):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = InstructSAMModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), rounded, atol=0, rtol=0)


def test_a_model_without_lora_is_saved_plainly(checkpoint, model, saved):
    """Also over an earlier save with LoRA, whose adapter must not survive."""
    plain = InstructSAMModel.from_pretrained(checkpoint)
    assert has_adapter(saved)
    save_with_adapter(plain, saved)
    assert not has_adapter(saved)
    torch.testing.assert_close(InstructSAMModel.from_pretrained(saved).state_dict(), plain.state_dict(), atol=0, rtol=0)
    assert base_state_dict(plain).keys() == plain.state_dict().keys() == base_state_dict(model).keys()


def test_sharded_saving(model, tmp_path):
    save_with_adapter(with_adapter(model), tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = InstructSAMModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


TENSOR = f"base_model.model.{PROJECTIONS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(TENSOR), f"missing {TENSOR}"),
        (lambda tensors: tensors.update(stranger=torch.zeros(2)), "unexpected stranger"),
        (
            lambda tensors: tensors.update({TENSOR: torch.zeros(3, 128)}),
            rf"{TENSOR} is \(3, 128\) instead of \(4, 128\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(checkpoint, saved, change, message):
    path = saved / ADAPTER_FOLDER / WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load_adapter(InstructSAMModel.from_pretrained(checkpoint), saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True instead of False"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"an_option_of_the_future": True}, "an_option_of_the_future"),
        ({"r": "four"}, "not the settings of a LoRA adapter"),
    ],
)
def test_adapters_of_another_kind_are_refused(checkpoint, saved, change, message):
    path = saved / ADAPTER_FOLDER / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(InstructSAMModel.from_pretrained(checkpoint), saved)


def test_damaged_and_missing_files_are_errors(checkpoint, saved, tmp_path):
    base = InstructSAMModel.from_pretrained(checkpoint)
    weights = saved / ADAPTER_FOLDER / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
        load_adapter(base, saved)
    weights.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
        load_adapter(base, saved)
    with pytest.raises(ValueError, match="there is no adapter"):
        load_adapter(base, checkpoint)
    assert not has_lora(base)


def test_settings_that_contradict_the_models_are_errors(checkpoint, saved):
    base = InstructSAMModel.from_pretrained(checkpoint)
    add_lora(base, LoraSettings(r=8))
    with pytest.raises(ValueError, match=r"r=4.*the model has LoraSettings\(r=8"):
        load_adapter(base, saved)


# ---- merging --------------------------------------------------------------------------------------------------------


def test_merging_keeps_what_the_model_computes(model, batch):
    as_it_was = describe(model.double())
    with float64():
        plain = outputs(model, doubled(batch))
        before = outputs(with_adapter(model), doubled(batch))
        assert difference(plain["hidden"], before["hidden"]) > 1e-2
        merge_lora(model)
        for name, after in outputs(model, doubled(batch)).items():
            assert difference(after, before[name]) < CLOSE, name
    assert describe(model) == as_it_was
    assert not has_lora(model)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_lora(model)
    add_lora(model, SMALL)


def test_merging_in_bfloat16_rounds_once(model):
    model.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    with_adapter(model)
    with_adapter(exact)
    for (name, layer), (_, half) in zip(lora_layers(exact), lora_layers(model), strict=True):
        for part in ("lora_A", "lora_B"):
            getattr(layer, part)["default"].weight.data = getattr(half, part)["default"].weight.data.float()
        torch.testing.assert_close(layer.base_layer.weight.to(torch.bfloat16), half.base_layer.weight, msg=name)
    merge_lora(model)
    merge_lora(exact)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in exact.state_dict().items()}
    torch.testing.assert_close(model.state_dict(), rounded, atol=0, rtol=0)


def test_weights_that_were_frozen_before_stay_frozen_after(model):
    weight = model.get_submodule(PROJECTIONS[0]).weight
    weight.requires_grad_(False)
    add_lora(model, SMALL)
    merge_lora(model)
    assert not weight.requires_grad and model.get_submodule(PROJECTIONS[1]).weight.requires_grad


def test_a_broken_adapter_is_not_merged(model):
    with_adapter(model)
    dict(lora_layers(model))[PROJECTIONS[5]].lora_B["default"].weight.data[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{PROJECTIONS[5]}.lora_B is not finite"):
        merge_lora(model)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0, equal_nan=True)


def test_an_adapter_that_is_broken_on_the_other_side_is_not_merged_either(model):
    with_adapter(model)
    dict(lora_layers(model))[PROJECTIONS[5]].lora_A["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{PROJECTIONS[5]}.lora_A is not finite"):
        merge_lora(model)
    assert has_lora(model)


def test_save_pretrained_writes_base_and_adapter_apart(checkpoint, tmp_path):
    """As everyone calls it: the folder must load again, with the adapter in its place."""
    model = InstructSAMModel.from_pretrained(checkpoint)
    add_lora(model, LoraSettings(r=2))
    model.save_pretrained(tmp_path / "whole")
    again = InstructSAMModel.from_pretrained(tmp_path / "whole")
    assert has_lora(again)
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
