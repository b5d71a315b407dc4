"""The chat layout: from turns to token ids, labels and turn numbers (DESIGN section 4, "Sequence").

    <|im_start|>user\\n<|vision_start|><|image_pad|>×n<|vision_end|>INSTRUCTION<|im_end|>\\n
    <|im_start|>assistant\\n
    <|object_ref_start|>PHRASE<|object_ref_end|><|mask_start|>[SEG]×N<|mask_end|>, …<|im_end|>\\n

(without the breaks of these lines). Pieces are tokenised one by one; since a special token stands on either side of
each, the ids are those of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from instructsam.processing.special_tokens import QWEN_IDS, special_token_ids

IGNORED = -100


@dataclass
class EncodedChat:
    """Token ids of a conversation; all tensors (L,) int64. ``labels`` are -100 outside of the answers."""

    input_ids: Tensor
    labels: Tensor
    turn_ids: Tensor


@dataclass
class ChatLayout:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer: any transformers tokenizer that knows Qwen's special tokens and ours.
        num_queries: N, length of a query block.

    Raises:
        ValueError: the tokenizer lacks a special token (names it).
    """

    tokenizer: Any
    num_queries: int
    token_ids: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self.token_ids = special_token_ids(tokenizer)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # A word-level tokenizer's <unk> may be written; where one of ours doubles as unknown token, it may not.
        self._reserved = [token for token in added if token != tokenizer.unk_token or token in QWEN_IDS]
        self._markup = lru_cache(maxsize=None)(self._tokenise)
        self._text = lru_cache(maxsize=65536)(self._tokenise_user_text)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenise_user_text(self, text: str) -> tuple[int, ...]:
        for token in self._reserved:
            if token in text:
                raise ValueError(f"text {text!r} contains the reserved token {token!r}")
        ids = self._tokenise(text.strip())
        if not ids:
            raise ValueError(f"text {text!r} is empty")
        return ids

    def image_prefix(self, num_image_tokens: int) -> list[int]:
        """The opening of the first user turn, up to the end of the image."""
        start = self._markup("<|im_start|>user\n<|vision_start|>")
        return [*start, *[self.image_token_id] * num_image_tokens, *self._markup("<|vision_end|>")]

    def question(self, instruction: str) -> list[int]:
        """The instruction and the assistant's header."""
        return [*self._text(instruction), *self._markup("<|im_end|>\n<|im_start|>assistant\n")]

    def answer(self, phrases: Sequence[str]) -> list[int]:
        """Phrases with their query blocks, without the end of turn."""
        ids: list[int] = []
        block = [self.token_ids["mask_start"], *[self.token_ids["seg"]] * self.num_queries, self.token_ids["mask_end"]]
        for k, phrase in enumerate(phrases):
            if k:
                ids.extend(self._markup(", "))
            ids.extend([self.token_ids["ref_start"], *self._text(phrase), self.token_ids["ref_end"], *block])
        return ids

    def encode(
        self,
        num_image_tokens: int,
        turns: Sequence[tuple[str, Sequence[str] | None]],
        independent_turns: bool = False,
    ) -> EncodedChat:
        """Encode an image's conversation.

        Args:
            num_image_tokens: positions that the image takes.
            turns: (instruction, phrases of the answer); phrases None (last turn only) leaves the answer to be written.
            independent_turns: every turn sees the image and itself only; each then looks exactly like a first turn.

        Raises:
            ValueError: an empty instruction or phrase, reserved tokens in it, an answer without a phrase.
        """
        ids = self.image_prefix(num_image_tokens)
        labels = [IGNORED] * len(ids)
        turn_ids = [0] * len(ids)
        for k, (instruction, phrases) in enumerate(turns):
            reopen = [] if k == 0 or independent_turns else [*self._markup("<|im_start|>user\n")]
            question = reopen + self.question(instruction)
            answer, tail = [], []
            if phrases is None:
                assert k == len(turns) - 1, "only the last answer can be open"
            else:
                if not phrases:
                    raise ValueError(f"instruction {instruction!r}: an answer needs at least one phrase")
                answer = [*self.answer(phrases), self.token_ids["eos"]]
                tail = list(self._markup("\n"))
            ids += question + answer + tail
            labels += [IGNORED] * len(question) + answer + [IGNORED] * len(tail)
            turn_ids += [k + 1] * (len(question) + len(answer) + len(tail))
        return EncodedChat(torch.tensor(ids), torch.tensor(labels), torch.tensor(turn_ids))

    def phrases_of(self, answer_ids: Sequence[int]) -> list[str]:
        """The phrases of an answer that own a query block, in order."""
        found: list[str] = []
        start = None
        ids = list(answer_ids)
        for k, token in enumerate(ids):
            if token == self.token_ids["ref_start"]:
                start = k + 1
            elif token == self.token_ids["ref_end"] and start is not None:
                if k > start and k + 1 < len(ids) and ids[k + 1] == self.token_ids["mask_start"]:
                    found.append(self.tokenizer.decode(ids[start:k]).strip())
                start = None
        return found

    def answer_text(self, answer_ids: Sequence[int]) -> str:
        """The answer as a person reads it: query blocks and end of turn removed, phrase markup kept."""
        hidden = {self.token_ids[name] for name in ("seg", "mask_start", "mask_end", "eos", "pad")}
        return self.tokenizer.decode([i for i in answer_ids if i not in hidden]).strip()
