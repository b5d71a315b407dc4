"""The set criterion: matching, mask, class, and optional box and auxiliary losses of a batch (DESIGN section 6).

Every term is a sum over its units divided by a count given from outside. With counts that are summed over ranks and
accumulation steps, the gradients of the parts add up to that of the whole batch, however it was split. (DDP averages
over ranks: multiply the loss by the number of ranks there.)

Shape suffixes: P phrases, N queries, G ground truths, H W pixels, M matched pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructsam.losses.boxes import giou_loss_per_pair, l1_per_pair
from instructsam.losses.language import at_least_one
from instructsam.losses.mask_losses import PointSampling, mask_losses
from instructsam.losses.matching import MaskSums, Matches, assign, mask_sums, matching_cost

SOFT_TARGET_EPS = 1e-6


class Detections(Protocol):
    """What the criterion reads of a model's output: attributes, so that any such object will do."""

    @property
    def pred_masks(self) -> Tensor: ...  # (P, N, H, W) logits
    @property
    def pred_logits(self) -> Tensor: ...  # (P, N) logits
    @property
    def pred_boxes(self) -> Tensor: ...  # (P, N, 4) xyxy in 0…1


@dataclass(frozen=True)
class CriterionConfig:
    """Weights and settings of the set losses; the defaults are the release's.

    Attributes:
        mask_bce, mask_dice: weights of the mask losses, averaged over matched pairs.
        mask_projection: weight of the projection loss that replaces both for box-only phrases.
        cls: weight of the class loss, averaged over phrases.
        box_l1, box_giou: weights of the box losses, averaged over matched pairs; 0 is off.
        presence: weight of the presence loss (is there any instance?), for models with a presence token only.
        aux: factor on the same losses of every earlier decoder layer, matched anew; 0 is off.
        cost_dice, cost_bce, cost_cls: weights of the matching cost.
        min_soft_target: floor of a matched query's class target.
        points: mask losses on sampled points instead of all pixels.
    """

    mask_bce: float = 4.0
    mask_dice: float = 0.25
    mask_projection: float = 0.5
    cls: float = 1.0
    box_l1: float = 0.0
    box_giou: float = 0.0
    presence: float = 1.0
    aux: float = 0.0
    cost_dice: float = 0.5
    cost_bce: float = 2.0
    cost_cls: float = 1.0
    min_soft_target: float = 0.1
    points: PointSampling = field(default_factory=PointSampling)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "points":
                if not isinstance(value, PointSampling):
                    raise ValueError(f"points must be a PointSampling, not {type(value).__name__}")
            elif not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"criterion weight {item.name}={value!r} must be a finite number ≥ 0")
        if self.min_soft_target > 1:
            raise ValueError(f"min_soft_target={self.min_soft_target} must lie in 0…1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CriterionConfig:
        """Build from a plain mapping (a configuration file), `points` being a mapping itself.

        Raises:
            ValueError: an unknown name, or a value out of range.
        """
        settings = dict(values)
        _reject_unknown(settings, {item.name for item in fields(cls)}, "criterion")
        points = settings.pop("points", None)
        if points is not None and not isinstance(points, PointSampling):
            points = dict(points)
            _reject_unknown(points, {item.name for item in fields(PointSampling)}, "criterion.points")
            points = PointSampling(**points)
        return cls(**settings, points=points or PointSampling())


def _reject_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")


@torch.no_grad()
def count_targets(targets: Mapping[str, Any]) -> dict[str, Tensor]:
    """This batch's share of the global counts: float32 scalars ``pairs`` (matched pairs) and ``phrases``."""
    valid_PG = targets["target_valid"]
    phrases = torch.full((), float(valid_PG.shape[0]), device=valid_PG.device)
    return {"pairs": valid_PG.sum().float(), "phrases": phrases}


@torch.no_grad()
def soft_class_targets(pred_logits_PN: Tensor, matches: Matches, sums_M: MaskSums, floor: float) -> Tensor:
    """Class targets (P, N) float32: max(dice score, floor) of matched queries on full masks, 0 for the rest."""
    targets_PN = torch.zeros_like(pred_logits_PN, dtype=torch.float32)
    targets_PN[matches.phrase_M, matches.query_M] = sums_M.dice_score(SOFT_TARGET_EPS).clamp(min=floor)
    return targets_PN


class SetCriterion(nn.Module):
    """Set losses of a batch of phrases; holds no parameters.

    Example:
        >>> criterion = SetCriterion(CriterionConfig(aux=1.0))
        >>> terms = criterion(output.detections, batch, {"pairs": pairs, "phrases": phrases})
        >>> loss = sum(terms.values())
    """

    def __init__(self, config: CriterionConfig | None = None):
        super().__init__()
        self.config = config or CriterionConfig()

    def forward(
        self,
        outputs: Detections,
        targets: Mapping[str, Any],
        counts: Mapping[str, Tensor | float],
        generator: torch.Generator | None = None,
        cost_bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted loss terms, float32 scalars; their sum is the set loss.

        Args:
            outputs: ``pred_masks`` (P, N, H, W), ``pred_logits`` (P, N), ``pred_boxes`` (P, N, 4) xyxy in 0…1; where
                the model has them ``presence_logits`` (P, 1) and ``aux`` (list of the same for earlier layers).
            targets: ``target_masks`` (P, G, H, W) bool or 0…1, ``target_valid`` (P, G) bool; optionally
                ``target_box_only`` (P,) bool, and for box losses ``target_boxes`` (P, G, 4) cxcywh in 0…1.
            counts: ``pairs`` and ``phrases`` over all ranks and accumulation steps (see `count_targets`).
            generator: source of sampled points.
            cost_bias: (P, N, G) added to the matching cost of every layer, where something is known of who belongs to
                whom.

        Returns:
            ``mask_bce``, ``mask_dice``, ``cls``; with `target_box_only` also ``mask_projection``; ``box_l1``,
            ``box_giou``, ``presence`` where they are on; each of them again as ``aux_…``, summed over earlier layers.
            Every tensor of `outputs` is connected to the sum, also when P or G is 0 (then with zero gradient).

        Raises:
            ValueError: shapes that do not fit, more targets than queries, non-finite predictions, missing boxes or aux.
        """
        config = self.config
        earlier: Sequence[Detections] = getattr(outputs, "aux", None) or []
        if config.aux > 0 and getattr(outputs, "aux", None) is None:
            raise ValueError("criterion.aux > 0, but the model's output carries no earlier decoder layers")
        layers = [outputs, *earlier] if config.aux > 0 else [outputs]
        for layer in layers:
            self._check(layer, targets)

        with torch.autocast(outputs.pred_masks.device.type, enabled=False):
            sums = [mask_sums(layer.pred_masks, targets["target_masks"]) for layer in layers]
            costs = [self._cost(s, layer) for s, layer in zip(sums, layers, strict=True)]
            if cost_bias is not None:
                costs = [cost + cost_bias for cost in costs]
            matches = assign(costs, targets["target_valid"])
            terms: dict[str, Tensor] = {}
            for index, (layer, layer_sums, pairs) in enumerate(zip(layers, sums, matches, strict=True)):
                found = self._layer_terms(layer, layer_sums.at(pairs), pairs, targets, counts, generator)
                for name, value in found.items():
                    if index == 0:
                        terms[name] = value
                    else:
                        terms[f"aux_{name}"] = terms.get(f"aux_{name}", 0) + config.aux * value
            # Outputs without a loss (boxes in the release) stay in the graph, or DDP would wait for their gradients.
            # Masks and class logits of the layers in use are in it already, through indexing, even with no pair at all.
            unused: list[Tensor | None] = [layer.pred_boxes for layer in [outputs, *earlier]]
            unused += [getattr(layer, "presence_logits", None) for layer in [outputs, *earlier]]
            if config.aux == 0:
                unused += [tensor for layer in earlier for tensor in (layer.pred_masks, layer.pred_logits)]
            for tensor in unused:
                if tensor is not None:
                    terms["cls"] = terms["cls"] + _nothing(tensor)
        return terms

    def _cost(self, sums: MaskSums, layer: Detections) -> Tensor:
        config = self.config
        return matching_cost(sums, layer.pred_logits, config.cost_dice, config.cost_bce, config.cost_cls)

    def _layer_terms(
        self,
        layer: Detections,
        sums_M: MaskSums,
        pairs: Matches,
        targets: Mapping[str, Any],
        counts: Mapping[str, Tensor | float],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Weighted and normalised terms of one decoder layer."""
        config = self.config
        logits_PN = layer.pred_logits.float()
        per_pair, per_phrase = (at_least_one(counts[unit], logits_PN) for unit in ("pairs", "phrases"))
        phrase, query, target = pairs

        box_only_P = targets.get("target_box_only")
        masks = mask_losses(
            _take(layer.pred_masks, phrase, query),
            _take(targets["target_masks"], phrase, target),
            None if box_only_P is None else box_only_P[phrase],
            config.points,
            generator,
            sums_M,
        )
        soft_PN = soft_class_targets(logits_PN, pairs, sums_M, config.min_soft_target)
        class_PN = F.binary_cross_entropy_with_logits(logits_PN, soft_PN, reduction="none")
        terms = {
            "mask_bce": config.mask_bce * masks.bce_M.sum() / per_pair,
            "mask_dice": config.mask_dice * masks.dice_M.sum() / per_pair,
            "cls": config.cls * class_PN.mean(-1).sum() / per_phrase,
        }
        if box_only_P is not None:
            terms["mask_projection"] = config.mask_projection * masks.projection_M.sum() / per_pair
        if config.box_l1 > 0 or config.box_giou > 0:
            boxes_M4, truth_M4 = _take(layer.pred_boxes, phrase, query), _take(targets["target_boxes"], phrase, target)
            terms["box_l1"] = config.box_l1 * l1_per_pair(boxes_M4, truth_M4).sum() / per_pair
            terms["box_giou"] = config.box_giou * giou_loss_per_pair(boxes_M4, truth_M4).sum() / per_pair
        presence_P1 = getattr(layer, "presence_logits", None)
        if presence_P1 is not None and config.presence > 0:
            present_P1 = targets["target_valid"].any(-1, keepdim=True).float()
            presence = F.binary_cross_entropy_with_logits(presence_P1.float(), present_P1, reduction="sum")
            terms["presence"] = config.presence * presence / per_phrase
        return terms

    def _check(self, layer: Detections, targets: Mapping[str, Any]) -> None:
        """Shapes, before broadcasting can hide a mistake."""
        phrases, queries, height, width = layer.pred_masks.shape
        valid = tuple(targets["target_valid"].shape)
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "pred_logits": (layer.pred_logits, (phrases, queries)),
            "pred_boxes": (layer.pred_boxes, (phrases, queries, 4)),
            "target_masks": (targets["target_masks"], (phrases, valid[-1], height, width)),
            "target_valid": (targets["target_valid"], (phrases, valid[-1])),
        }
        if self.config.box_l1 > 0 or self.config.box_giou > 0:
            if targets.get("target_boxes") is None:
                raise ValueError("box losses are on, but the batch has no target_boxes")
            expected["target_boxes"] = (targets["target_boxes"], (phrases, valid[-1], 4))
        if targets.get("target_box_only") is not None:
            expected["target_box_only"] = (targets["target_box_only"], (phrases,))
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside pred_masks of shape "
                    f"{tuple(layer.pred_masks.shape)}"
                )


def _nothing(tensor: Tensor) -> Tensor:
    """Zero that depends on the tensor in the graph only: the sum of an empty slice (0 · NaN would be NaN)."""
    return tensor[..., :0].float().sum()


def _take(values_PK: Tensor, phrase_M: Tensor, index_M: Tensor) -> Tensor:
    """Rows ``values[phrase, index]``, (M, …); several times faster than advanced indexing, backward too."""
    return values_PK.flatten(0, 1).index_select(0, phrase_M * values_PK.shape[1] + index_M)
