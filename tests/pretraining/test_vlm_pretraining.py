"""Which losses the VLM's pretraining has, and what they look at."""

from __future__ import annotations

import pytest
import torch
from tiny_fixtures import settings_of

from instructsam.pretraining.dataset import CATEGORY, MAX_PLACE, num_places, places_of
from instructsam.training.build import build_task


def losses(world, *overrides: str):
    torch.manual_seed(0)
    task = build_task(settings_of("train", "experiment=tiny_vlm", f"data.root={world}", *overrides))
    batch = task.collate([task.dataset[(0, index)] for index in range(3)])
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    return task, batch, task.objective(batch, counts)


@pytest.mark.slow
def test_every_weight_counts(world):
    plain = losses(world)[2]
    assert {"query_box", "query_object", "pointer"} <= set(plain) and "places" not in plain
    task, _, terms = losses(world, "objective.query_box_weight=0", "objective.place_weight=2")
    assert set(terms) == set(plain) - {"query_box", "query_object"} | {"places"}
    sum(terms.values()).backward()
    trained = [name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert "query_bank.weight" in trained and any(name.startswith("vlm.visual.") for name in trained)
    halved = losses(world, "objective.query_box_weight=0.5")[2]
    assert halved["query_box"].item() == pytest.approx(plain["query_box"].item() / 2)


def test_places_by_hand():
    """A red circle left of and below a red square, a blue circle right of both."""
    attributes_OA = torch.tensor([[1, 1], [2, 1], [1, 2]])  # kind, colour
    places = places_of(attributes_OA, torch.tensor([[0.1, 0.8], [0.4, 0.2], [0.9, 0.5]]))
    assert places[0].tolist() == [0] * num_places(2)
    sizes, left, top = places[1:].view(3, 3, -1).unbind(1)  # groups: all, same kind, same colour, same both
    assert sizes.tolist() == [[3, 2, 2, 1], [3, 1, 2, 1], [3, 2, 1, 1]]
    assert left.tolist() == [[1, 1, 1, 1], [2, 1, 2, 1], [3, 2, 1, 1]]
    assert top.tolist() == [[3, 2, 2, 1], [1, 1, 1, 1], [2, 1, 1, 1]]
    many = places_of(torch.ones(9, 1, dtype=torch.long), torch.rand(9, 2))
    assert many.max() == MAX_PLACE and many.shape == (10, num_places(1))


def test_places_reach_the_batch(world):
    task, batch, _ = losses(world)
    names = list(task.dataset.values)
    assert batch["object_places"].shape[-1] == num_places(len(names))
    for row in range(3):
        objects = [{CATEGORY: one["category"], **one["attributes"]} for one in task.dataset.draw((0, row)).objects]
        same = [[sum(other[name] == one[name] for other in objects) for name in names] for one in objects]
        found = batch["object_places"][row, 1 : len(objects) + 1, 1 : 1 + len(names)]
        assert found.tolist() == same
        assert not batch["object_places"][row, len(objects) + 1 :].any()


def test_pointers_of_several_layers_count_as_their_mean(world):
    class One(torch.nn.Module):
        def forward(self, *_):
            return torch.ones(())

    task, batch, _ = losses(world)
    heads = task.objective.pointer_heads
    assert len(heads) > 1
    task.objective.pointer_heads = torch.nn.ModuleList(One() for _ in heads)
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    assert task.objective(batch, counts)["pointer"].item() == pytest.approx(task.objective.pointer_weight)
