"""Where the phrases of an answer and their query blocks lie, read off the token ids alone.

Training, single-pass inference and decoding all find phrases here, so that they cannot disagree.

Shape suffixes: B batch, L sequence, P phrases, N queries, T phrase tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PhraseIndex:
    """The phrases of a batch on one axis P, ordered by batch row, then by position.

    Attributes:
        row: (P,) int64, batch row (= image) of each phrase.
        queries: (P, N) int64, positions of the phrase's queries in its row.
        tokens: (P, T) int64, positions of the phrase's tokens in its row (0 where masked); T ≥ 1, the longest's.
        mask: (P, T) bool, True = token.
    """

    row: Tensor
    queries: Tensor
    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.row)


def find_phrases(
    input_ids: Tensor, token_ids: dict[str, int], num_queries: int, max_tokens: int, with_markers: bool = False
) -> PhraseIndex:
    """Find every phrase that is followed by a query block.

    Args:
        input_ids: (B, L) int64.
        token_ids: ids of ref_start, ref_end, seg.
        num_queries: N.
        max_tokens: longer phrases are cut to their first tokens (markers count, if they belong to it).
        with_markers: count ``<|object_ref_start|>`` and ``<|object_ref_end|>`` to the phrase (a quirk of the release).

    Raises:
        ValueError: a block that is not N long, or one without a phrase before it (names the row).
    """
    length = input_ids.shape[1]
    device = input_ids.device
    row, position = torch.nonzero(input_ids == token_ids["seg"], as_tuple=True)
    if len(row) % num_queries:
        raise ValueError(f"{len(row)} [SEG] tokens in the batch are not a multiple of num_queries={num_queries}")
    queries = position.view(-1, num_queries)
    row = row.view(-1, num_queries)
    steps = torch.arange(num_queries, device=device)
    if not bool(((queries == queries[:, :1] + steps) & (row == row[:, :1])).all()):
        bad = (~((queries == queries[:, :1] + steps) & (row == row[:, :1])).all(-1)).nonzero()[0, 0]
        raise ValueError(f"batch row {int(row[bad, 0])}: a query block is not {num_queries} consecutive [SEG] tokens")
    row = row[:, 0]

    # The last marker of each kind at or before every position.
    positions = torch.arange(length, device=device)

    def last(marker: str) -> Tensor:
        return torch.where(input_ids == token_ids[marker], positions, -1).cummax(-1).values

    start = last("ref_start")[row, queries[:, 0]]
    end = last("ref_end")[row, queries[:, 0]]
    if bool(((start < 0) | (end <= start + 1)).any()):
        bad_row = int(row[((start < 0) | (end <= start + 1)).nonzero()[0, 0]])
        raise ValueError(
            f"batch row {bad_row}: a query block without a phrase between <|object_ref_start|> and <|object_ref_end|>"
        )
    first = start if with_markers else start + 1
    count = (end - start + 1 if with_markers else end - start - 1).clamp(max=max_tokens)
    width = max(int(count.max()), 1) if len(count) else 1
    offsets = torch.arange(width, device=device)
    mask = offsets < count[:, None]
    tokens = torch.where(mask, first[:, None] + offsets, 0)
    return PhraseIndex(row, queries, tokens, mask)
