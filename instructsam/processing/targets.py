"""Training targets: instance masks at mask resolution and boxes, padded over the phrases of a batch.

Shape suffixes: P phrases, G ground truths, H W mask resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from instructsam.structures import PhraseTarget

MASK_RESIZES = ("nearest", "nearest-exact", "area")


def resize_nearest(masks_HWG: np.ndarray, size: tuple[int, int], mode: str = "nearest") -> np.ndarray:
    """Nearest resize of (H, W, G) to (h, w, G), taking the pixels that `F.interpolate` takes in this mode.

    "nearest" (the release's) takes the first pixel of every cell, so that masks which are upsampled again lie half a
    cell too far right and down; "nearest-exact" takes the one in the middle.
    """
    height, width = masks_HWG.shape[:2]
    offset = np.float32(0.5 if mode == "nearest-exact" else 0.0)
    rows = ((np.arange(size[0], dtype=np.float32) + offset) * np.float32(height / size[0])).astype(np.int64)
    columns = ((np.arange(size[1], dtype=np.float32) + offset) * np.float32(width / size[1])).astype(np.int64)
    return masks_HWG[rows.clip(max=height - 1)][:, columns.clip(max=width - 1)]


def covered_share(masks_HWG: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Share of each cell that a mask covers: (H, W, G) to (G, h, w) float32 in 0…1.

    A model that learns it knows a contour to a fraction of a cell: its logits cross 0 where half a cell is covered.
    From hard targets it learns large logits on both sides of the contour; where those outside are larger, masks come
    out too small by up to half a cell all around.
    """
    masks_GHW = torch.from_numpy(np.ascontiguousarray(masks_HWG.transpose(2, 0, 1)))
    return F.adaptive_avg_pool2d(masks_GHW.float(), size)


def phrase_targets(
    target: PhraseTarget, mask_size: tuple[int, int], mask_resize: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Masks (G, h, w) and boxes (G, 4) float32, cxcywh in 0…1 of the image, of one phrase.

    Args:
        mask_resize: "nearest" or "nearest-exact" (`resize_nearest`, bool), or "area" (`covered_share`, float32).
    """
    if not target.rles:
        return torch.zeros(0, *mask_size, dtype=torch.bool), torch.zeros(0, 4)
    masks_HWG = coco_mask.decode(list(target.rles))
    height, width = masks_HWG.shape[:2]
    boxes = coco_mask.toBbox(list(target.rles)) / np.array([width, height, width, height])
    boxes[:, :2] += boxes[:, 2:] / 2
    if mask_resize == "area":
        masks_GHW = covered_share(masks_HWG, mask_size)
    else:
        masks_GHW = torch.from_numpy(resize_nearest(masks_HWG, mask_size, mask_resize)).permute(2, 0, 1).bool()
    return masks_GHW, torch.from_numpy(boxes).float()


def collate_targets(
    targets: Sequence[tuple[Tensor, Tensor]], box_only: Sequence[bool], mask_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Pad phrases to the largest G of the batch: target_masks, target_boxes, target_valid, target_box_only.

    target_masks are bool, or float32 as soon as one phrase's are.
    """
    num_phrases = len(targets)
    most = max((len(masks) for masks, _ in targets), default=0)
    dtype = torch.float32 if any(masks.is_floating_point() for masks, _ in targets) else torch.bool
    masks_PGHW = torch.zeros(num_phrases, most, *mask_size, dtype=dtype)
    boxes_PG4 = torch.zeros(num_phrases, most, 4)
    valid_PG = torch.zeros(num_phrases, most, dtype=torch.bool)
    for p, (masks, boxes) in enumerate(targets):
        masks_PGHW[p, : len(masks)] = masks
        boxes_PG4[p, : len(boxes)] = boxes
        valid_PG[p, : len(masks)] = True
    return {
        "target_masks": masks_PGHW,
        "target_boxes": boxes_PG4,
        "target_valid": valid_PG,
        "target_box_only": torch.tensor(list(box_only), dtype=torch.bool),
    }
