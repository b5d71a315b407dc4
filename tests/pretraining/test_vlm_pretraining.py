"""Which losses the VLM's pretraining has, and what they look at."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_fixtures import settings_of

from instructsam.pretraining.dataset import CATEGORY, MAX_SHARED
from instructsam.training.build import build_task


def losses(world, *overrides: str):
    torch.manual_seed(0)
    task = build_task(settings_of("train", "experiment=tiny_vlm", f"data.root={world}", *overrides))
    batch = task.collate([task.dataset[(0, index)] for index in range(3)])
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    return task, batch, task.objective(batch, counts)


def test_every_weight_counts(world):
    plain = losses(world)[2]
    assert {"query_box", "query_object", "pointer"} <= set(plain) and "shared" not in plain
    task, _, terms = losses(world, "objective.query_box_weight=0", "objective.shared_weight=2")
    assert set(terms) == set(plain) - {"query_box", "query_object"} | {"shared"}
    sum(terms.values()).backward()
    trained = [name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert "query_bank.weight" in trained and any(name.startswith("vlm.visual.") for name in trained)
    halved = losses(world, "objective.query_box_weight=0.5")[2]
    assert halved["query_box"].item() == pytest.approx(plain["query_box"].item() / 2)


def test_objects_that_share_an_attribute_are_counted(world):
    task, batch, _ = losses(world)
    names = list(task.dataset.values)
    for row in range(3):
        objects = [{CATEGORY: one["category"], **one["attributes"]} for one in task.dataset.draw((0, row)).objects]
        counts = {name: Counter(one[name] for one in objects) for name in names}
        expected = [[min(counts[name][one[name]], MAX_SHARED) for name in names] for one in objects]
        assert batch["object_shared"][row, 1 : len(objects) + 1].tolist() == expected
        assert not batch["object_shared"][row, 0].any() and not batch["object_shared"][row, len(objects) + 1 :].any()
