"""A new model from hub-shaped folders of Qwen3-VL and SAM 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from double_precision import CLOSE, difference, float64
from PIL import Image
from safetensors.torch import load_file, save_file

from instructsam.models.assembly import assemble
from instructsam.models.factory import build_model
from instructsam.models.layouts import FIRST_ROWS, QWEN3_VL, SAM3
from instructsam.models.modeling import InstructSAMModel

N = 5
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")


def settings(vlm: Path, detector: Path, **changes) -> dict:
    return {
        "vlm_path": str(vlm),
        "detector_path": str(detector),
        "config": {"num_queries": N, "query_init": "normal"},
        "max_length": 512,
        **changes,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_comes_from_its_place(request, kind):
    prefix = "sharded_" if kind == "sharded" else ""
    vlm, detector = (request.getfixturevalue(f"{prefix}{name}") for name in ("qwen3_vl_dir", "sam3_dir"))
    model, _ = build_model(settings(vlm, detector))
    report, state = model.load_report, model.state_dict()
    assert {*report.loaded, *report.new} == set(state) and not {*report.loaded} & {*report.new}
    assert {name.split(".")[0] for name in report.new} == {"query_bank", "query_projector", "phrase_projector"}
    assert set(report.cut) == set(FIRST_ROWS)
    stored = {
        layout.to_ours(name): tensor
        for folder, layout in ((vlm, QWEN3_VL), (detector, SAM3))
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for name in report.loaded:
        expected = stored[name][:N] if name in FIRST_ROWS else stored[name]
        assert torch.equal(state[name], expected) and state[name].dtype == expected.dtype, name


def test_the_parts_compute_what_they_did(qwen3_vl_dir, sam3_dir):
    """The language model and SAM 3's vision encoder, against transformers' own loading of the same folders."""
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoModel

    model, _ = build_model(settings(qwen3_vl_dir, sam3_dir, dtype="float32"))
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(qwen3_vl_dir, dtype=torch.float32).eval()
    sam3 = Sam3VideoModel.from_pretrained(sam3_dir, dtype=torch.float32).eval().detector_model
    for one in (model, vlm, sam3):
        one.double()
    ids = torch.arange(10, 30)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), float64():
        pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        hidden = model.run_language_model(ids, mask, None, None).hidden_BLC
        assert difference(model.lm_logits(hidden), vlm(input_ids=ids).logits) < CLOSE
        ours, theirs = model.detector.encode_image(pixels), sam3.vision_encoder(pixels)
    for left, right in zip(ours.maps, theirs.fpn_hidden_states, strict=False):
        assert difference(left, right) < CLOSE


def test_special_tokens_get_their_rows_without_resizing(qwen3_vl_dir, sam3_dir):
    model, processor = build_model(settings(qwen3_vl_dir, sam3_dir))
    ids = [model.config.token_ids[name] for name in ("region", "seg", "mask_start", "mask_end")]
    assert ids == list(range(ids[0], ids[0] + 4))
    rows = json.loads((qwen3_vl_dir / "config.json").read_text())["text_config"]["vocab_size"]
    assert model.get_input_embeddings().weight.shape[0] == rows > ids[-1]
    assert processor.chat.token_ids == model.config.token_ids
    assert processor.vlm_image.patch_size == 8 and processor.vlm_image.max_pixels == 256 * 256


@pytest.mark.slow
def test_new_tensors_hang_on_the_seed_alone(qwen3_vl_dir, sam3_dir):
    def projector(seed: int) -> torch.Tensor:
        torch.rand(3)
        return build_model(settings(qwen3_vl_dir, sam3_dir), seed)[0].query_projector[0].weight

    assert torch.equal(projector(1), projector(1)) and not torch.equal(projector(1), projector(2))
    assert 0.015 < projector(1).std() < 0.025


def test_dtype_and_presence_token(qwen3_vl_dir, sam3_dir):
    config = {"num_queries": N, "presence_token": True}
    model, _ = build_model(settings(qwen3_vl_dir, sam3_dir, dtype="bfloat16", config=config))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "detector.detr_decoder.presence_token.weight" in model.load_report.loaded


@pytest.mark.slow
@pytest.mark.parametrize("query_mode", ["replace", "add"])
@pytest.mark.parametrize("presence_token", [False, True])
def test_every_trainable_tensor_gets_a_gradient(qwen3_vl_dir, sam3_dir, query_mode, presence_token):
    """In the structure of the real parts, whose pixel decoder has a stage too many: DDP waits for unused parameters."""
    config = {"num_queries": N, "query_init": "normal", "query_mode": query_mode, "presence_token": presence_token}
    model, processor = build_model(settings(qwen3_vl_dir, sam3_dir, dtype="float32", config=config))
    item = processor.encode_image(Image.new("RGB", (96, 96), "red"))
    chat = processor.encode_chat(item["image_grid_thw"], [("all of them", ["red squares", "stars"])])
    batch = processor.collate([{**item, "input_ids": chat.input_ids}])
    output = model.train()(*(batch[name] for name in INPUTS)).detections
    parts = [output.pred_masks, output.pred_logits, output.pred_boxes, output.presence_logits]
    sum(part.square().mean() for part in parts if part is not None).backward()
    assert not {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    }


def test_the_assembled_model_saves_and_loads(qwen3_vl_dir, sam3_dir, tmp_path):
    model, processor = build_model(settings(qwen3_vl_dir, sam3_dir, dtype="float32"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = InstructSAMModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def change_config(source: Path, target: Path, **values) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def test_what_does_not_fit_is_named(qwen3_vl_dir, sam3_dir, tmp_path):
    with pytest.raises(ValueError, match=r"query_embed.weight \[12, 32\] instead of \[13, 32\]"):
        build_model(settings(qwen3_vl_dir, sam3_dir, config={"num_queries": 13}))
    with pytest.raises(ValueError, match="describes a 'sam3_video' model, not a Qwen3-VL"):
        build_model(settings(sam3_dir, sam3_dir))
    with pytest.raises(ValueError, match="describes a 'qwen3_vl' model, not a SAM 3"):
        build_model(settings(qwen3_vl_dir, qwen3_vl_dir))
    with pytest.raises(ValueError, match="has no detector_config"):
        build_model(settings(qwen3_vl_dir, change_config(sam3_dir, tmp_path / "a", detector_config=None)))
    shutil.copytree(sam3_dir, tmp_path / "b")
    drop(tmp_path / "b", "detector_model.detr_encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(ValueError, match=r"1 missing: detector_model\.detr_encoder\.layers\.0\.mlp\.fc1\.weight"):
        build_model(settings(qwen3_vl_dir, tmp_path / "b"))


def test_one_source_holds_a_tensor(qwen3_vl_dir, sam3_dir):
    """A tensor that two sources hold cannot be told apart; here both are the same folder."""
    from instructsam.models.loading import TensorFolder, empty_model, fill

    model, _ = build_model(settings(qwen3_vl_dir, sam3_dir))
    twice = [(TensorFolder(qwen3_vl_dir), QWEN3_VL)] * 2 + [(TensorFolder(sam3_dir), SAM3)]
    with pytest.raises(ValueError, match="there twice: model.language_model"):
        fill(empty_model(InstructSAMModel, model.config), twice, may_be_new=("query", "phrase"), first_rows=FIRST_ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detector_path": None}, "vlm_path with model.detector_path"),
        ({"checkpoint": "somewhere"}, "exactly one of them, not checkpoint, vlm_path"),
        ({"learning_rate": 1}, "unknown model settings learning_rate"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_settings_that_make_no_sense(qwen3_vl_dir, sam3_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(settings(qwen3_vl_dir, sam3_dir, **changes))


def test_assemble_needs_no_processor(qwen3_vl_dir, sam3_dir):
    model, report = assemble(qwen3_vl_dir, sam3_dir, {}, {"num_queries": 3})
    assert model.query_bank.weight.abs().max() == 0  # zeros, as the release starts
    assert "newly initialised: 9" in str(report) and "tracker_model.* " in str(report)
