"""The bridge from language model to detector: the query bank and the projectors (DESIGN section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QueryBank(nn.Module):
    """The N learnable instance queries, one row each; every phrase gets the same bank.

    Attributes:
        weight: (N, C) in the language model's width.
    """

    def __init__(self, num_queries: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_queries, hidden_size))

    @torch.no_grad()
    def initialise(self, how: str, std: float, seg_embedding: Tensor | None) -> None:
        """Fill the bank: ``zeros``, ``normal`` with `std`, or copies of ``[SEG]``'s embedding (C,)."""
        if how == "zeros":
            self.weight.zero_()
        elif how == "normal":
            self.weight.normal_(std=std)
        else:
            assert seg_embedding is not None
            self.weight.copy_(seg_embedding.expand_as(self.weight))

    def forward(self, embeddings_BLC: Tensor, is_query_BL: Tensor) -> Tensor:
        """Replace the embeddings at query positions; blocks of N consecutive positions in row-major order."""
        num_queries = self.weight.shape[0]
        blocks = int(is_query_BL.sum()) // num_queries
        bank = self.weight.to(embeddings_BLC.dtype).repeat(blocks, 1)
        return embeddings_BLC.masked_scatter(is_query_BL[..., None], bank)


def build_projector(kind: str, hidden_size: int, detector_size: int) -> nn.Sequential:
    """Language width → detector width: ``mlp`` = Linear, ReLU, Linear (the release's layout 0, 2); ``linear``."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(hidden_size, detector_size))
    return nn.Sequential(
        nn.Linear(hidden_size, hidden_size), nn.ReLU(inplace=False), nn.Linear(hidden_size, detector_size)
    )
