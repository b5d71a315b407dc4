"""Box conversions, L1 and GIoU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.losses.boxes import (
    cxcywh_to_xyxy,
    giou_loss_per_pair,
    giou_per_pair,
    l1_per_pair,
    xyxy_to_cxcywh,
)

unit = st.floats(0, 1, width=32)
box = st.tuples(unit, unit, unit, unit).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)


def test_conversion_by_hand():
    xyxy = torch.tensor([[0.1, 0.2, 0.5, 0.4]])
    torch.testing.assert_close(xyxy_to_cxcywh(xyxy), torch.tensor([[0.3, 0.3, 0.4, 0.2]]))


@settings(deadline=None, max_examples=50)
@given(boxes=st.lists(box, min_size=1, max_size=5))
def test_conversion_round_trip(boxes):
    xyxy = torch.tensor(boxes)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy, rtol=1e-5, atol=1e-6)


def test_giou_by_hand():
    a = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 0.4, 0.4], [0.1, 0.1, 0.3, 0.5]])
    b = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6], [0.1, 0.1, 0.3, 0.5]])
    disjoint = 0 - (0.16 - 0.05) / 0.16
    overlapping = 0.04 / 0.28 - (0.36 - 0.28) / 0.36
    torch.testing.assert_close(giou_per_pair(a, b), torch.tensor([disjoint, overlapping, 1.0]))


@settings(deadline=None, max_examples=50)
@given(a=box, b=box)
def test_giou_is_symmetric_bounded_and_finite_with_finite_gradient(a, b):
    first, second = torch.tensor([a], requires_grad=True), torch.tensor([b])
    giou = giou_per_pair(first, second)
    assert -1.001 <= giou.item() <= 1.001
    assert giou.item() == pytest.approx(giou_per_pair(second, first).item(), abs=1e-6)
    giou.sum().backward()
    assert first.grad.isfinite().all()


def test_losses_of_a_perfect_box_vanish_and_l1_sums_the_coordinates():
    truth = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    assert giou_loss_per_pair(cxcywh_to_xyxy(truth), truth).item() == pytest.approx(0, abs=1e-6)
    moved = cxcywh_to_xyxy(truth + torch.tensor([0.1, -0.1, 0.05, 0.0]))
    assert l1_per_pair(moved, truth).item() == pytest.approx(0.25, abs=1e-6)
