"""What an ablation file may say, and what the shipped ones do say."""

from __future__ import annotations

import copy

import pytest
from tiny_fixtures import CONFIGS, settings_of

from instructsam.ablation.cells import parse
from instructsam.ablation.plan import filled, planned
from instructsam.losses.criterion import CriterionConfig, SetCriterion
from instructsam.models.attention_mask import VARIANTS
from instructsam.predictor import Predictor
from instructsam.training.objectives import InstructionObjective

GOOD = {
    "name": "toy",
    "stages": {
        "vlm": ["experiment=tiny_vlm"],
        "bridge": ["experiment=tiny_world", "model.init.1.checkpoint={train}/vlm"],
    },
    "cells": {
        "a": {"train": ["model.config.num_queries=3"], "x": 3},
        "b": {"x": 4},
        "c": {"trained_as": "a", "evaluate": ["attention_variant=causal"]},
    },
    "default": "b",
    "seeds": [0, 5],
    "train": ["trainer.max_steps=2"],
    "evaluate": ["limit=6"],
}


def test_a_good_one():
    ablation = parse(GOOD)
    a, b, c = ablation.cells.values()
    assert a.stages["vlm"] == ("experiment=tiny_vlm", "trainer.max_steps=2", "model.config.num_queries=3")
    assert b.stages["bridge"][-1] == "trainer.max_steps=2" and b.evaluate == ("limit=6",)
    assert c.stages == {} and c.evaluate == ("limit=6", "attention_variant=causal") and ablation.source(c) is a
    order = [(cell.name, seed) for cell, seed in ablation.order()]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 5), ("b", 5), ("c", 5)]
    assert ablation.find("c/5") == (c, 5)
    for wrong in ("c/1", "d/0", "c", "c/x"):
        with pytest.raises(ValueError, match="CELL/SEED"):
            ablation.find(wrong)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nmae",), "x", "unknown nmae"),
        (("name",), "a/b", "becomes a folder"),
        (("cells", "a", "trian"), [], "unknown trian"),
        (("cells", "A"), {}, "share a folder"),
        (("cells", "a", "x"), "three", "must be a number"),
        (("cells", "a", "train"), "trainer.max_steps=2", "list of overrides"),
        (("cells", "a", "train"), ["trainer.max_steps"], "no override"),
        (("cells", "a", "train"), ["seed=3"], "set by the sweep"),
        (("evaluate",), ["output_dir=x"], "set by the sweep"),
        (("cells", "a", "trained_as"), "b", "no training of its own"),
        (("cells", "c", "trained_as"), "c", "must be another cell"),
        (("cells", "c", "trained_as"), "z", "must be another cell"),
        (("cells", "d"), {"trained_as": "c"}, "no training of its own either"),
        (("default",), "z", "no such cell"),
        (("default",), None, "not given: default"),
        (("stages",), {}, "not given: stages"),
        (("stages", "evaluate"), [], "cannot be called evaluate"),
        (("seeds",), [0, 0], "occurs twice"),
        (("seeds",), [], "whole numbers"),
        (("seeds",), [-1], "whole numbers"),
        (("x_name",), "N", None),
    ],
)
def test_what_is_wrong_is_told(path, value, message):
    values = copy.deepcopy(GOOD)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if message is None:
        assert parse(values).x_name == "N"
        del values["cells"]["b"]["x"]
        message = "cell b has no x"
    with pytest.raises(ValueError, match=message):
        parse(values)


def test_cells_in_a_cycle():
    cells = {"a": {"trained_as": "b"}, "b": {"trained_as": "a"}}
    with pytest.raises(ValueError, match="no training of its own either"):
        parse({**GOOD, "cells": cells, "default": "a"})


def test_a_plan_holds_the_settings_and_not_what_is_free():
    ablation = parse(GOOD)
    plan = planned(ablation, ablation.cells["a"])
    assert list(plan) == ["vlm", "bridge", "evaluate"]
    assert plan["bridge"]["model"]["config"]["num_queries"] == 3 and plan["bridge"]["trainer"]["max_steps"] == 2
    assert plan["bridge"]["model"]["init"][1]["checkpoint"] == "TRAIN/vlm"
    assert not {"seed", "output_dir", "threads"} & set(plan["vlm"]) and "log_every" not in plan["vlm"]["trainer"]
    assert plan["evaluate"]["limit"] == 6 and "checkpoint" not in plan["evaluate"]
    assert list(planned(ablation, ablation.cells["c"])) == ["evaluate"]
    wrong = parse({**GOOD, "cells": {"b": {"train": ["trainer.max_stepz=2"]}}})
    with pytest.raises(ValueError, match=r"cell b, vlm: .*max_stepz"):
        planned(wrong, wrong.cells["b"])


def test_folders_with_odd_names_come_through():
    override = filled("model.init.1.checkpoint={train}/vlm", "/a b=c/it's [1]")
    values = settings_of("train", "experiment=tiny_world", override)
    assert values["model"]["init"][1]["checkpoint"] == "/a b=c/it's [1]/vlm"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment/ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_ablations(path, checkpoint):
    """Each composes with every override of every cell, no two cells are the same, and its file says how to run it."""
    ablation = parse(settings_of("ablate", f"experiment=ablation/{path.stem}")["ablation"])
    assert ablation.name == path.stem
    plans = [(cell.trained_as, planned(ablation, cell)) for cell in ablation.cells.values()]
    assert all(one != other for k, one in enumerate(plans) for other in plans[:k])
    assert f"python -m instructsam.ablate experiment=ablation/{path.stem}" in path.read_text(encoding="utf-8")
    model = Predictor.from_pretrained(checkpoint).model
    for _, steps in plans:
        for objective in (dict(settings["objective"]) for step, settings in steps.items() if step != "evaluate"):
            if objective.pop("name") == "instruct":  # weights that contradict each other are refused
                criterion = SetCriterion(CriterionConfig.from_mapping(objective.pop("criterion")))
                InstructionObjective(model, criterion, **objective)


def test_the_ablations_that_were_asked_for():
    queries = parse(settings_of("ablate", "experiment=ablation/queries")["ablation"])
    assert [cell.x for cell in queries.cells.values()] == [1, 2, 5, 10, 20]
    attention = parse(settings_of("ablate", "experiment=ablation/attention")["ablation"])
    assert {name for name, cell in attention.cells.items() if cell.trained_as is None} == set(VARIANTS)
