"""The same training on one process and on two, under every engine: real processes, real commands, the tiny model.

All in float64: there the order of sums is no matter on any processor, and what differs by more than `CLOSE` is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
import yaml
from double_precision import CLOSE
from safetensors.torch import load_file
from tiny_fixtures import SHALLOW

from instructsam.training.engines import start_engine

REPOSITORY = Path(__file__).parents[2]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = [
    "trainer.max_steps=4",
    "trainer.checkpoint_every=2",
    "trainer.eval_every=4",
    "evaluation.num_instructions=2",
    "evaluation.max_new_tokens=6",
    "data.turns_per_image=2",
    "evaluation.gallery_rows=1",
]
LAST = "step_000004"
NAMED = {"zero1": "1", "zero2": "2", "zero3": "3"}

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def environment(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/ENGINE.yaml` sets, for two processes on a CPU."""
    settings = yaml.safe_load((REPOSITORY / f"configs/accelerate/{engine}.yaml").read_text()) if engine else {}
    if engine in NAMED:
        zero = settings["deepspeed_config"]
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero["zero_stage"]),
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(zero["gradient_accumulation_steps"]),
        }
    if engine == "fsdp2":
        variables = {"ACCELERATE_USE_FSDP": "true"}
        for name, value in settings["fsdp_config"].items():
            variables[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
        return variables
    return {"ACCELERATE_USE_CPU": "true"}


def under(engine: str, module: str) -> list[str]:
    """What runs a module in float64 under this engine on a CPU."""
    runner = ["fsdp_on_cpu"] if engine == "fsdp2" else ["zero_on_cpu"] if engine in NAMED else []
    return ["-m", "double_precision", *runner, module]


def train(output: Path, data: Path, *overrides: str, engine: str = "", processes: int = 1) -> str:
    """Train the tiny model from scratch, in float64; returns what it printed."""
    command = [*under(engine, "instructsam.train"), "experiment=tiny_stage2", f"data.root={data}"]
    command += ["model.checkpoint=null", f"model.tokenizer={data}/tokenizer", "optim.freeze=[embed_tokens]"]
    command += SHALLOW
    command += [f"output_dir={output}", "trainer.log_every=1", *overrides]
    result = forked.run(command, processes, **environment(engine))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def losses(folder: Path, what: str = "loss") -> list[float]:
    return [json.loads(line)[what] for line in (folder / "losses.jsonl").read_text().splitlines()]


def norms(folder: Path) -> list[float]:
    """Before clipping: losses under Adam do not tell gradients that are too large by a factor."""
    return losses(folder, "grad_norm")


def gradient(folder: Path) -> torch.Tensor:
    """Of the first step, of all parameters: a tenth of it is the first moment then."""
    state = load_file(folder / "checkpoints/step_000001/optimizer.safetensors")
    names = sorted(name for name in state if name.startswith("exp_avg/"))
    assert len(names) > 300
    return torch.cat([state[name].flatten() for name in names]).double() * 10


def evaluation(folder: Path) -> dict[str, float]:
    return json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["metrics"]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "checkpoint/model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=CLOSE)


def one_rank_without_masks(world: Path, folder: Path) -> Path:
    """Four pictures: two with no-target instructions only, which are the first of a step that is sorted by masks."""
    shutil.copytree(world, folder)
    path = folder / "train" / "instructions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pictures = sorted({line["image_id"] for line in lines})
    without, with_masks = set(pictures[:2]), set(pictures[2:4])

    def kept(line: dict) -> bool:
        has = any(phrase["annotation_ids"] for phrase in line["phrases"])
        return line["image_id"] in (with_masks if has else without)

    path.write_text("".join(json.dumps(line) + "\n" for line in lines if kept(line)))
    return folder


@pytest.mark.parametrize("masks", ["in every batch", "on one rank only"])
def test_gradients_do_not_depend_on_the_split(world, tmp_path, masks):
    """1 x batch 4, 2 x batch 2, 2 x batch 1 x accumulation 2: the same gradient, and the same two steps."""
    settings = [
        "trainer.max_steps=2",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=0",
        "trainer.clip_norm=0",
        "data.turns_per_image=3",
    ]
    data = world
    if masks == "on one rank only":
        data = one_rank_without_masks(world, tmp_path / "world")
        settings += ["data.group_by=masks"]
    one, two, four = tmp_path / "one", tmp_path / "two", tmp_path / "four"
    train(one, data, *settings, "trainer.per_device_batch_size=4")
    train(two, data, *settings, "trainer.per_device_batch_size=2", engine="ddp", processes=2)
    accumulated = ["trainer.per_device_batch_size=1", "trainer.accumulation=2"]
    train(four, data, *settings, *accumulated, engine="ddp", processes=2)
    whole = gradient(one)
    for split in (two, four):
        assert (gradient(split) - whole).norm() < CLOSE * whole.norm()
        assert losses(split) == pytest.approx(losses(one), rel=CLOSE)
        assert norms(split) == pytest.approx(norms(one), rel=CLOSE)
        assert_same_weights(split, one)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "ddp"
    settings = [*STEPS, "trainer.per_device_batch_size=1", "trainer.accumulation=2"]
    train(folder, world, *settings, engine="ddp", processes=2)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_save_and_resume(world, tmp_path, reference, engine):
    """Four steps on 2 processes are those of DDP. Then from step 2 again, in other processes: the same bytes."""
    if engine in NAMED and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    settings = [*STEPS, "trainer.per_device_batch_size=1", "trainer.accumulation=2"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    if engine == "ddp":
        shutil.copytree(reference, whole)
    else:
        said = train(whole, world, *settings, engine=engine, processes=2)
        assert f"engine {engine}" in said and "2 processes" in said
        assert losses(whole) == pytest.approx(losses(reference), rel=CLOSE)
        assert norms(whole) == pytest.approx(norms(reference), rel=CLOSE)
        assert evaluation(whole).keys() == evaluation(reference).keys() and "giou" in evaluation(whole)
        assert_same_weights(whole, reference)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / LAST)
    assert "resuming from" in train(again, world, *settings, engine=engine, processes=2)
    for name in ("losses.jsonl", "checkpoint/model.safetensors"):  # the losses do not tell what the last step did
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_goes_on_with_another_engine_and_number_of_processes(world, tmp_path, reference):
    """From step 2 of 2 processes under DDP to one alone, from the same sample on."""
    shutil.copytree(reference, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / LAST)
    said = train(tmp_path / "one", world, *STEPS, "trainer.per_device_batch_size=4")
    assert "resuming from" in said
    assert losses(tmp_path / "one") == pytest.approx(losses(reference), rel=CLOSE)
    assert_same_weights(tmp_path / "one", reference)
    state = json.loads((tmp_path / "one" / "checkpoints" / LAST / "state.json").read_text())
    assert state["processes"] == 1 and state["sampler"]["samples"] == 16


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, engine):
    """DeepSpeed clips and moves in one go: it must do neither, and the steps after it are those of DDP."""
    pytest.importorskip("deepspeed")
    settings = json.dumps({"per_device_batch_size": 2, "nonfinite": "skip"})
    for name in (engine, "ddp"):
        command = [*under(name, "multiprocess_toy"), tmp_path / name, "--settings", settings, "--bad-index", 7]
        result = forked.run(command, processes=2, **environment(name))
        assert result.returncode == 0, result.stderr[-3000:]
    found, expected = losses(tmp_path / engine), losses(tmp_path / "ddp")
    assert [loss is None for loss in found] == [loss is None for loss in expected] and None in found[:4]
    assert [x for x in found if x is not None] == pytest.approx([x for x in expected if x is not None], rel=CLOSE)
    steps = [(x, y) for x, y in zip(norms(tmp_path / engine), norms(tmp_path / "ddp"), strict=True) if y is not None]
    assert [x for x, _ in steps] == pytest.approx([y for _, y in steps], rel=CLOSE)
    assert (tmp_path / engine / "events.jsonl").read_bytes() == (tmp_path / "ddp" / "events.jsonl").read_bytes()


def test_threads_of_a_cpu_add_up_in_one_order(tmp_path):
    """As the gradient of an indexed tensor is summed; without the engine every one of 20 trials differed."""
    torch.use_deterministic_algorithms(False)
    start_engine("no", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        values, places = torch.randn(200_000), torch.randint(0, 7, (200_000,))
        sums = [torch.zeros(7).index_put((places,), values, accumulate=True) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, sums[0]) for one in sums)


def test_fsdp_where_it_cannot_run_says_so(world, tmp_path):
    command = ["-m", "instructsam.train", f"data.root={world}", f"output_dir={tmp_path}"]
    result = forked.run(command, processes=2, CUDA_VISIBLE_DEVICES="", **environment("fsdp2"))
    assert result.returncode != 0
    assert "FSDP" in result.stderr and "needs" in result.stderr
