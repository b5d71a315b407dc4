"""The release's recipe (DESIGN section 8) in small: what trains at which rate, in which dtype, and that it runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import forked
import pytest
import torch
from double_precision import CLOSE, float64
from safetensors.torch import load_file
from tiny_fixtures import settings_of

from instructsam import InstructSAM
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.tiny_world import make_tiny_world
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.merge import merge
from instructsam.models.full_size import full_size_config
from instructsam.models.loading import empty_model
from instructsam.models.lora import add_lora, lora_layers, lora_settings
from instructsam.models.modeling import InstructSAMModel
from instructsam.structures import PhraseTarget, Turn
from instructsam.train import train
from instructsam.training.build import Task, build_task, fingerprint
from instructsam.training.checkpoint_files import fingerprint_differences
from instructsam.training.config import TrainerConfig
from instructsam.training.optim import OptimConfig, build_optimizer
from instructsam.training.precision import cast_frozen

pytestmark = pytest.mark.slow

LAYERS, LANGUAGE = 4, "model.vlm.language_model"
# Tensors of the detector that no output depends on (`InstructSAMModel.freeze_unused`).
UNUSED = (
    "text_projection.", "geometry_encoder.", "mask_decoder.semantic_projection.", "detr_decoder.query_embed.",
    "mask_decoder.pixel_decoder.conv_layers.2.", "mask_decoder.pixel_decoder.norms.2.",
)  # fmt: skip


def overrides(stage: int, world: Path, output: Path, *more: str) -> list[str]:
    return [
        f"experiment=stage{stage}",
        "model=tiny",
        "data=tiny_world",
        f"data.root={world}",
        "data.turns_per_image=2",
        "model.lora.r=4",
        f"output_dir={output}",
        "trainer.epochs=null",
        "trainer.max_steps=2",
        "trainer.num_workers=0",
        "trainer.progress_bar=false",
        "trainer.save_frozen=true",  # to see that it stays what it was
        *more,
    ]


def make_task(world: Path, stage: int = 1, *more: str) -> tuple[Task, dict]:
    from_scratch = [] if stage == 1 else ["model.checkpoint=null"]
    settings = settings_of("train", *overrides(stage, world, world, *from_scratch, *more))
    return build_task(settings), settings


def expected_groups(task: Task) -> dict[str, set[str]]:
    """The recipe in its own words: DESIGN section 4, "Trainable parts", section 8 for the rates."""
    detector = {
        f"model.detector.{name}"
        for name, _ in task.model.detector.named_parameters()
        if not name.startswith(("vision_encoder.", *UNUSED))
    }
    bridge = {"model.query_bank.weight"} | {
        f"model.{which}_projector.{layer}.{what}"
        for which in ("query", "phrase")
        for layer in (0, 2)
        for what in ("weight", "bias")
    }
    lora = {
        f"{LANGUAGE}.layers.{layer}.self_attn.{projection}_proj.lora_{half}.default.weight"
        for layer in range(LAYERS)
        for projection in "qkvo"
        for half in "AB"
    }
    merger = {
        f"model.vlm.visual.merger.{part}.{what}"
        for part in ("norm", "linear_fc1", "linear_fc2")
        for what in ("weight", "bias")
    }
    return {"vlm": lora | merger | {f"{LANGUAGE}.embed_tokens.weight"}, "detector": detector | bridge}


@pytest.mark.parametrize(("stage", "rates"), [(1, (5e-6, 1e-5)), (2, (2e-6, 5e-6))])
def test_trainable_parameters_are_those_of_the_recipe(world, stage, rates):
    task, settings = make_task(world, stage)
    optimizer = build_optimizer(task.objective, OptimConfig.from_dict(settings["optim"]))
    names = {id(parameter): name for name, parameter in task.objective.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    expected = expected_groups(task)
    assert found == expected
    trainable = {name for name, parameter in task.objective.named_parameters() if parameter.requires_grad}
    assert trainable == expected["vlm"] | expected["detector"]
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == dict(
        zip(("vlm", "detector"), rates, strict=True)
    )
    assert all(group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    assert any("deepstack_merger" in name for name in names.values()) and not any("deepstack" in n for n in trainable)


def test_full_fine_tuning_trains_the_language_model_itself(world):
    task, settings = make_task(world, 1, "optim=full", "model.lora=null")
    build_optimizer(task.objective, OptimConfig.from_dict(settings["optim"]))
    trainable = {name for name, parameter in task.objective.named_parameters() if parameter.requires_grad}
    language = {name for name, _ in task.objective.named_parameters() if name.startswith(f"{LANGUAGE}.")}
    assert len(language) > 40
    recipe = {name for group in expected_groups(make_task(world)[0]).values() for name in group}
    assert trainable == language | {name for name in recipe if "lora" not in name}


def test_the_recipe_at_full_size():
    """The patterns on the names of the real model, whose tensors are never made."""
    model = empty_model(InstructSAMModel, full_size_config())
    model.freeze_unused()
    add_lora(model)
    objective = torch.nn.ModuleDict({"model": model})
    config = OptimConfig.from_dict(settings_of("train", "experiment=stage1", "data.root=somewhere")["optim"])
    groups = {group["name"]: group["params"] for group in build_optimizer(objective, config).param_groups}
    assert len(list(lora_layers(model))) == 28 * 4
    lora = 28 * 64 * (2 * (2048 + 2048) + 2 * (2048 + 1024))  # q and o are 2048 x 2048, k and v 1024 x 2048
    merger = 2 * 1024 + 4096 * 4096 + 4096 + 4096 * 2048 + 2048
    assert sum(p.numel() for p in groups["vlm"]) == lora + 151936 * 2048 + merger
    projectors = 2 * (2048 * 2048 + 2048 + 2048 * 256 + 256)
    detector = sum(
        p.numel() for name, p in model.detector.named_parameters() if not name.startswith(("vision_encoder.", *UNUSED))
    )
    assert sum(p.numel() for p in groups["detector"]) == 10 * 2048 + projectors + detector
    assert set(groups) == {"vlm", "detector"}


@pytest.mark.parametrize("what", ["masks", "no_target", "no_phrase"])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_every_trainable_parameter_gets_a_gradient(world, what, precision):
    task, settings = make_task(world)
    build_optimizer(task.objective, OptimConfig.from_dict(settings["optim"]))
    if precision == "mixed":
        assert cast_frozen(task.objective, torch.bfloat16) > 0
    processor, samples = task.processor, read_coco_instructions(world, "train")[:2]
    if what == "no_target":
        turn = Turn("the red stars", (PhraseTarget("red stars"),))
        samples = [dataclasses.replace(sample, turns=(turn,)) for sample in samples]
    items = [processor.encode_sample(sample, True) for sample in samples]
    if what == "no_phrase":
        for item, sample in zip(items, samples, strict=True):
            chat = processor.encode_chat(item["image_grid_thw"], [("the red stars", None)], where=sample.id)
            item.update(input_ids=chat.input_ids, labels=chat.labels, targets=[], box_only=[])
            item.pop("turn_ids")
    batch = processor.collate(items)
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    task.objective.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        terms = task.objective(batch, counts)
    sum(terms.values()).backward()
    parameters = dict(task.objective.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == trainable
    assert all(parameters[name].grad.isfinite().all() for name in trainable)
    if what == "masks":
        flat = {name for name in trainable if not parameters[name].grad.any()}
        # Boxes have no loss of their own; fresh adapters are zero on one side, so the other has nothing to learn yet.
        assert all("box" in name or ".lora_A." in name or "ref_point" in name for name in flat), flat


def test_the_releases_objective():
    objective = settings_of("train", "objective=release")["objective"]
    assert CriterionConfig.from_mapping(objective["criterion"]) == CriterionConfig()
    assert (objective["lm_weight"], objective["query_box_weight"]) == (1.0, 0.0)
    assert set(objective) == {"name", "lm_weight", "query_box_weight", "criterion"}
    assert SetCriterion(CriterionConfig.from_mapping(objective["criterion"])).config.aux == 0


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 2), (2, 1)])
def test_settings_of_the_full_size_stages(stage, accumulation):
    settings = settings_of("train", f"experiment=stage{stage}", "data.root=somewhere")
    trainer = TrainerConfig.from_dict({**settings["trainer"], "output_dir": settings["output_dir"]})
    assert (trainer.epochs, trainer.max_steps, trainer.precision, trainer.frozen_dtype) == (1, None, "bf16", "bfloat16")
    assert (trainer.per_device_batch_size, trainer.accumulation, trainer.clip_norm) == (1, accumulation, 1.0)
    optim, model = settings["optim"], settings["model"]
    assert (optim["schedule"], optim["warmup_ratio"], optim["weight_decay"]) == ("cosine", 0.03, 0.0)
    assert model["lora"] == {"r": 64, "alpha": 16, "dropout": 0.05} and model["gradient_checkpointing"]
    assert model["max_length"] == 16384 and model["vlm_image"]["max_pixels"] == 8192 * 32 * 32
    assert settings["data"]["group_by"] == "masks" and settings["save_dtype"] == "bfloat16"
    parts = (model["vlm_path"], model["detector_path"], model["checkpoint"])
    hub = ("Qwen/Qwen3-VL-2B-Instruct", "facebook/sam3", None)
    assert parts == (hub if stage == 1 else (None, None, "outputs/stage1/merged"))


# ---- the two stages, run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> Path:
    """Stage 1, merged, and stage 2 from it, two steps each with the tiny model; evaluated on the way."""
    folder = tmp_path_factory.mktemp("stages")
    evaluation = ["trainer.eval_every=2", "evaluation.num_instructions=4", "evaluation.gallery_rows=2"]
    evaluation += ["evaluation.max_new_tokens=6"]
    grouped = "data.group_by=masks"
    first = train(settings_of("train", *overrides(1, world, folder / "one", grouped, *evaluation)))
    assert first["status"] == "complete" and "mAP" in first["metrics"]
    merge(folder / "one" / "checkpoint", folder / "merged")
    more = [f"model.checkpoint={folder / 'merged'}", "model.tokenizer=null"]
    assert train(settings_of("train", *overrides(2, world, folder / "two", *more)))["status"] == "complete"
    return folder


def test_losses_are_finite_and_of_the_release_only(stages):
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (stages / name / "losses.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and all(0 < row["loss"] < 1000 and 0 < row["grad_norm"] < 1e6 for row in rows)
        assert set(rows[0]["terms"]) == {"language", "mask_bce", "mask_dice", "mask_projection", "cls"}
        assert set(rows[0]["lr"]) == {"vlm", "detector"}


def test_steps_are_grouped_by_masks_if_so_set(stages):
    for name, grouped in (("one", True), ("two", False)):
        state = json.loads((stages / name / "checkpoints/step_000002/state.json").read_text())
        assert (state["fingerprint"]["trainer"]["group_by"] is not None) == grouped


def test_saved_models_have_one_dtype_and_work(stages, world):
    sample = read_coco_instructions(world, "val")[0]
    for name in ("one/checkpoint", "merged", "two/checkpoint"):
        files = list((stages / name).rglob("*.safetensors"))
        assert {tensor.dtype for path in files for tensor in load_file(path).values()} == {torch.bfloat16}
        found = InstructSAM.from_pretrained(stages / name, "cpu").segment(
            sample.image, phrases="red circles", threshold=0
        )
        assert len(found) == 6 and all(0 <= instance.score <= 1 for instance in found)
    assert lora_settings(InstructSAMModel.from_pretrained(stages / "two/checkpoint")).r == 4


def test_only_the_recipes_tensors_have_moved(stages, world):
    """Between the merged first stage and the second, whose masters are float32 and whose files are bfloat16."""
    before, after = (
        load_file(stages / name / "weights.safetensors")
        for name in ("one/checkpoints/step_000002", "two/checkpoints/step_000002")
    )
    assert before.keys() == after.keys()
    task, _ = make_task(world)
    trained = set().union(*expected_groups(task).values())
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} >= trained
    frozen = {name: tensor for name, tensor in after.items() if name not in trained and tensor.is_floating_point()}
    assert {tensor.dtype for tensor in frozen.values()} == {torch.bfloat16}
    adapted = re.compile(r"self_attn\.[qkvo]_proj\.base_layer")  # merging changed these
    for name, tensor in frozen.items():
        if not adapted.search(name):
            assert torch.equal(tensor, before[name]), name


def test_resumption_refuses_other_settings(stages, world):
    for override, message in [
        ("trainer.frozen_dtype=null", "trainer.frozen_dtype is 'bfloat16' there and None here"),
        ("model.lora.alpha=8", "model.lora.alpha is 16 there and 8 here"),
        ("data.group_by=null", "data.group_by is 'masks' there and None here"),
        ("optim.train=[.]", "optim.train is "),
    ]:
        options = overrides(1, world, stages / "one", "data.group_by=masks", "trainer.eval_every=0", override)
        with pytest.raises(ValueError, match=message):
            train(settings_of("train", *options))


def test_other_data_of_the_same_length_is_told_apart(world, tmp_path):
    """And the same data elsewhere, or settings that only cost time, are not."""
    make_tiny_world(tmp_path / "other", train=12, val=1, seed=5)
    shutil.copytree(world, tmp_path / "moved")
    task, settings = make_task(world)
    ours = fingerprint(settings, task)
    other, other_settings = make_task(world, 1, f"data.root={tmp_path / 'other'}")
    assert len(other.dataset) == len(task.dataset)
    differences = fingerprint_differences(ours, fingerprint(other_settings, other))
    assert len(differences) == 1 and differences[0].startswith("data.samples is")
    free = [f"data.root={tmp_path / 'moved'}", "model.gradient_checkpointing=false", "data.val=null"]
    moved, moved_settings = make_task(world, 1, *free)
    assert fingerprint_differences(ours, fingerprint(moved_settings, moved)) == []


def test_an_unmerged_checkpoint_is_no_start_for_stage_2(stages, world, tmp_path):
    more = [f"model.checkpoint={stages / 'one' / 'checkpoint'}", "model.tokenizer=null"]
    with pytest.raises(ValueError, match="python -m instructsam.merge"):
        train(settings_of("train", *overrides(2, world, tmp_path, *more)))


def test_master_weights_in_half_precision_are_refused(stages, world, tmp_path):
    """A merged checkpoint is bfloat16; with dtype null it would train so."""
    more = [f"model.checkpoint={stages / 'merged'}", "model.tokenizer=null", "model.dtype=null"]
    with pytest.raises(ValueError, match="trains in bfloat16"):
        train(settings_of("train", *overrides(2, world, tmp_path, *more)))


@pytest.mark.multiprocess
def test_two_processes_train_like_one(world, tmp_path):
    """DDP with LoRA, frozen towers, gradient checkpointing and grouped sampling; without dropout, which is per rank."""
    same = ["data.group_by=masks", "trainer.precision=no", "trainer.frozen_dtype=null", "model.lora.dropout=0"]
    with float64():
        train(settings_of("train", *overrides(1, world, tmp_path / "one", *same, "trainer.per_device_batch_size=2")))
    command = ["-m", "double_precision", "instructsam.train", *overrides(1, world, tmp_path / "two", *same)]
    done = forked.run(command, processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert b["terms"] == pytest.approx(a["terms"], rel=CLOSE)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=CLOSE)
    adapters = [load_file(tmp_path / name / "checkpoint/adapter/adapter_model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(*adapters, atol=0, rtol=2**-7)  # saved in bfloat16: one step of its rounding
