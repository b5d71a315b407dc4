"""The training objective of InstructSAM: set losses and language loss, end to end (DESIGN section 6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from instructsam.losses.criterion import SetCriterion, count_targets
from instructsam.losses.language import answer_loss, answer_targets
from instructsam.losses.query_head import QueryBoxHead
from instructsam.models.modeling import InstructSAMModel


class InstructionObjective(nn.Module):
    """Model and criterion behind one forward pass, as DDP needs it.

    Args:
        model: the model that trains.
        criterion: set losses.
        lm_weight: weight of the language loss (1 in the release).
        query_box_weight: weight of a throw-away head that reads box and objectness off the query hidden states
            (0 = off, as in the release; it helps models that start from little).
        query_box_layers: how many of the last layers that head reads.
        query_cost_weight: weight of that head's matching cost in the matching of the set losses, so that a query is
            taught to find the instance that its hidden state is about (0 = off, as in the release).
    """

    def __init__(
        self,
        model: InstructSAMModel,
        criterion: SetCriterion,
        lm_weight: float = 1.0,
        query_box_weight: float = 0.0,
        query_box_layers: int = 3,
        query_cost_weight: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lm_weight = lm_weight
        if query_cost_weight > 0 and not query_box_weight > 0:
            raise ValueError(f"query_cost_weight={query_cost_weight} needs the head of query_box_weight, which is off")
        self.query_box_weight = query_box_weight
        self.query_cost_weight = query_cost_weight
        self.query_head = QueryBoxHead(model.config.hidden_size, query_box_layers) if query_box_weight > 0 else None

    def count_units(self, batch: dict[str, Any]) -> dict[str, float]:
        """Matched pairs, phrases and trained tokens of a micro batch."""
        counts = {name: float(value) for name, value in count_targets(batch).items()}
        return {**counts, "tokens": float(len(answer_targets(batch, self.model.config.token_ids).token_T))}

    def forward(self, batch: dict[str, Any], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted loss terms; every trainable parameter is connected to their sum, also without any mask."""
        output = self.model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["pixel_values"],
            batch["image_grid_thw"],
            batch["detector_pixel_values"],
            position_ids=batch.get("position_ids"),
            turn_ids=batch.get("turn_ids"),
            with_aux=self.criterion.config.aux > 0,
            output_hidden_states=self.query_head is not None,
        )
        model, hidden_BLC = self.model, output.language.hidden_BLC
        targets = answer_targets(batch, model.config.token_ids)
        terms = {"language": self.lm_weight * answer_loss(hidden_BLC, targets, model.lm_logits, counts["tokens"])}
        cost_bias = None
        if self.query_head is not None:
            hidden = output.language.query_states(len(self.query_head.heads))
            boxes, cost_PNG = self.query_head(hidden, batch["target_boxes"], batch["target_valid"], counts)
            terms |= {name: self.query_box_weight * value for name, value in boxes.items()}
            if self.query_cost_weight > 0:
                cost_bias = self.query_cost_weight * cost_PNG
        return terms | self.criterion(output.detections, batch, counts, cost_bias=cost_bias)
