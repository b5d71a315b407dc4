"""Detector pretraining: plain concepts with its own queries, and steering by oracle queries.

Plain phrases are found with the detector's own learned queries and Hungarian matching, as SAM 3 does. Generic phrases
("shapes" for a random subset) get oracle queries: an MLP of the wanted boxes, one query a box in a fixed assignment and
the rest told to stay empty; so the decoder learns to follow its queries where the phrase says nothing.

Shape suffixes: P phrases, N queries, G ground truths, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instructsam.losses.criterion import SetCriterion, count_targets
from instructsam.models.modeling import InstructSAMModel
from instructsam.models.phrases import find_phrases
from instructsam.pretraining.heads import DenseHead, cell_targets, union_of


class DetectorPretraining(nn.Module):
    """Objective of the run that makes a detector of plain concepts that follows its queries.

    Args:
        model: its ``detector`` and ``phrase_projector`` train; the token embeddings stay as they are, so that the VLM
            can be pretrained beside it.
        criterion: set losses.
        attribute_sizes: number of values of each object attribute.
        jitter: standard deviation of the noise on the oracle's boxes, relative to the box size.
        semantic_weight: weight of the semantic loss (is a pixel of any instance of a plain phrase?).
    """

    def __init__(
        self,
        model: InstructSAMModel,
        criterion: SetCriterion,
        attribute_sizes: list[int],
        jitter: float = 0.1,
        semantic_weight: float = 5.0,
    ):
        super().__init__()
        self.semantic_weight = semantic_weight
        self.model = model
        self.criterion = criterion
        self.jitter = jitter
        size = model.config.detector_size
        self.oracle = nn.Sequential(
            nn.Linear(5, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)
        )
        levels = len(model.config.detector_config.vision_config.scale_factors) - 1
        self.level_heads = nn.ModuleList(DenseHead(size, attribute_sizes) for _ in range(levels))
        for part in (model.vlm, model.query_bank, model.query_projector):
            part.requires_grad_(False)
        model.detector.detr_decoder.query_embed.requires_grad_(True)
        model.detector.mask_decoder.semantic_projection.requires_grad_(True)

    def count_units(self, batch: dict[str, Any]) -> dict[str, float]:
        """Pairs, phrases and images of a batch."""
        counts = {name: float(value) for name, value in count_targets(batch).items()}
        return {**counts, "images": float(len(batch["detector_pixel_values"]))}

    def _oracle_queries(self, boxes_PG4: Tensor, valid_PG: Tensor, slots_PN: Tensor) -> Tensor:
        """(P, N, C): in slot ``slots[p, g]`` the MLP of the jittered box g, elsewhere of zeros."""
        num_phrases, num_queries = slots_PN.shape
        noise = torch.randn_like(boxes_PG4) * self.jitter * boxes_PG4[..., 2:].repeat(1, 1, 2)
        rows = torch.cat([boxes_PG4 + noise, torch.ones_like(boxes_PG4[..., :1])], -1) * valid_PG[..., None]
        inputs = boxes_PG4.new_zeros(num_phrases, num_queries, 5)
        slots_PG = slots_PN[:, : boxes_PG4.shape[1]]
        inputs.scatter_(1, slots_PG[..., None].expand(-1, -1, 5), rows)
        return self.oracle(inputs)

    def forward(self, batch: dict[str, Any], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted loss terms of a batch."""
        model, config = self.model, self.model.config
        input_ids, generic_P = batch["input_ids"], batch["generic"]
        phrases = find_phrases(input_ids, config.token_ids, config.num_queries, config.max_phrase_tokens)
        embeddings = model.get_input_embeddings()(input_ids[phrases.row[:, None], phrases.tokens])
        features = model.detector.encode_image(batch["detector_pixel_values"])

        num_phrases, num_queries = len(phrases), config.num_queries
        slots_PN = torch.rand(num_phrases, num_queries, device=input_ids.device).argsort(-1)
        own = model.detector.detr_decoder.query_embed.weight.expand(num_phrases, -1, -1)
        oracle = self._oracle_queries(batch["target_boxes"], batch["target_valid"], slots_PN)
        queries = torch.where(generic_P[:, None, None], oracle, own)
        phrase_features = model.phrase_projector(embeddings)
        detections = model.detector(features, phrases.row, queries, phrase_features, phrases.mask, with_aux=True)

        # A bonus on the oracle's pairs fixes their assignment; the others are matched freely.
        width = batch["target_valid"].shape[1]
        bonus_PNG = queries.new_zeros(num_phrases, num_queries, width)
        slots_PG = slots_PN[:, :width]
        bonus_PNG.scatter_(1, slots_PG[:, None], 1.0)
        prior_PNG = -1e4 * bonus_PNG * generic_P[:, None, None]
        terms = self.criterion(detections, batch, counts, cost_bias=prior_PNG)

        assert detections.semantic_logits is not None
        union_PHW = union_of(batch).float()
        error_P = F.binary_cross_entropy_with_logits(detections.semantic_logits, union_PHW, reduction="none").mean(
            (1, 2)
        )
        terms["semantic"] = self.semantic_weight * (error_P * ~generic_P).sum() / counts["phrases"].clamp(min=1)
        for level, (head, maps) in enumerate(zip(self.level_heads, features.maps, strict=True)):
            height, width = maps.shape[-2:]
            labels, boxes = cell_targets(
                batch["object_map"], batch["object_attributes"], batch["object_boxes"], (height, width)
            )
            cells = counts["images"].clamp(min=1) * height * width
            terms[f"cells_{level}"] = head(maps.permute(0, 2, 3, 1), labels, boxes, cells)
        return terms
