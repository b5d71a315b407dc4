"""Throw-away head that reads off the query hidden states which boxes are meant, for models that start from little.

Shape suffixes: P phrases, N queries, G ground truths, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructsam.losses.boxes import cxcywh_to_xyxy, giou_per_pair
from instructsam.losses.matching import assign


class QueryBoxHead(nn.Module):
    """Reads box and objectness off the hidden states of instance queries, Hungarian-matched per phrase."""

    def __init__(self, channels: int, num_layers: int):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, 5))
            for _ in range(num_layers)
        )

    def forward(
        self, hidden: list[Tensor], boxes_PG4: Tensor, valid_PG: Tensor, counts: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms of the hidden states (P, N, C) of several layers against boxes cxcywh in 0…1.

        Returns:
            The terms, and the matching cost (P, N, G) by the last layer's boxes and objectness.
        """
        total_box = boxes_PG4.new_zeros(())
        total_object = boxes_PG4.new_zeros(())
        outputs = [head(states).float() for head, states in zip(self.heads, hidden, strict=True)]
        costs = [self._cost(output, boxes_PG4) for output in outputs]
        for output, (phrase, query, target) in zip(outputs, assign(costs, valid_PG), strict=True):
            boxes, truth = output[phrase, query, :4].sigmoid(), boxes_PG4[phrase, target]
            overlap = giou_per_pair(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
            total_box = total_box + (5 * (boxes - truth).abs().sum() + 2 * (1 - overlap).sum())
            is_object = torch.zeros_like(output[..., 4])
            is_object[phrase, query] = 1.0
            total_object = total_object + F.binary_cross_entropy_with_logits(output[..., 4], is_object, reduction="sum")
        layers = len(outputs)
        num_queries = outputs[0].shape[1]
        terms = {
            "query_box": total_box / counts["pairs"].clamp(min=1) / layers,
            "query_object": 2 * total_object / counts["phrases"].clamp(min=1) / num_queries / layers,
        }
        return terms, costs[-1]

    @staticmethod
    @torch.no_grad()
    def _cost(output: Tensor, boxes_PG4: Tensor) -> Tensor:
        boxes_PN4 = output[..., :4].sigmoid()
        distance = (boxes_PN4[:, :, None] - boxes_PG4[:, None]).abs().sum(-1)
        pairs = torch.broadcast_tensors(boxes_PN4[:, :, None], boxes_PG4[:, None])
        overlap = giou_per_pair(cxcywh_to_xyxy(pairs[0]), cxcywh_to_xyxy(pairs[1]))
        return 5 * distance - 2 * overlap + F.softplus(-output[..., 4])[:, :, None]
