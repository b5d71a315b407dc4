"""The training objective: connected to every trainable parameter, whatever the batch; invariant to how it is split."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import forked
import pytest
import torch
from double_precision import CLOSE, difference, float64
from tiny_fixtures import SHALLOW

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.predictor import Predictor
from instructsam.structures import PhraseTarget, Sample, Turn
from instructsam.training.objectives import InstructionObjective

FULL = CriterionConfig(aux=1.0, box_l1=5.0, box_giou=2.0)
TALK = Sample("talk", None, 0, 0, (Turn("the red one", answer=("all of them are blue",)),))


@pytest.fixture
def tiny(checkpoint):
    predictor = Predictor.from_pretrained(checkpoint)
    return predictor.model.train(), predictor.processor


@pytest.fixture
def exact(shallow_checkpoint):
    """One of two layers a kind, in float64."""
    predictor = Predictor.from_pretrained(shallow_checkpoint)
    with float64():
        yield predictor.model.double().train(), predictor.processor


def run(objective, batch):
    counts = {name: torch.tensor(value) for name, value in objective.count_units(batch).items()}
    terms = objective(batch, counts)
    loss = sum(terms.values())
    objective.zero_grad()
    loss.backward()
    return terms


def without_gradient(objective):
    return [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.slow
@pytest.mark.parametrize("config", [CriterionConfig(), FULL], ids=["release", "full"])
@pytest.mark.parametrize("what", ["masks", "no_target", "no_phrase"])
def test_connected_to_every_trainable_parameter(tiny, world, config, what):
    model, processor = tiny
    samples = read_coco_instructions(world, "train")[:2]
    if what == "no_target":
        turn = Turn("the red stars", (PhraseTarget("red stars"),))
        samples = [dataclasses.replace(sample, turns=(turn,)) for sample in samples]
    batch = processor.collate([processor.encode_sample(sample, True) for sample in samples])
    if what == "no_phrase":
        items = []
        for sample in samples:
            item = processor.encode_image(sample.image)
            chat = processor.encode_chat(item["image_grid_thw"], [("the red stars", None)])
            items.append({**item, "input_ids": chat.input_ids, "labels": chat.labels, "targets": [], "box_only": []})
        batch = processor.collate(items)
    objective = InstructionObjective(model, SetCriterion(config), query_box_weight=0.5)
    terms = run(objective, batch)
    assert without_gradient(objective) == []
    if what == "no_phrase":
        assert all(float(value.detach()) == 0 for value in terms.values())
        assert all(not p.grad.any() for p in objective.parameters() if p.grad is not None)
    else:
        assert float(terms["cls"].detach()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [CriterionConfig(), FULL], ids=["release", "full"])
@pytest.mark.parametrize("what", ["no_picture", "some_pictures", "only_skipped"])
def test_connected_to_every_trainable_parameter_without_pictures(tiny, world, config, what):
    model, processor = tiny
    talk = processor.encode_sample(TALK, True)
    picture = processor.encode_sample(read_coco_instructions(world, "train")[0], True)
    skipped = [processor.neutral_item("a"), processor.neutral_item("b")]
    items = {"no_picture": [talk, talk], "some_pictures": [talk, picture, talk], "only_skipped": skipped}[what]
    objective = InstructionObjective(model, SetCriterion(config), query_box_weight=0.5)
    terms = {name: float(value.detach()) for name, value in run(objective, processor.collate(items)).items()}
    assert without_gradient(objective) == []
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert all(bool(grad.isfinite().all()) for grad in gradients.values())
    trained = {name for name, grad in gradients.items() if grad.any()}
    if what == "only_skipped":
        assert not trained and all(value == 0 for value in terms.values())
    elif what == "no_picture":
        assert terms.pop("language") > 0 and all(value == 0 for value in terms.values())
        assert trained and all(name.startswith("model.vlm.language_model.") for name in trained)
    else:
        assert terms["language"] > 0 and terms["cls"] > 0 and any("merger" in name for name in trained)


@pytest.mark.slow
def test_a_skipped_item_changes_nothing(exact, world):
    model, processor = exact
    samples = read_coco_instructions(world, "train")[:2]
    items = [processor.encode_sample(sample, True) for sample in (*samples, TALK)]
    objective = InstructionObjective(model, SetCriterion(FULL), query_box_weight=0.5, query_box_layers=2)
    found = []
    for place in (None, 0, 1, 3):
        some = list(items)
        if place is not None:
            some.insert(place, processor.neutral_item("broken.jpg"))
        batch = processor.collate(some)
        assert batch["skipped_ids"] == ([] if place is None else ["broken.jpg"])
        terms = {name: float(value.detach()) for name, value in run(objective, batch).items()}
        gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad}
        found.append((objective.count_units(batch), terms, gradients))
    counts, terms, gradients = found[0]
    for other_counts, other_terms, other_gradients in found[1:]:
        assert other_counts == counts and other_terms == pytest.approx(terms, rel=CLOSE)
        for name, expected in gradients.items():
            assert difference(other_gradients[name], expected) < CLOSE, name


@pytest.mark.slow
def test_splitting_a_batch_changes_nothing(exact, world):
    model, processor = exact
    samples = read_coco_instructions(world, "train")[:2]
    items = [processor.encode_sample(sample, True) for sample in (*samples, TALK)]
    objective = InstructionObjective(model, SetCriterion(FULL), query_box_weight=0.5, query_box_layers=2)
    run(objective, processor.collate(items))
    whole = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    parts = [processor.collate(items[:1]), processor.collate(items[1:])]
    each = [objective.count_units(part) for part in parts]
    counts = {name: torch.tensor(sum(count[name] for count in each)) for name in each[0]}
    objective.zero_grad()
    for part in parts:
        sum(objective(part, counts).values()).backward()
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            assert difference(parameter.grad, whole[name]) < CLOSE, name


def test_unused_tensors_are_frozen(tiny):
    model, _ = tiny
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ("text_projection", "geometry_encoder", "semantic_projection", "query_embed", "fpn_layers.2")
    assert frozen and all(any(part in name for part in parts) for name in frozen)


def command(world: Path, output: Path, *more: str) -> list[str]:
    return [
        *("instructsam.train", f"data.root={world}", f"output_dir={output}", "data.turns_per_image=3"),
        *("trainer.max_steps=2", "trainer.progress_bar=false", "trainer.checkpoint_every=0", *SHALLOW, *more),
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(world, tmp_path):
    """2 ranks × batch 2 give the losses of 1 rank × batch 4."""
    for name, processes in (("one", 1), ("two", 2)):
        line = command(world, tmp_path / name, f"trainer.per_device_batch_size={4 // processes}")
        done = forked.run(["-m", "double_precision", *line], processes, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        [json.loads(line) for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == 2
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=CLOSE)
        assert a["terms"] == pytest.approx(b["terms"], rel=CLOSE)


IMAGELESS = Path(__file__).with_name("multiprocess_imageless.py")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["talk", "skipped"])
def test_a_rank_without_an_image_does_not_hang(shallow_checkpoint, world, tmp_path, what):
    """Each step, one of two ranks has a picture and the other has none; the losses are those of one process."""
    rows = []
    for batch_size, processes in ((2, 1), (1, 2)):
        output = tmp_path / str(batch_size)
        line = (IMAGELESS, shallow_checkpoint, world, output, what, batch_size)
        done = forked.run(line, processes, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append([json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 3 and rows[0][2]["loss"] < rows[0][0]["loss"]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=CLOSE)
        assert a["terms"] == pytest.approx(b["terms"], rel=CLOSE)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=CLOSE)


@pytest.mark.slow
def test_the_query_head_takes_part_in_the_matching(tiny, world):
    model, processor = tiny
    batch = processor.collate([processor.encode_sample(s, True) for s in read_coco_instructions(world, "train")[:2]])
    seen = []

    class Spy(SetCriterion):
        def forward(self, *args, cost_bias=None, **kwargs):
            seen.append(cost_bias)
            return super().forward(*args, cost_bias=cost_bias, **kwargs)

    terms = {}
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        terms[weight] = run(InstructionObjective(model, Spy(FULL), 1.0, 0.5, query_cost_weight=weight), batch)
    assert seen[0] is None
    assert seen[1].shape == (*seen[1].shape[:1], model.config.num_queries, batch["target_valid"].shape[1])
    assert terms[0.0]["query_box"].item() == terms[2.0]["query_box"].item()
    assert terms[0.0]["mask_bce"].item() < terms[2.0]["mask_bce"].item(), "matched by masks alone, masks are nearer"
    with pytest.raises(ValueError, match="needs the head of query_box_weight"):
        InstructionObjective(model, SetCriterion(FULL), query_cost_weight=1.0)
