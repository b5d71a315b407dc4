"""The released layout in and out: bit for bit, strict, and in every shape that a folder of it can have."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from golden_model import load_golden
from safetensors.torch import load_file, save_file

from instructsam.models.factory import load_processor
from instructsam.models.loading import TensorFolder
from instructsam.models.modeling import InstructSAMModel
from instructsam.models.released import export_released, is_released
from instructsam.processing.pretrained import CONFIG_NAME

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"


def contents(folder: Path) -> dict[str, torch.Tensor]:
    tensors = TensorFolder(folder)
    return tensors.read(dict.fromkeys(tensors), None)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The fixture's weights, which the released code wrote, as a folder in bfloat16 as the release is."""
    golden = Path(__file__).parents[1] / "golden" / "a"
    folder = tmp_path_factory.mktemp("released")
    model, _, _ = load_golden(golden)
    export_released(model.bfloat16(), folder)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(golden / "weights.safetensors").items()}
    assert same(contents(folder), stored), "the export is not what the released code writes"
    return folder


def edit(source: Path, target: Path, change) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS)
    return target


@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_round_trip_is_bit_identical(released, tmp_path, shards):
    model = InstructSAMModel.from_pretrained(released)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    export_released(InstructSAMModel.from_pretrained(tmp_path / "ours"), tmp_path / "again", max_shard_size=shards)
    assert (tmp_path / "again" / "model.safetensors.index.json").exists() == (shards == "200KB")
    assert same(contents(released), contents(tmp_path / "again"))
    again = InstructSAMModel.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    noted_by_saving = {"architectures": None, "dtype": None}
    assert {**again.config.to_dict(), **noted_by_saving} == {**model.config.to_dict(), **noted_by_saving}
    assert same(model.state_dict(), again.state_dict())


def test_loading_says_which_layout_it_saw(released, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "instructsam"):
        model = InstructSAMModel.from_pretrained(released)
        model.save_pretrained(tmp_path)
        ours = InstructSAMModel.from_pretrained(tmp_path)
    assert model.load_report.layout == "released InstructSAM" and ours.load_report.layout == "InstructSAM"
    assert len(model.load_report.loaded) == len(model.state_dict()) == len(ours.load_report.loaded)
    assert [record.levelname for record in caplog.records if "layout, read from" in record.message] == [
        "WARNING", "INFO",
    ]  # fmt: skip


def test_the_loaded_model_is_whole(released):
    """Buffers, frozen flags and outputs, not only tensors: against a model built the ordinary way."""
    expected, _, tensors = load_golden(Path(__file__).parents[1] / "golden" / "a")
    model = InstructSAMModel.from_pretrained(released, dtype=torch.float32)
    buffers, wanted = dict(model.named_buffers()), dict(expected.named_buffers())
    assert same(buffers, wanted) and not model.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in expected.named_parameters()}
    expected.load_state_dict(model.state_dict())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
    with torch.no_grad():
        left, right = (m(*(tensors[name] for name in names)).detections for m in (model, expected))
    assert torch.equal(left.pred_masks, right.pred_masks) and torch.equal(left.pred_logits, right.pred_logits)


def test_both_layouts_are_the_same_model_in_half_precision(released, tmp_path):
    """transformers' loading rounds SAM 3's position tables with the weights; both ways must keep them exact."""
    left = InstructSAMModel.from_pretrained(released)
    left.save_pretrained(tmp_path)
    right = InstructSAMModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in right.parameters()} == {torch.bfloat16}
    assert same(dict(left.named_buffers()), dict(right.named_buffers()))
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = zip(left.detector.encode_image(pixels).maps, right.detector.encode_image(pixels).maps, strict=True)
    assert all(torch.equal(*pair) for pair in maps)


