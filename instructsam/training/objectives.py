"""The training objective of InstructSAM: set losses and language loss, end to end (DESIGN section 6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from instructsam.losses.criterion import SetCriterion, count_targets
from instructsam.losses.language import language_loss, language_targets
from instructsam.losses.query_head import QueryBoxHead
from instructsam.models.modeling import InstructSAM


class InstructionObjective(nn.Module):
    """Model and criterion behind one forward pass, as DDP needs it.

    Args:
        model: the model that trains.
        criterion: set losses.
        lm_weight: weight of the language loss (1 in the release).
        query_box_weight: weight of a throw-away head that reads box and objectness off the query hidden states
            (0 = off, as in the release; it helps models that start from little).
        query_box_layers: how many of the last layers that head reads.
    """

    def __init__(
        self,
        model: InstructSAM,
        criterion: SetCriterion,
        lm_weight: float = 1.0,
        query_box_weight: float = 0.0,
        query_box_layers: int = 3,
    ):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lm_weight = lm_weight
        self.query_box_weight = query_box_weight
        self.query_head = QueryBoxHead(model.config.hidden_size, query_box_layers) if query_box_weight > 0 else None

    @property
    def _ignored(self) -> list[int]:
        ids = self.model.config.token_ids
        return [ids["seg"], ids["mask_end"]]

    def count_units(self, batch: dict[str, Any]) -> dict[str, float]:
        """Matched pairs, phrases and trained tokens of a micro batch."""
        targets = language_targets(batch["input_ids"], batch["labels"], self._ignored)
        counts = {name: float(value) for name, value in count_targets(batch).items()}
        return {**counts, "tokens": float(len(targets.token_T))}

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
        row, position, token = language_targets(batch["input_ids"], batch["labels"], self._ignored)
        logits = self.model.lm_logits(output.language.hidden_BLC[row, position])
        terms = {"language": self.lm_weight * language_loss(logits, token, counts["tokens"])}
        terms |= self.criterion(output.detections, batch, counts)
        if self.query_head is not None:
            phrases, layers = output.language.phrases, len(self.query_head.heads)
            assert output.language.all_hidden is not None
            hidden = [h[phrases.row[:, None], phrases.queries] for h in output.language.all_hidden[-layers:]]
            boxes = self.query_head(hidden, batch["target_boxes"], batch["target_valid"], counts)
            terms |= {name: self.query_box_weight * value for name, value in boxes.items()}
        return terms
