"""scripts/smoke_full_size.py in its tiny mode, and the checks that make it fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def smoke():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import smoke_full_size
    finally:
        sys.path.remove(str(SCRIPTS))
    return smoke_full_size


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """Neither square nor a multiple of anything."""
    path = tmp_path_factory.mktemp("smoke") / "picture.png"
    Image.effect_noise((203, 131), 60).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def predictor(smoke):
    return smoke.build(True, None, ["segment the woman"], torch.bfloat16)


@pytest.mark.slow
def test_tiny_run(smoke, picture, tmp_path, capsys):
    file = tmp_path / "figures" / "smoke.json"
    arguments = [str(picture), "--tiny", "--device", "cpu", "--phrase", "the woman", "--phrase", "flags"]
    smoke.main([*arguments, "--runs", "2", "--max-new-tokens", "3", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["dtype"] == "bfloat16" and report["runs"] == 2 and report["machine"]["gpu"] is None
    assert report["picture"]["size"] == [203, 131] and report["picture"]["phrases"] == ["the woman", "flags"]
    # 203 x 131 is grown to 65,536 pixels in steps of 16: 320 x 208
    assert report["picture"]["tokens"] == 20 * 13 and report["picture"]["detector pixels"] == 96
    parameters = report["parameters"]
    parts = [count for name, count in parameters.items() if name != "all" and not name.startswith(" ")]
    assert min(parts) > 0 and sum(parts) == parameters["all"] and report["weights"] == 2 * parameters["all"]
    seconds = report["single pass"]
    wanted = {"preprocessing", "VLM's vision tower", "language model, whole sequence", "detector's vision encoder"}
    assert wanted | {"detector: fusion, decoder, masks", "post-processing", "the rest", "all"} == set(seconds)
    assert all(math.isfinite(value) and value > 0 for value in seconds.values())
    assert max(seconds.values()) == seconds["all"]
    assert report["decoding"]["tokens"] == 3 and report["decoding"]["per token"] > 0
    assert report["memory"]["before"] <= report["memory"]["after building"] <= report["memory"]["after segmenting"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*parameters, *seconds, "tokens a second", "peak memory"])


@pytest.mark.multiprocess
def test_the_script_runs_by_itself(picture):
    command = [sys.executable, str(SCRIPTS / "smoke_full_size.py"), str(picture), "--tiny", "--device", "cpu"]
    result = subprocess.run([*command, "--dtype", "float16"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "float16" in result.stdout and "trained in stage 1" in result.stdout


@pytest.mark.gpu
def test_tiny_run_on_a_gpu(smoke, picture):
    report = smoke.main([str(picture), "--tiny"])
    assert report["machine"]["gpu"] and report["runs"] == 5
    assert report["memory"]["on the GPU"] >= report["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jpg"], "nothing.jpg: no such image file"),
        (["--dtype", "float8"], "dtype='float8' is not one of"),
        (["--dtype", "auto"], "name a dtype"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--tokenizer", "no/such/folder"], "no/such/folder: no tokenizer folder there"),
    ],
)
def test_bad_input_is_named(smoke, picture, arguments, message):
    image = [] if arguments == ["nothing.jpg"] else [str(picture)]
    with pytest.raises(SystemExit, match=message):
        smoke.main([*image, *arguments, "--tiny", "--device", "cpu"])


def test_without_matplotlib_a_picture_is_asked_for(smoke, monkeypatch):
    monkeypatch.setattr(smoke.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="name a picture"):
        smoke.main(["--tiny", "--device", "cpu"])


def test_qwens_own_kind_of_tokenizer(smoke, picture, qwen3_vl_dir):
    """A hub-shaped folder whose tokenizer lacks our four tokens."""
    report = smoke.main([str(picture), "--tiny", "--device", "cpu", "--tokenizer", str(qwen3_vl_dir)])
    assert report["parameters"]["all"] > 0


def test_a_float32_copy_is_noticed(smoke, predictor):
    model = predictor.model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    smoke.check_build(model, torch.bfloat16, 10**9, 10**9 + weights)
    with pytest.raises(RuntimeError, match="building took"):
        smoke.check_build(model, torch.bfloat16, 10**9, 10**9 + weights + 2**29)


@pytest.mark.slow
def test_wrong_precision_is_noticed(smoke):
    model = smoke.build(True, None, ["segment the woman"], torch.bfloat16).model
    with pytest.raises(RuntimeError, match="not in the right precision, first"):
        smoke.check_build(model, torch.float16, 0, 0)
    model.vlm.language_model.rotary_emb.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"2 tensors .*rotary_emb.inv_freq"):
        smoke.check_build(model, torch.bfloat16, 0, 0)


def test_outputs_that_are_not_finite_are_noticed(smoke, picture, capsys):
    build = smoke.build

    def broken(*args):
        predictor = build(*args)
        predictor.model.detector.mask_decoder.instance_projection.bias.data.fill_(torch.nan)
        return predictor

    smoke.build = broken
    try:
        with pytest.raises(SystemExit, match="not finite"):
            smoke.main([str(picture), "--tiny", "--device", "cpu"])
    finally:
        smoke.build = build


@pytest.mark.slow
def test_what_the_first_stage_trains(smoke, predictor):
    """Counted without peft as peft and the training code make it."""
    pytest.importorskip("peft")
    from instructsam.models.lora import LoraSettings, add_lora
    from instructsam.training.optim import OptimConfig, select_parameters

    counted = smoke.stage1_parameters(predictor.model)
    model = smoke.build(True, None, ["segment the woman"], torch.bfloat16).model
    add_lora(model, LoraSettings())
    recipe = smoke.OmegaConf.to_container(smoke.OmegaConf.load(f"{smoke.CONFIGS}/optim/stage1.yaml"))
    select_parameters(torch.nn.ModuleDict({"model": model}), OptimConfig(**recipe))
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(counted.values()) == sum(trained.values())
    assert {name for name in counted if not name.endswith(".lora")} == {name for name in trained if "lora_" not in name}


def test_full_size_counts(smoke):
    """The full-size model on the meta device has the released checkpoint's number of parameters, part by part."""
    model = smoke.empty_model(smoke.InstructSAMModel, smoke.full_size_config())
    parameters = smoke.count_parameters(model)
    assert parameters["VLM: language model"] == 1_720_574_976
    assert parameters["VLM: vision tower"] == 406_957_056
    assert parameters["detector: vision encoder"] == 454_038_784
    assert parameters["all"] == 2_623_726_397