def test_dtype_and_attention_are_honoured(released):
    model = InstructSAMModel.from_pretrained(released, dtype="float16", attn_implementation="flex_attention")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.vlm.language_model.config._attn_implementation == "flex_attention"
    assert (
        InstructSAMModel.from_pretrained(released, torch_dtype=torch.float32, trust_remote_code=True).dtype
        == torch.float32
    )
    with pytest.raises(ValueError, match="quantization_config cannot be used with the released layout"):
        InstructSAMModel.from_pretrained(released, quantization_config={})
    with pytest.raises(ValueError, match="attn_implementation='eager' is not one of sdpa, flex_attention"):
        InstructSAMModel.from_pretrained(released, attn_implementation="eager")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.mask_hidden_fcs.0.2.bias"), r"1 missing: model\.mask_hidden_fcs\.0\.2\.bias"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), r"1 unexpected: model\.extra\.weight"),
        (
            lambda t: t.update({"model.text_hidden_fcs.0.0.bias": torch.zeros(3)}),
            r"1 of another shape: model\.text_hidden_fcs\.0\.0\.bias \[3\] instead of \[\d+\]",
        ),
        (lambda t: t.update({"model.mask_queries": torch.zeros(1, 2)}), "of another shape: .*mask_queries|query_embed"),
    ],
)
def test_a_wrong_tensor_is_named(released, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        InstructSAMModel.from_pretrained(edit(released, tmp_path / "wrong", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("query_projector.2.bias"), r"1 missing: query_projector\.2\.bias"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), r"1 unexpected: extra\.weight"),
        (lambda t: t.update({"query_bank.weight": torch.zeros(3, 5)}), r"1 mismatched: query_bank\.weight"),
    ],
)
def test_a_wrong_tensor_of_our_own_layout_is_named(released, tmp_path, change, message):
    InstructSAMModel.from_pretrained(released).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        InstructSAMModel.from_pretrained(edit(tmp_path / "ours", tmp_path / "wrong", change))


@pytest.mark.parametrize("layout", ["released", "ours"])
@pytest.mark.parametrize("keep", [0.9, 0.001])
def test_a_truncated_file_says_so(released, tmp_path, layout, keep):
    folder = tmp_path / "cut"
    if layout == "released":
        shutil.copytree(released, folder)
    else:
        InstructSAMModel.from_pretrained(released).save_pretrained(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="truncated"):
        InstructSAMModel.from_pretrained(folder)


def test_pickles_are_never_read(released, tmp_path):
    shutil.copytree(released, tmp_path / "pickled")
    tensors = load_file(tmp_path / "pickled" / WEIGHTS)
    (tmp_path / "pickled" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        InstructSAMModel.from_pretrained(tmp_path / "pickled")


def test_a_config_that_knows_nothing_of_us(released, tmp_path):
    """As the release's own may be: N then comes from the tensors, and SAM 3's full size does not fit a tiny model."""
    shutil.copytree(released, tmp_path / "bare")
    values = json.loads((released / "config.json").read_text())
    del values["instructsam"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"of another shape: model\.grounding_model"):
        InstructSAMModel.from_pretrained(tmp_path / "bare")
    config = InstructSAMModel.from_pretrained(released).config
    model = InstructSAMModel.from_pretrained(tmp_path / "bare", config=config)
    assert same(model.state_dict(), InstructSAMModel.from_pretrained(released).state_dict())


def test_names_of_tensors_tell_more_than_the_configuration(released, tmp_path):
    """Nobody here knows what the release calls itself: it may be the name that ours has."""
    shutil.copytree(released, tmp_path / "named")
    values = json.loads((released / "config.json").read_text())
    values["text_config"]["tie_word_embeddings"] = values.pop("tie_word_embeddings")
    (tmp_path / "named" / "config.json").write_text(json.dumps({**values, "model_type": "instructsam"}))
    model = InstructSAMModel.from_pretrained(tmp_path / "named")
    assert model.load_report.layout == "released InstructSAM" and model.lm_head is None


def test_another_model_is_refused(qwen3_vl_dir, tmp_path):
    assert not is_released(qwen3_vl_dir)
    with pytest.raises(ValueError, match="holds a 'qwen3_vl' model"):
        InstructSAMModel.from_pretrained(qwen3_vl_dir)
    with pytest.raises(ValueError, match=r"nowhere"):
        InstructSAMModel.from_pretrained(tmp_path / "nowhere")


def test_a_processor_for_the_released_layout(checkpoint, tmp_path):
    """From tokenizer and preprocessor files alone, as the release has them."""
    from instructsam.export import export

    export(checkpoint, tmp_path / "released")
    assert not (tmp_path / "released" / CONFIG_NAME).exists()
    config = InstructSAMModel.from_pretrained(tmp_path / "released").config
    mine, own = load_processor(tmp_path / "released", config), load_processor(checkpoint, config)
    assert mine.chat.token_ids == own.chat.token_ids and mine.vlm_image == own.vlm_image
    assert mine.mask_size == own.mask_size and mine.detector_image == own.detector_image


def test_large_photographs_leave_room_for_words(checkpoint, tmp_path):
    """Qwen's own pixel limit is twice the recipe's 8,192 visual tokens."""
    from instructsam.export import export

    export(checkpoint, tmp_path / "released")
    path = tmp_path / "released" / "preprocessor_config.json"
    size = {"shortest_edge": 4096, "longest_edge": 1 << 24}
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": size}))
    processor = load_processor(tmp_path / "released", InstructSAMModel.from_pretrained(tmp_path / "released").config)
    assert processor.vlm_image.max_pixels == 8192 * processor.vlm_image.factor**2
