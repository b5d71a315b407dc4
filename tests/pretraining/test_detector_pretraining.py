"""What the detector's pretraining is told and learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_fixtures import settings_of

from instructsam.data.samples import SampleList
from instructsam.masks import box_to_rle
from instructsam.pretraining.dataset import GroundedDataset
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn
from instructsam.training.build import build_task


@pytest.fixture(scope="module")
def task(world):
    return build_task(settings_of("train", "experiment=tiny_detector", f"data.root={world}"))


def test_the_semantic_head_learns_from_plain_phrases_only(task):
    batch = task.collate([task.dataset[(0, index)] for index in range(2)])
    assert 0 < batch["generic"].sum() < len(batch["generic"])
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    found = [
        task.objective({**batch, "generic": generic}, counts)["semantic"].item()
        for generic in (batch["generic"], torch.ones_like(batch["generic"]))
    ]
    assert found[0] > 0 and found[1] == 0


@torch.no_grad()
def test_queries_that_are_told_nothing_are_all_alike(task, monkeypatch):
    """The second phrase has one box and padding."""
    monkeypatch.setattr(task.objective, "jitter", 0.0)
    boxes = torch.rand(2, 2, 4)
    slots = torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2]])
    queries = task.objective._oracle_queries(boxes, torch.tensor([[True, True], [True, False]]), slots)
    inputs = torch.zeros(2, 4, 5)
    for phrase, slot, box in ((0, 2, 0), (0, 0, 1), (1, 3, 0)):
        inputs[phrase, slot] = torch.cat([boxes[phrase, box], torch.ones(1)])
    torch.testing.assert_close(queries, task.objective.oracle(inputs))


def test_boxes_of_objects_are_centres_and_sizes_relative_to_the_picture(checkpoint, tmp_path):
    height, width, boxes = 60, 90, ((9, 6, 36, 30), (45, 0, 9, 12))
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "a.png")
    objects = tuple(
        {"category": "cup", "attributes": {}, "bbox": [x, y, w, h], "rle": box_to_rle([x, y, x + w, y + h], 60, 90)}
        for x, y, w, h in boxes
    )
    turn = Turn("cups", (PhraseTarget("cups", tuple(one["rle"] for one in objects)),))
    samples = SampleList([Sample("a", Path(tmp_path / "a.png"), height, width, (turn,), objects)])
    item = GroundedDataset(samples, InstructSAMProcessor.from_pretrained(checkpoint))[(0, 0)]
    expected = [[(x + w / 2) / width, (y + h / 2) / height, w / width, h / height] for x, y, w, h in boxes]
    assert item["object_boxes"].tolist() == [[0] * 4, *(pytest.approx(box) for box in expected)]
