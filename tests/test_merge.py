"""`python -m instructsam.merge`: an ordinary checkpoint comes out, whole or not at all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from double_precision import CLOSE, float64

from instructsam import InstructSAM
from instructsam import merge as merge_command
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.models.lora import LoraSettings, add_lora, has_adapter, save_with_adapter
from instructsam.models.modeling import InstructSAMModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint whose adapter changes what the model says."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    model = InstructSAMModel.from_pretrained(checkpoint)
    add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_with_adapter(model, folder)
    return folder


def segment(folder: Path, world: Path) -> list:
    sample = read_coco_instructions(world, "val")[0]
    result = InstructSAM.from_pretrained(folder, "cpu").segment(
        sample.image, phrases=["red circles", "stars"], threshold=0.0
    )
    return result.prediction.instances


@float64()
def test_merged_folder_predicts_the_same_without_peft(checkpoint, trained, world, tmp_path, monkeypatch, capsys):
    merge_command.main([str(trained), str(tmp_path / "deep" / "merged")])
    merged = tmp_path / "deep" / "merged"
    assert capsys.readouterr().out.strip().endswith(f"written: {merged}")
    assert sorted(path.name for path in merged.parent.iterdir()) == ["merged"]
    assert not has_adapter(merged)
    assert {path.name for path in merged.iterdir()} == {path.name for path in checkpoint.iterdir()}
    expected, plain = segment(trained, world), segment(checkpoint, world)
    monkeypatch.setitem(sys.modules, "peft", None)
    found = segment(merged, world)
    assert len(found) == len(expected) == 12
    for a, b in zip(found, expected, strict=True):
        assert a.score == pytest.approx(b.score, rel=CLOSE) and a.box == pytest.approx(b.box, rel=CLOSE)
        assert a.rle == b.rle
    assert max(abs(a.score - b.score) for a, b in zip(plain, expected, strict=True)) > 1e-3


def test_the_dtype_stays(trained, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(trained, half)
    save_with_adapter(InstructSAMModel.from_pretrained(trained), half, torch.bfloat16)
    model = InstructSAMModel.from_pretrained(merge_command.merge(half, tmp_path / "merged"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_empty_output_folder_is_fine(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (merge_command.merge(trained, tmp_path / "empty") / "config.json").exists()


@pytest.mark.parametrize(
    ("checkpoint_name", "output_name", "message"),
    [
        ("trained", "trained", "is not an empty folder"),
        ("plain", "new", "holds no adapter, so there is nothing to merge"),
        ("nowhere", "new", "InstructSAM: no folder"),
        ("trained", "letters", "is not an empty folder"),
        ("damaged", "new", "missing base_model.model.vlm"),
    ],
)
def test_refusals(checkpoint_name, output_name, message, checkpoint, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear sir")
    shutil.copytree(trained, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)
    names = {"trained": trained, "plain": checkpoint}
    arguments = [str(names.get(name, tmp_path / name)) for name in (checkpoint_name, output_name)]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        merge_command.main(arguments)
    assert str(caught.value).startswith("error: ") and message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_in_the_middle_leaves_nothing(trained, tmp_path, monkeypatch):
    from instructsam.processing.processor import InstructSAMProcessor

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(InstructSAMProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        merge_command.merge(trained, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
