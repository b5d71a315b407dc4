"""Hybrid attention: one rule per variant, and every mask that the language model needs from it (DESIGN section 5).

A rule is a predicate over (batch row, query position, key position). From the same predicate come
 - `dense_mask`: the boolean 4-D mask for SDPA, of a whole sequence or of one decoding step over the cache;
 - `block_mask`: the FlexAttention block mask.

A new variant is one function in `RULES`.

Shape suffixes: B batch, L sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_VARIANT = "hybrid"


@dataclass
class TokenLayout:
    """What the rules need to know of every token; all tensors are (B, L) on one device.

    Attributes:
        valid: bool, False for padding.
        block: int64, number of the query block within the row, -1 outside of blocks.
        prompt: bool, True for the first user turn (image and instruction), up to and including its end token.
        turn: int64 or None. With independent turns, several instructions share one image: 0 is the common image prefix
            and k > 0 the k-th turn, which sees the prefix and itself only. None: ordinary turns, which see all before.
    """

    valid: Tensor
    block: Tensor
    prompt: Tensor
    turn: Tensor | None = None

    @classmethod
    def from_tokens(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        seg_token_id: int,
        eos_token_id: int,
        num_queries: int,
        turn: Tensor | None = None,
    ) -> TokenLayout:
        """Read the layout off the token ids.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) bool or 0/1.
            seg_token_id: id of ``[SEG]``; every run of `num_queries` of them is one block.
            eos_token_id: end of a chat turn; what lies up to the first one is the prompt.
            turn: see the class.
        """
        is_query = (input_ids == seg_token_id) & attention_mask.bool()
        block = torch.where(is_query, (is_query.long().cumsum(-1) - 1) // num_queries, -1)
        is_eos = (input_ids == eos_token_id).long()
        prompt = (is_eos.cumsum(-1) - is_eos) == 0
        return cls(attention_mask.bool(), block, prompt, turn)

    def append(self, other: TokenLayout) -> TokenLayout:
        """The layout of these tokens followed by `other`'s (as a decoding step appends them to the cache)."""
        turn = None
        if self.turn is not None and other.turn is not None:
            turn = torch.cat([self.turn, other.turn], dim=1)
        return TokenLayout(
            torch.cat([self.valid, other.valid], dim=1),
            torch.cat([self.block, other.block], dim=1),
            torch.cat([self.prompt, other.prompt], dim=1),
            turn,
        )


Predicate = Callable[[Tensor, Tensor, Tensor], Tensor]


def _same_block(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (layout.block[b, i] == layout.block[b, j]) & (layout.block[b, i] >= 0)


def _causal(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _hybrid(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) | _same_block(layout, b, i, j)


def _isolated(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (~_same_block(layout, b, i, j) | (i == j))


def _hybrid_blind(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    both_queries = (layout.block[b, i] >= 0) & (layout.block[b, j] >= 0)
    return torch.where(both_queries, layout.block[b, i] == layout.block[b, j], j <= i)


def _prefix(layout: TokenLayout, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return _hybrid(layout, b, i, j) | (layout.prompt[b, i] & layout.prompt[b, j])


RULES: dict[str, Callable[[TokenLayout, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": _causal,
    "hybrid": _hybrid,
    "isolated": _isolated,
    "hybrid_blind": _hybrid_blind,
    "prefix": _prefix,
}
VARIANTS = tuple(RULES)


def predicate(variant: str, layout: TokenLayout) -> Predicate:
    """The variant's rule bound to a layout: ``allowed(b, i, j)`` on broadcastable int64 index tensors → bool.

    Padding is never seen by others. A padded position sees at least itself, since a row of a softmax must not be empty.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in RULES:
        raise ValueError(f"unknown attention variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    rule = RULES[variant]

    def allowed(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = rule(layout, b, i, j) & layout.valid[b, j]
        if layout.turn is not None:
            keep = keep & ((layout.turn[b, j] == 0) | (layout.turn[b, j] == layout.turn[b, i]))
        return keep | (i == j)

    return allowed


def dense_mask(variant: str, layout: TokenLayout, num_new: int | None = None) -> Tensor:
    """Boolean mask (B, 1, num_new, L), True = may attend; for the last `num_new` positions (default: all).

    With `num_new` < L this is the mask of a decoding step: the new tokens over the cache and themselves.
    """
    batch, length = layout.valid.shape
    num_new = length if num_new is None else num_new
    device = layout.valid.device
    b = torch.arange(batch, device=device)[:, None, None]
    i = torch.arange(length - num_new, length, device=device)[None, :, None]
    j = torch.arange(length, device=device)[None, None, :]
    return predicate(variant, layout)(b, i, j)[:, None]


def block_mask(variant: str, layout: TokenLayout):
    """FlexAttention's block mask of the whole sequence (`torch.nn.attention.flex_attention.BlockMask`)."""
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = predicate(variant, layout)
    batch, length = layout.valid.shape

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return allowed(b, q_idx, kv_idx)

    return create_block_mask(mask_mod, batch, None, length, length, device=layout.valid.device.type)
