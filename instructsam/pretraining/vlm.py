"""VLM pretraining: the language model learns to know the scene and to tell its queries which instances are meant.

Language loss on the answers; box and objectness read off the query hidden states of the last layers, and which image
cells their phrase means; attributes and boxes read off the image tokens. The detector does not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from instructsam.losses.criterion import count_targets
from instructsam.losses.language import answer_loss, answer_targets
from instructsam.losses.query_head import QueryBoxHead
from instructsam.models.modeling import InstructSAMModel
from instructsam.pretraining.dataset import MAX_PLACE, num_places
from instructsam.pretraining.heads import DenseHead, PointerHead, cell_targets, union_of


class VLMPretraining(nn.Module):
    """Objective of the run that makes a grounded VLM and a query bank.

    Args:
        model: its ``vlm`` and ``query_bank`` train.
        attribute_sizes: number of values of each object attribute.
        lm_weight: weight of the language loss.
        num_layers: how many of the last layers' hidden states the query heads read.
        pointer_weight: weight of the loss on which image cells a phrase means.
        place_weight: weight of the loss on how a cell's object stands among those like it (`places_of`), read off the
            image tokens before the first layer. The vision tower sees the whole picture, while image tokens of the
            language model see only those before them.
        query_box_weight: weight of the losses on box and objectness of every query. With 0 the queries of a phrase are
            taught together only, which says nothing about how they share out its instances.
    """

    def __init__(
        self,
        model: InstructSAMModel,
        attribute_sizes: list[int],
        lm_weight: float = 0.3,
        num_layers: int = 3,
        pointer_weight: float = 10.0,
        query_box_weight: float = 1.0,
        place_weight: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.query_head = QueryBoxHead(model.config.hidden_size, num_layers) if query_box_weight > 0 else None
        self.query_box_weight = query_box_weight
        self.pointer_heads = nn.ModuleList(PointerHead(model.config.hidden_size) for _ in range(num_layers))
        # What a cell shows must be known before the first layer, so that words can be compared with it, and at the end.
        self.image_heads = nn.ModuleList(DenseHead(model.config.hidden_size, attribute_sizes) for _ in range(2))
        self.place_weight = place_weight
        self.place_head = None
        if place_weight > 0:
            sizes = [MAX_PLACE] * num_places(len(attribute_sizes))
            self.place_head = DenseHead(model.config.hidden_size, sizes, with_box=False)
        self.lm_weight = lm_weight
        self.pointer_weight = pointer_weight
        self.num_layers = num_layers
        for part in (model.detector, model.query_projector, model.phrase_projector):
            part.requires_grad_(False)

    def count_units(self, batch: dict[str, Any]) -> dict[str, float]:
        """Pairs, phrases, trained tokens and image tokens of a batch."""
        image_tokens = (batch["input_ids"] == self.model.config.vlm_config.image_token_id).sum()
        counts = {name: float(value) for name, value in count_targets(batch).items()}
        return {
            **counts,
            "tokens": float(len(answer_targets(batch, self.model.config.token_ids).token_T)),
            "cells": float(image_tokens),
        }

    def forward(self, batch: dict[str, Any], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted loss terms of a batch."""
        model, input_ids = self.model, batch["input_ids"]
        language = model.run_language_model(
            input_ids,
            batch["attention_mask"],
            batch["pixel_values"],
            batch["image_grid_thw"],
            turn_ids=batch.get("turn_ids"),
            output_hidden_states=True,
        )
        targets = answer_targets(batch, model.config.token_ids)
        spoken = answer_loss(language.hidden_BLC, targets, model.lm_logits, counts["tokens"])
        terms = {"language": self.lm_weight * spoken}
        assert language.all_hidden is not None and language.image_tokens is not None
        image_tokens = language.image_tokens
        phrases = language.phrases
        hidden = language.query_states(self.num_layers)
        if self.query_head is not None:
            boxes, _ = self.query_head(hidden, batch["target_boxes"], batch["target_valid"], counts)
            terms |= {name: self.query_box_weight * value for name, value in boxes.items()}
        merge = model.config.vlm_config.vision_config.spatial_merge_size
        grid = batch["image_grid_thw"]
        assert bool((grid == grid[:1]).all()), "pretraining images are of one size"
        height, width = (grid[0, 1:] // merge).tolist()
        union_PHW = union_of(batch)

        def cells_of(states_BLC: Tensor) -> Tensor:
            return states_BLC[image_tokens].view(len(input_ids), height, width, -1)

        pointed = input_ids.new_zeros((), dtype=torch.float32)
        for head, states, queries in zip(
            self.pointer_heads, language.all_hidden[-self.num_layers :], hidden, strict=True
        ):
            pointed = pointed + head(queries, cells_of(states), phrases.row, union_PHW, counts["phrases"].clamp(min=1))
        terms["pointer"] = self.pointer_weight * pointed / self.num_layers
        known_BOK = torch.cat([batch["object_attributes"], batch["object_places"]], -1)
        shown, boxes = cell_targets(batch["object_map"], known_BOK, batch["object_boxes"], (height, width))
        num_attributes = batch["object_attributes"].shape[-1]
        labels, places = shown[..., :num_attributes], shown[..., num_attributes:]
        cells = counts["cells"].clamp(min=1)
        for name, head, states in zip(
            ("input_cells", "output_cells"),
            self.image_heads,
            (language.all_hidden[0], language.hidden_BLC),
            strict=True,
        ):
            terms[name] = head(cells_of(states), labels, boxes, cells)
        if self.place_head is not None:
            error = self.place_head(cells_of(language.all_hidden[0]), places, boxes, cells)
            terms["places"] = self.place_weight * error / len(self.place_head.sizes)
        return terms
