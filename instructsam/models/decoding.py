"""Greedy decoding with a KV cache, query blocks appended in one step (DESIGN section 7).

When a row writes ``<|object_ref_end|>``, the chunk ``<|object_ref_end|><|mask_start|>[SEG]×N<|mask_end|>`` is fed at
once; other rows of the batch feed their one token beside it, padded. The rule to honour: every hidden state equals the
one of a single forward over the same tokens under the same `DecodingRule`; with ``trained`` that is teacher forcing.

Shape suffixes: B batch, L sequence, K tokens of one step, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from instructsam.models.attention_mask import TokenLayout, dense_mask
from instructsam.models.decoding_rules import DEFAULT_RULE, DecodingRule, decoding_rule
from instructsam.models.modeling import InstructSAMModel, LanguageOutput, VisionFeatures

# (step, logits (B, V) with forbidden tokens at -inf) → token ids (B,)
Chooser = Callable[[int, Tensor], Tensor]


@dataclass
class DecodedAnswer:
    """Prompt and answer of every row, padding moved to the right.

    Attributes:
        input_ids: (B, L) int64, query blocks included.
        attention_mask: (B, L) bool.
        answer_start: (B,) int64, position of the first answer token.
        language: hidden states and phrases, as a single forward gives them.
        finished: (B,) bool, False where a limit ended the answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_start: Tensor
    language: LanguageOutput
    finished: Tensor


@contextmanager
def _sdpa(model: InstructSAMModel) -> Iterator[None]:
    """FlexAttention pays off on whole sequences only; a decoding step uses the dense mask."""
    config = model.vlm.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


