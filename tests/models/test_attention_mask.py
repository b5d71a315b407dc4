"""One rule, three masks: dense, block and decoding step, for every variant and random layouts (DESIGN section 5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.models.attention_mask import VARIANTS, TokenLayout, block_mask, dense_mask, predicate

EOS, SEG, TEXT = 1, 2, 5


def random_layout(seed: int, batch: int = 3, num_queries: int = 3, independent: bool = False) -> TokenLayout:
    """Rows of random length: a prompt, several turns of several phrases with their blocks, padding on the right."""
    rng = np.random.default_rng(seed)
    rows, turns = [], []
    for _ in range(batch):
        ids, turn = [TEXT] * int(rng.integers(1, 4)), [0]
        turn = [0] * len(ids)
        for number in range(int(rng.integers(1, 4))):
            piece = [TEXT] * int(rng.integers(1, 4)) + [EOS]
            for _ in range(int(rng.integers(0, 3))):
                piece += [TEXT] * int(rng.integers(1, 3)) + [SEG] * num_queries + [TEXT]
            piece.append(EOS)
            ids += piece
            turn += [number + 1] * len(piece)
        rows.append(ids)
        turns.append(turn)
    length = max(map(len, rows)) + int(rng.integers(0, 3))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    turn_ids = torch.tensor([row + [0] * (length - len(row)) for row in turns])
    valid = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return TokenLayout.from_tokens(
        input_ids,
        valid,
        seg_token_id=SEG,
        eos_token_id=EOS,
        num_queries=num_queries,
        turn=turn_ids if independent else None,
    )


def part(layout: TokenLayout, start: int, stop: int) -> TokenLayout:
    turn = None if layout.turn is None else layout.turn[:, start:stop]
    return TokenLayout(layout.valid[:, start:stop], layout.block[:, start:stop], layout.prompt[:, start:stop], turn)


def by_the_words(variant: str, layout: TokenLayout, b: int, i: int, j: int) -> bool:
    """The rules of DESIGN section 5, written again in plain Python."""
    same_block = layout.block[b, i] == layout.block[b, j] and layout.block[b, i] >= 0
    other_blocks = layout.block[b, i] >= 0 and layout.block[b, j] >= 0 and not same_block
    allowed = j <= i
    if variant == "isolated" and same_block and i != j:
        allowed = False
    if variant in ("hybrid", "hybrid_blind", "prefix") and same_block:
        allowed = True
    if variant == "hybrid_blind" and other_blocks:
        allowed = False
    if variant == "prefix" and layout.prompt[b, i] and layout.prompt[b, j]:
        allowed = True
    if not layout.valid[b, j]:
        allowed = False
    if layout.turn is not None and layout.turn[b, j] != 0 and layout.turn[b, i] != layout.turn[b, j]:
        allowed = False
    return bool(allowed or i == j)


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000), independent=st.booleans())
@settings(deadline=None, max_examples=15)
def test_dense_mask_says_what_the_rule_says(variant, seed, independent):
    layout = random_layout(seed, batch=2, independent=independent)
    mask = dense_mask(variant, layout)
    batch, length = layout.valid.shape
    expected = [
        [[by_the_words(variant, layout, b, i, j) for j in range(length)] for i in range(length)] for b in range(batch)
    ]
    assert mask.shape == (batch, 1, length, length)
    assert torch.equal(mask[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000), independent=st.booleans())
@settings(deadline=None, max_examples=8)
def test_block_mask_equals_dense_mask(variant, seed, independent):
    from torch.nn.attention.flex_attention import create_mask

    layout = random_layout(seed, independent=independent)
    blocks = block_mask(variant, layout)
    batch, length = layout.valid.shape
    assert blocks.shape == (batch, 1, length, length)
    elementwise = create_mask(blocks.mask_mod, batch, 1, length, length, device="cpu")
    assert torch.equal(elementwise, dense_mask(variant, layout))
    # The coarse blocks must keep every allowed pair.
    coarse = blocks.to_dense().bool()
    size = blocks.BLOCK_SIZE
    fine = coarse.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, :length, :length]
    assert bool((fine | ~dense_mask(variant, layout)).all())


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=15)
def test_decoding_steps_stack_up_to_the_dense_mask(variant, seed):
    """Steps that feed whole query blocks at once, over a growing layout, give the rows of the dense mask."""
    layout = random_layout(seed)
    whole = dense_mask(variant, layout)
    length = layout.valid.shape[1]
    # A step may end anywhere but within a block of any row, and the first holds the prompts.
    inside = ((layout.block[:, 1:] == layout.block[:, :-1]) & (layout.block[:, 1:] >= 0)).any(0)
    ends = [p + 1 for p in range(length - 1) if not inside[p]] + [length]
    first = int(layout.prompt.sum(-1).max())
    ends = [end for end in ends if end >= first]
    grown, start = part(layout, 0, ends[0]), ends[0]
    rows = [torch.nn.functional.pad(dense_mask(variant, grown), (0, length - start))]
    for end in ends[1:]:
        grown = grown.append(part(layout, start, end))
        rows.append(torch.nn.functional.pad(dense_mask(variant, grown, end - start), (0, length - end)))
        start = end
    assert torch.equal(torch.cat(rows, dim=2), whole)


def test_the_prompt_reaches_to_the_first_end_of_turn():
    """With that token, and no matter what ends later; without one, all of it."""
    ends = [2, 0, 4, None]
    rows = torch.tensor([[TEXT, TEXT, EOS, TEXT, EOS], [EOS, TEXT, EOS, EOS, TEXT], [TEXT] * 4 + [EOS], [TEXT] * 5])
    layout = TokenLayout.from_tokens(rows, torch.ones_like(rows), seg_token_id=SEG, eos_token_id=EOS, num_queries=3)
    mask = dense_mask("prefix", layout)[:, 0]
    for row, end in enumerate(ends):
        prompt = [end is None or position <= end for position in range(5)]
        assert layout.prompt[row].tolist() == prompt
        assert mask[row, 0].tolist() == [True, *prompt[1:]]  # the first token sees the whole prompt and nothing else


def test_every_row_sees_something():
    layout = random_layout(3)
    for variant in VARIANTS:
        assert bool(dense_mask(variant, layout).any(-1).all())


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="unknown attention variant 'diagonal'"):
        predicate("diagonal", random_layout(0))


def test_variants_differ():
    layout = random_layout(11)
    masks = [dense_mask(variant, layout) for variant in VARIANTS]
    for a in range(len(masks)):
        for b in range(a):
            assert not torch.equal(masks[a], masks[b]), (VARIANTS[a], VARIANTS[b])
