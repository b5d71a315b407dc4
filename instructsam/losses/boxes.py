"""Box conversions and the box losses of matched pairs, an option that is off in the release (DESIGN section 6).

Boxes are relative to the image (0…1). Shape suffix: M matched pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(…, 4) centre and size → corners."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(…, 4) corners → centre and size."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def l1_per_pair(pred_xyxy_M4: Tensor, target_cxcywh_M4: Tensor) -> Tensor:
    """Sum over cx, cy, w, h of the absolute differences, (M,) float32."""
    return (xyxy_to_cxcywh(pred_xyxy_M4.float()) - target_cxcywh_M4.float()).abs().sum(-1)


def giou_per_pair(a_xyxy_M4: Tensor, b_xyxy_M4: Tensor) -> Tensor:
    """Generalised IoU in −1…1 of box i of `a` with box i of `b`, (M,) float32; 0-area pairs stay finite."""
    a, b = a_xyxy_M4.float(), b_xyxy_M4.float()
    # The smallest normal step keeps 0/0 away without moving any box of at least a millionth of the image's side.
    eps = torch.finfo(torch.float32).eps
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    return overlap / union.clamp(min=eps) - (hull - union) / hull.clamp(min=eps)


def giou_loss_per_pair(pred_xyxy_M4: Tensor, target_cxcywh_M4: Tensor) -> Tensor:
    """1 − GIoU of every matched pair, (M,) float32."""
    return 1 - giou_per_pair(pred_xyxy_M4, cxcywh_to_xyxy(target_cxcywh_M4.float()))
