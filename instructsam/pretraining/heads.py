"""Throw-away heads of the pretraining runs: what an image cell shows, and which cells a phrase means.

Shape suffixes: B batch, P phrases, N queries, O objects, C channels, H W cells, A attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseHead(nn.Module):
    """Reads off every cell the attributes and the box of the object that covers it (background = class 0).

    Args:
        channels: width of the features.
        attribute_sizes: number of values of each attribute, without background.
        with_box: False leaves the box out.
    """

    def __init__(self, channels: int, attribute_sizes: list[int], with_box: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.sizes = [size + 1 for size in attribute_sizes]
        self.classes = nn.Linear(channels, sum(self.sizes))
        self.box = nn.Linear(channels, 4) if with_box else None

    def forward(self, features_BHWC: Tensor, labels_BHWA: Tensor, boxes_BHW4: Tensor, count: Tensor) -> Tensor:
        """Cross-entropy of all attributes + L1 of the box (cxcywh in 0…1) on covered cells, summed / `count` cells."""
        normed = self.norm(features_BHWC)
        loss = normed.new_zeros(())
        for logits, labels in zip(self.classes(normed).split(self.sizes, -1), labels_BHWA.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="sum")
        if self.box is not None:
            covered = (labels_BHWA[..., :1] > 0).float()
            loss = loss + 5 * ((self.box(normed).sigmoid() - boxes_BHW4).abs() * covered).sum()
        return loss / count


def cell_targets(
    object_map_BHW: Tensor, attributes_BOA: Tensor, boxes_BO4: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Labels (B, h, w, A) and boxes (B, h, w, 4) of the cells of a grid.

    Args:
        object_map_BHW: int64, 1 + index of the visible object at every pixel, 0 background.
        attributes_BOA: int64, 1 + value; row 0 is the background, all zeros.
        boxes_BO4: cxcywh in 0…1; row 0 zeros.
        size: (h, w) of the grid; the pixel at a cell's centre decides.
    """
    height, width = object_map_BHW.shape[1:]
    rows = ((torch.arange(size[0]) + 0.5) * height / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * width / size[1]).long()
    cells = object_map_BHW[:, rows.to(object_map_BHW.device)][:, :, columns.to(object_map_BHW.device)]
    batch = torch.arange(len(cells), device=cells.device)[:, None, None]
    return attributes_BOA[batch, cells], boxes_BO4[batch, cells]


def union_of(batch: Mapping[str, Tensor]) -> Tensor:
    """(P, H, W) bool, the pixels of any instance of a phrase; of soft masks what they cover by more than half."""
    return ((batch["target_masks"] > 0.5) & batch["target_valid"][..., None, None]).any(1)


class PointerHead(nn.Module):
    """Which image cells does a phrase mean? The mean of its queries' states against those of the image tokens."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.key = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(
        self, queries_PNC: Tensor, cells_BHWC: Tensor, image_P: Tensor, union_PHW: Tensor, count: Tensor
    ) -> Tensor:
        """Binary cross-entropy against the covered share of each cell, mean over cells, summed over phrases / `count`.

        Args:
            union_PHW: bool, pixels of any instance of the phrase, at any resolution.
        """
        keys_BHWC = self.key(cells_BHWC)
        logits = torch.einsum("pc,phwc->phw", self.query(queries_PNC.mean(1)), keys_BHWC[image_P])
        logits = logits / keys_BHWC.shape[-1] ** 0.5 + self.bias
        share = F.adaptive_avg_pool2d(union_PHW.float(), (cells_BHWC.shape[1], cells_BHWC.shape[2]))
        return F.binary_cross_entropy_with_logits(logits, share, reduction="none").mean((1, 2)).sum() / count
