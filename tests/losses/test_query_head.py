"""The head that reads boxes off query states, against naive loops."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from instructsam.losses.boxes import cxcywh_to_xyxy, giou_per_pair
from instructsam.losses.matching import assign
from instructsam.losses.query_head import QueryBoxHead

BOXES = torch.tensor([[[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.1]], [[0.5, 0.5, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0]]])
VALID = torch.tensor([[True, True], [True, False]])
COUNTS = {"pairs": torch.tensor(6.0), "phrases": torch.tensor(4.0)}  # more than here: of other ranks too


def head_of(*outputs: torch.Tensor) -> QueryBoxHead:
    """A head that gives its inputs back."""
    head = QueryBoxHead(8, len(outputs))
    head.heads = nn.ModuleList(nn.Identity() for _ in outputs)
    return head


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return giou_per_pair(cxcywh_to_xyxy(a[None]), cxcywh_to_xyxy(b[None]))[0]


def test_terms_and_cost_equal_naive_loops():
    """Means over layers and queries, divided by counts of all ranks."""
    outputs = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    terms, cost = head_of(*outputs)(outputs, BOXES, VALID, COUNTS)
    total_box = total_object = torch.zeros(())
    for output in outputs:
        boxes, logits = output[..., :4].sigmoid(), output[..., 4]
        expected = torch.zeros(2, 3, 2)
        for p, n, g in torch.cartesian_prod(*map(torch.arange, (2, 3, 2))).tolist():
            l1 = (boxes[p, n] - BOXES[p, g]).abs().sum()
            expected[p, n, g] = 5 * l1 - 2 * giou(boxes[p, n], BOXES[p, g]) + F.softplus(-logits[p, n])
        matches = assign([expected], VALID)[0]
        wanted = torch.zeros(2, 3)
        for p, n, g in zip(*(index.tolist() for index in matches), strict=True):
            l1 = (boxes[p, n] - BOXES[p, g]).abs().sum()
            total_box = total_box + 5 * l1 + 2 * (1 - giou(boxes[p, n], BOXES[p, g]))
            wanted[p, n] = 1
        total_object = total_object + (F.softplus(logits) - wanted * logits).sum()
    # Some 50 additions in float32, each rounded by at most 6e-8.
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(cost, expected)  # of the last layer
    close(terms["query_box"], total_box / 6 / 2)
    close(terms["query_object"], 2 * total_object / 4 / 3 / 2)


def test_without_phrases_and_targets_nothing_is_divided_by_zero():
    output = torch.randn(0, 3, 5)
    none = {"pairs": torch.tensor(0.0), "phrases": torch.tensor(0.0)}
    terms, cost = head_of(output)([output], torch.zeros(0, 2, 4), torch.zeros(0, 2, dtype=torch.bool), none)
    assert {name: value.item() for name, value in terms.items()} == {"query_box": 0, "query_object": 0}
    assert cost.shape == (0, 3, 2)
