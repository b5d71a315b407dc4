"""The recipe as a user runs it, on hub-shaped tiny folders: stage 1 → merge → stage 2 → evaluate → export → reload."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch

from instructsam.models.loading import TensorFolder
from instructsam.models.modeling import InstructSAMModel

SMALL = ["trainer.epochs=null", "trainer.max_steps=3", "trainer.num_workers=0", "trainer.log_every=1",
         "model.config.num_queries=6", "model.lora.r=4", "model.max_length=2048", "model.vlm_image.min_pixels=4096",
         "model.vlm_image.max_pixels=65536", "optim.groups.vlm.lr=1e-3", "optim.groups.detector.lr=1e-3",
         "data.turns_per_image=4"]  # fmt: skip


def run(*command: str) -> str:
    result = forked.run(["-m", *command])
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def fails(*command: str) -> str:
    result = forked.run(["-m", *command])
    assert result.returncode != 0
    return result.stderr


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = TensorFolder(folder)
    return found.read(dict.fromkeys(found), None)


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_whole_chain(world, sharded_qwen3_vl_dir, sam3_dir, tmp_path):
    one, two = tmp_path / "stage1", tmp_path / "stage2"
    data = ("data=tiny_world", f"data.root={world}")
    said = run(
        "instructsam.train", "experiment=stage1", f"model.vlm_path={sharded_qwen3_vl_dir}",
        f"model.detector_path={sam3_dir}", *data, f"output_dir={one}", *SMALL,
    )  # fmt: skip
    assert "Qwen3-VL + SAM 3 layout" in said and "newly initialised: 9" in said
    report = json.loads((one / "load_report.json").read_text())
    assert len(report["new"]) == 9 and "detector.detr_decoder.query_embed.weight" in report["cut"]
    assert [record["step"] for record in losses(one)] == [1, 2, 3]
    assert set(losses(one)[0]["lr"]) == {"vlm", "detector"}
    assert (one / "checkpoint" / "adapter" / "adapter_model.safetensors").exists()

    # What trained has moved, what the recipe freezes has not, and the file has one precision.
    before, after = tensors(sharded_qwen3_vl_dir), tensors(one / "checkpoint")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    embeddings = "language_model.embed_tokens.weight"
    assert not torch.equal(before[f"model.{embeddings}"], after[f"vlm.{embeddings}"])
    frozen = "language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[f"model.{frozen}"], after[f"vlm.{frozen}"])

    unmerged = fails("instructsam.train", "experiment=stage2", f"model.checkpoint={one}/checkpoint", *data, *SMALL)
    assert f"python -m instructsam.merge {one}/checkpoint" in unmerged
    assert "merge" in fails("instructsam.export", f"{one}/checkpoint", f"{tmp_path}/no")
    assert not (tmp_path / "no").exists()

    run("instructsam.merge", f"{one}/checkpoint", f"{one}/merged")
    merged = tensors(one / "merged")
    assert not torch.equal(merged[f"vlm.{frozen}"], after[f"vlm.{frozen}"])

    run("instructsam.train", "experiment=stage2", f"model.checkpoint={one}/merged", *data, f"output_dir={two}", *SMALL)
    assert len(losses(two)) == 3
    run("instructsam.merge", f"{two}/checkpoint", f"{two}/merged")

    options = ["benchmark.split=val", f"benchmark.root={world}", "limit=6", "query_reliance=false", "max_new_tokens=12"]
    evaluated = run("instructsam.evaluate", f"checkpoint={two}/merged", *options)
    assert "all" in evaluated
    assert json.loads((two / "merged" / "eval" / "metrics.json").read_text())["settings"]["decoding"] == "trained"

    said = run(
        "instructsam.export", f"{two}/merged", f"{tmp_path}/released", "--max-shard-size", "200KB",
        "--report", f"{tmp_path}/keys.json",
    )  # fmt: skip
    assert "in the released layout" in said
    released = tensors(tmp_path / "released")
    assert "model.mask_queries" in released
    assert len(json.loads((tmp_path / "keys.json").read_text())["loaded"]) == len(released)
    run("instructsam.export", f"{tmp_path}/released", f"{tmp_path}/back", "--layout", "instructsam")
    left, right = tensors(two / "merged"), tensors(tmp_path / "back")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    for folder in (two / "checkpoint", two / "merged", tmp_path / "released"):  # for a group that shares a disk
        modes = {path.stat().st_mode for pattern in ("*.safetensors", "config.json") for path in folder.glob(pattern)}
        assert len(modes) == 1, folder

    reloaded = InstructSAMModel.from_pretrained(tmp_path / "released")
    assert reloaded.load_report.layout == "released InstructSAM"
    run("instructsam.evaluate", f"checkpoint={tmp_path}/released", *options, "decoding=released")
    settings = json.loads((tmp_path / "released" / "eval" / "metrics.json").read_text())["settings"]
    assert settings["decoding"] == "released"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_the_real_structure(world, qwen3_vl_dir, sam3_dir, tmp_path):
    """DDP waits for every trainable tensor: in step 2 at the latest, a tensor without gradient ends the run."""
    command = [
        "-m", "instructsam.train", "experiment=stage1", f"model.vlm_path={qwen3_vl_dir}",
        f"model.detector_path={sam3_dir}",
        "data=tiny_world", f"data.root={world}", f"output_dir={tmp_path / 'two'}", *SMALL,
    ]  # fmt: skip
    result = forked.run(command, processes=2, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Qwen3-VL + SAM 3 layout") == 1  # said once, not by every process
    assert [record["step"] for record in losses(tmp_path / "two")] == [1, 2, 3]


@pytest.mark.multiprocess
def test_an_export_never_overwrites(checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    assert "not an empty folder" in fails("instructsam.export", str(checkpoint), f"{tmp_path}/there")
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
