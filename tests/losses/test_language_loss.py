"""Selection of trained tokens and their cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from double_precision import float64

from instructsam.losses.language import language_loss, language_targets

SEG, MASK_END = 90, 91
IDS = torch.tensor([[1, 2, 3, SEG, SEG, MASK_END, 4, 0], [5, 6, SEG, SEG, MASK_END, 7, 8, 9]])
LABELS = torch.tensor([[-100, -100, 3, SEG, SEG, MASK_END, 4, -100], [-100, 6, SEG, SEG, MASK_END, 7, 8, -100]])


def test_targets_are_shifted_and_blocks_ignored():
    row, position, token = language_targets(IDS, LABELS, [SEG, MASK_END])
    assert list(zip(row.tolist(), position.tolist(), token.tolist(), strict=True)) == [
        (0, 1, 3),
        (0, 5, 4),
        (1, 0, 6),
        (1, 4, 7),
        (1, 5, 8),
    ]


def test_blocks_are_ignored_by_input_also_where_labels_are_masked_already():
    masked = LABELS.masked_fill((LABELS == SEG) | (LABELS == MASK_END), -100)
    for plain, again in zip(
        language_targets(IDS, LABELS, [SEG, MASK_END]), language_targets(IDS, masked, [SEG, MASK_END]), strict=True
    ):
        assert torch.equal(plain, again)


def test_first_token_is_never_predicted_and_nothing_ignored_without_ids():
    labels = torch.full_like(IDS, -100)
    labels[:, 0] = IDS[:, 0]
    assert language_targets(IDS, labels, []).token_T.numel() == 0
    assert language_targets(IDS, LABELS, []).token_T.numel() == int((LABELS != -100).sum())


@float64()
def test_loss_equals_full_cross_entropy():
    logits = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    chosen = language_targets(IDS, LABELS, [SEG, MASK_END])
    loss = language_loss(logits[chosen.row_T, chosen.position_T], chosen.token_T, 5)
    labels = LABELS[:, 1:].masked_fill((LABELS[:, 1:] == SEG) | (LABELS[:, 1:] == MASK_END), -100)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()))


@float64()
def test_parts_with_a_common_count_add_up():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(6)
    whole = language_loss(logits, tokens, 6)
    parts = language_loss(logits[:2], tokens[:2], torch.tensor(6.0)) + language_loss(logits[2:], tokens[2:], 6)
    torch.testing.assert_close(parts, whole)


def test_no_token_is_zero_and_connected():
    logits = torch.randn(3, 20, requires_grad=True)
    loss = language_loss(logits[:0], torch.zeros(0, dtype=torch.long), 0)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_bf16_logits_give_a_float32_loss():
    logits = torch.randn(4, 50).bfloat16()
    loss = language_loss(logits, torch.arange(4), 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), torch.arange(4)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="input_ids and labels"):
        language_targets(IDS, LABELS[:, :-1], [SEG])