def greedy(step: int, logits: Tensor) -> Tensor:
    """The most probable token of every row."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    model: InstructSAMModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor | VisionFeatures | None,
    image_grid_thw: Tensor | None,
    max_new_tokens: int = 128,
    max_phrases: int = 10,
    choose: Chooser = greedy,
    rule: str | DecodingRule = DEFAULT_RULE,
) -> DecodedAnswer:
    """Write the answers of a batch of prompts.

    Args:
        input_ids: (B, L) int64 prompts up to and including the assistant's header, padded on the right; with earlier
            turns and their answers, if there are any.
        attention_mask: (B, L) bool.
        pixel_values, image_grid_thw: as in `InstructSAMModel.forward`.
        max_new_tokens: limit on written tokens a row (query blocks do not count).
        max_phrases: a row that has that many phrases can start no further one.
        choose: picks the next tokens.
        rule: ``trained`` or ``released``, see `decoding_rules`.

    Raises:
        ValueError: limits below 1, an unknown rule.
    """
    if max_new_tokens < 1 or max_phrases < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and max_phrases={max_phrases} must be at least 1")
    decoder = _Decoder(model, max_phrases, choose, decoding_rule(rule))
    with _sdpa(model):
        return decoder.run(input_ids, attention_mask.bool(), pixel_values, image_grid_thw, max_new_tokens)


class _Decoder:
    """The state of one call: the cache, and for every slot of it the token, its hidden state and its layout."""

    def __init__(self, model: InstructSAMModel, max_phrases: int, choose: Chooser, rule: DecodingRule):
        self.model, self.max_phrases, self.choose, self.rule = model, max_phrases, choose, rule
        self.ids = model.config.token_ids
        vlm = model.config.vlm_config
        never = ("seg", "mask_start", "mask_end", "region", "pad")
        forbidden = {self.ids[name] for name in never if name in self.ids}
        forbidden |= {vlm.image_token_id, vlm.video_token_id, vlm.vision_start_token_id, vlm.vision_end_token_id}
        size = vlm.text_config.vocab_size
        self.forbidden = torch.tensor(sorted(i for i in forbidden if i < size), device=model.device)

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | VisionFeatures | None,
        image_grid_thw: Tensor | None,
        max_new_tokens: int,
    ) -> DecodedAnswer:
        num_queries = self.model.config.num_queries
        batch, device = len(input_ids), input_ids.device
        block = torch.tensor(
            [self.ids["mask_start"], *[self.ids["seg"]] * num_queries, self.ids["mask_end"]], device=device
        )
        logits = self._prefill(input_ids, attention_mask, pixel_values, image_grid_thw)
        answer_start = attention_mask.sum(-1)
        active = torch.ones(batch, dtype=torch.bool, device=device)
        open_length = torch.full(
            (batch,), -1, device=device
        )  # tokens since <|object_ref_start|>, -1 outside of a phrase
        num_phrases = torch.zeros(batch, dtype=torch.long, device=device)

        for step in range(max_new_tokens):
            logits[:, self.forbidden] = -torch.inf
            logits[num_phrases >= self.max_phrases, self.ids["ref_start"]] = -torch.inf
            token_B = self.choose(step, logits)
            active = active & (token_B != self.ids["eos"])
            closes = active & (token_B == self.ids["ref_end"]) & (open_length > 0)
            starts = token_B == self.ids["ref_start"]
            open_length = torch.where(starts, 0, torch.where(open_length >= 0, open_length + 1, -1))
            open_length = torch.where(token_B == self.ids["ref_end"], -1, open_length)
            num_phrases = num_phrases + closes.long()
            if not bool(active.any()):
                break
            chunk_BK, valid_BK = token_B[:, None], active[:, None]
            if bool(closes.any()):
                chunk_BK = torch.cat([chunk_BK, block.expand(batch, -1)], dim=1)
                valid_BK = torch.cat([valid_BK, closes[:, None].expand(-1, len(block))], dim=1)
            logits = self._feed(chunk_BK, valid_BK, num_phrases)
        return self._finish(answer_start, ~active)

    def _prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | VisionFeatures | None,
        image_grid_thw: Tensor | None,
    ) -> Tensor:
        embeddings, is_image, deepstack = self.model.embed(input_ids, pixel_values, image_grid_thw)
        positions = self.rule.positions(self.model, input_ids, attention_mask, image_grid_thw)
        counted = positions - self.rule.lateness(input_ids, attention_mask, self.model.config)
        self.next_position_B = counted.amax(0).masked_fill(~attention_mask, -1).amax(-1) + 1
        self.cache = DynamicCache(config=self.model.vlm.language_model.config)
        self.layout = self.rule.adapt(self.model.layout(input_ids, attention_mask), input_ids, self.model.config)
        self.prompt_blocks_B = self.layout.block.amax(-1) + 1  # those of earlier answers
        self.tokens: list[Tensor] = [input_ids]
        self.hidden: list[Tensor] = []
        extra = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deepstack} if deepstack else {}
        return self._forward(embeddings, positions, attention_mask, extra)

    def _feed(self, chunk_BK: Tensor, valid_BK: Tensor, num_phrases: Tensor) -> Tensor:
        """One step over the cache; padded positions are never seen and their results never read."""
        is_query = (chunk_BK == self.ids["seg"]) & valid_BK
        block = torch.where(is_query, self.prompt_blocks_B[:, None] + num_phrases[:, None] - 1, -1)
        new = TokenLayout(valid_BK, block, torch.zeros_like(valid_BK))
        self.layout = self.layout.append(self.rule.adapt(new, chunk_BK, self.model.config))
        self.tokens.append(chunk_BK)
        embeddings = self.model.look_up(chunk_BK)
        # The bank goes to invalid blocks too: there it is as meaningless as anything else.
        embeddings = self.model.query_bank(embeddings, chunk_BK == self.ids["seg"])
        offsets = valid_BK.long().cumsum(-1) - 1
        offsets = offsets.clamp(min=0) + self.rule.lateness(chunk_BK, valid_BK, self.model.config)
        positions = (self.next_position_B[:, None] + offsets).expand(3, -1, -1)
        self.next_position_B = self.next_position_B + valid_BK.sum(-1)
        return self._forward(embeddings, positions, valid_BK, {})

    def _forward(self, embeddings: Tensor, positions: Tensor, valid_BK: Tensor, extra: dict) -> Tensor:
        """Run the language model on new tokens; returns the logits (B, V) after each row's last valid one."""
        output = self.model.vlm.language_model(
            inputs_embeds=embeddings,
            attention_mask=dense_mask(self.model.config.attention_variant, self.layout, embeddings.shape[1]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        )
        self.hidden.append(output.last_hidden_state)
        last_B = (valid_BK.long().cumsum(-1) == valid_BK.sum(-1, keepdim=True)).long().argmax(-1)
        rows = torch.arange(len(last_B), device=last_B.device)
        return self.model.lm_logits(output.last_hidden_state[rows, last_B]).float()

    def _finish(self, answer_start: Tensor, finished: Tensor) -> DecodedAnswer:
        """Close the gaps that padded steps left, so that the result looks like a teacher-forced batch."""
        valid = self.layout.valid
        order = valid.long().argsort(dim=1, descending=True, stable=True)[:, : int(valid.sum(-1).max())]
        attention_mask = valid.gather(1, order)
        input_ids = torch.cat(self.tokens, dim=1).gather(1, order)
        input_ids = input_ids.masked_fill(~attention_mask, self.ids["pad"])
        hidden = torch.cat(self.hidden, dim=1)
        hidden_BLC = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        language = LanguageOutput(hidden_BLC, self.rule.phrases(input_ids, self.model.config))
        return DecodedAnswer(input_ids, attention_mask, answer_start, language, finished)
