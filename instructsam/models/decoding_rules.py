"""How the language model runs over an answer: as it was trained, or as the released inference code does it.

``trained`` honours the rule of DESIGN section 7: decoding equals a teacher-forced forward. ``released`` departs from it
in four ways (the released code departs from its own training), so that published behaviour can be compared. Each is one
attribute of `DecodingRule`; the fixture's ``released_decode.*`` pin their exact meaning.

Shape suffixes: B batch, L sequence, K tokens of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from instructsam.models.attention_mask import TokenLayout
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.modeling import InstructSAMModel, LanguageOutput, VisionFeatures
from instructsam.models.phrases import PhraseIndex, find_phrases


@dataclass(frozen=True)
class DecodingRule:
    """Positions, attention layout and phrase tokens of prompts and answers.

    Attributes:
        name: for records and error messages.
        sequential_positions: every token, image tokens too, is one position further on all three axes; else M-RoPE.
        late_blocks: what is appended at once (``<|object_ref_end|>``, ``<|mask_start|>``, queries, ``<|mask_end|>``)
            lies one position late. The text behind goes on without that offset, so that its first token shares the
            position of ``<|mask_end|>``; offsets of several blocks therefore do not add up.
        open_blocks: ``<|mask_end|>`` counts to its query block, so queries attend to it (under the attention variants
            ``hybrid`` and ``prefix``, and ``hybrid_blind`` within the block).
        marked_phrases: the markers around a phrase count to its tokens, also to their limit.
    """

    name: str
    sequential_positions: bool = False
    late_blocks: bool = False
    open_blocks: bool = False
    marked_phrases: bool = False

    def lateness(self, input_ids: Tensor, valid: Tensor, config: InstructSAMConfig) -> Tensor:
        """Offset (B, L) int64 of each token's position, for a whole sequence or the tokens (B, K) of one step."""
        if not self.late_blocks:
            return torch.zeros_like(input_ids)
        ids = config.token_ids
        starts = (input_ids == ids["mask_start"]) & valid
        inside = starts | ((input_ids == ids["seg"]) | (input_ids == ids["mask_end"])) & valid
        # <|object_ref_end|> is appended with the block, unless it closes no phrase and none follows.
        closes = (input_ids == ids["ref_end"]) & F.pad(starts[:, 1:], (0, 1))
        return (inside | closes).long()

    def positions(
        self, model: InstructSAMModel, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None
    ) -> Tensor:
        """Positions (3, B, L) int64 of a whole sequence."""
        if self.sequential_positions:
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        else:
            counted = model.positions(input_ids, attention_mask, image_grid_thw)
        return counted + self.lateness(input_ids, attention_mask.bool(), model.config)

    def adapt(self, layout: TokenLayout, input_ids: Tensor, config: InstructSAMConfig) -> TokenLayout:
        """The rule's layout of tokens from the trained one, for a whole sequence or the tokens (B, K) of one step."""
        if not self.open_blocks:
            return layout
        before = F.pad(layout.block[:, :-1], (1, 0), value=-1)
        is_end = input_ids == config.token_ids["mask_end"]
        return replace(layout, block=torch.where(is_end, before, layout.block))

    def phrases(self, input_ids: Tensor, config: InstructSAMConfig) -> PhraseIndex:
        """Phrases of a whole sequence (B, L). Raises ValueError for broken query blocks."""
        return find_phrases(
            input_ids, config.token_ids, config.num_queries, config.max_phrase_tokens, with_markers=self.marked_phrases
        )

    def run_language_model(
        self,
        model: InstructSAMModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | VisionFeatures | None,
        image_grid_thw: Tensor | None,
    ) -> LanguageOutput:
        """`InstructSAMModel.run_language_model` under this rule: prompt and answer in one pass.

        Raises:
            ValueError: as there.
        """
        return model.run_language_model(
            input_ids,
            attention_mask,
            pixel_values,
            image_grid_thw,
            position_ids=self.positions(model, input_ids, attention_mask, image_grid_thw),
            layout=self.adapt(model.layout(input_ids, attention_mask), input_ids, model.config),
            phrases=self.phrases(input_ids, model.config),
        )


RULES = {
    rule.name: rule
    for rule in (
        DecodingRule("trained"),
        DecodingRule("released", sequential_positions=True, late_blocks=True, open_blocks=True, marked_phrases=True),
    )
}
DEFAULT_RULE = "trained"


def decoding_rule(rule: str | DecodingRule) -> DecodingRule:
    """The rule of that name (a rule passes through). Raises ValueError for an unknown one."""
    if isinstance(rule, DecodingRule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"decoding={rule!r} is not one of {', '.join(RULES)}")
    return RULES[rule]
