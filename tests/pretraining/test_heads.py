"""Heads and targets of the pretraining runs, against naive loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from instructsam.pretraining.heads import DenseHead, PointerHead, cell_targets, union_of


def test_the_pixel_at_a_cells_centre_decides():
    """Every pixel shows an object of its own."""
    object_map = torch.arange(24).view(1, 4, 6)
    attributes = torch.stack([torch.arange(24), 100 - torch.arange(24)], -1)[None]
    boxes = torch.rand(1, 24, 4)
    labels, found = cell_targets(object_map, attributes, boxes, (2, 3))
    centres = torch.tensor([[7, 9, 11], [19, 21, 23]])
    assert torch.equal(labels, torch.stack([centres, 100 - centres], -1)[None])
    assert torch.equal(found[0], boxes[0, centres])


def test_cells_of_every_picture_are_of_its_own_objects():
    object_map = torch.tensor([[[0, 1]], [[2, 1]]])
    attributes = torch.tensor([[[0], [5], [6]], [[0], [7], [8]]])
    labels, _ = cell_targets(object_map, attributes, torch.zeros(2, 3, 4), (1, 2))
    assert labels[..., 0].tolist() == [[[0, 5]], [[8, 7]]]


def test_the_union_is_of_valid_instances_and_of_pixels_covered_by_more_than_half():
    masks = torch.tensor([[[[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.6]], [[0.0, 1.0, 0.0]]]])
    batch = {"target_masks": masks, "target_valid": torch.tensor([[True, True, False]])}
    assert union_of(batch).tolist() == [[[True, False, True]]]
    assert union_of({**batch, "target_valid": torch.zeros(1, 3, dtype=torch.bool)}).tolist() == [[[False] * 3]]


def test_dense_loss_equals_a_naive_loop():
    torch.manual_seed(0)
    features, boxes = torch.randn(2, 2, 3, 8).double(), torch.rand(2, 2, 3, 4).double()
    labels = torch.stack([torch.randint(0, 4, (2, 2, 3)), torch.randint(0, 3, (2, 2, 3))], -1)
    labels[0, 0, 0], labels[1, 1, 2] = torch.tensor([0, 0]), torch.tensor([3, 2])
    for with_box in (True, False):
        head = DenseHead(8, [3, 2], with_box).double()
        expected = torch.zeros(()).double()
        for b, y, x in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist():
            state = head.norm(features[b, y, x])
            logits = head.classes(state)
            for part, label in zip((logits[:4], logits[4:]), labels[b, y, x], strict=True):
                expected = expected - part.log_softmax(-1)[label]
            if with_box and labels[b, y, x, 0] > 0:  # the background has no box
                expected = expected + 5 * (head.box(state).sigmoid() - boxes[b, y, x]).abs().sum()
        torch.testing.assert_close(head(features, labels, boxes, torch.tensor(7.0)), expected / 7)


def test_pointer_loss_equals_a_naive_loop():
    torch.manual_seed(0)
    head = PointerHead(8).double()
    queries, cells, image = torch.randn(3, 5, 8).double(), torch.randn(2, 2, 3, 8).double(), torch.tensor([0, 1, 1])
    union = torch.rand(3, 4, 6) > 0.5
    expected = torch.zeros(()).double()
    for p in range(3):
        query = head.query(queries[p].mean(0))
        for y in range(2):
            for x in range(3):
                logit = query @ head.key(cells[image[p], y, x]) / 8**0.5 + head.bias
                share = union[p, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double().mean()
                expected = expected + F.binary_cross_entropy_with_logits(logit, share) / 6
    found = head(queries, cells, image, union, torch.tensor(2.0))
    torch.testing.assert_close(found.double(), expected / 2, rtol=1e-5, atol=0)  # covered shares are float32
