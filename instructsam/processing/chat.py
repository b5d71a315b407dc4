"""The chat layout: from turns to token ids, labels and turn numbers (DESIGN section 4, "Sequence").

    <|im_start|>user\\n<|vision_start|><|image_pad|>×n<|vision_end|>INSTRUCTION<|im_end|>\\n
    <|im_start|>assistant\\n
    <|object_ref_start|>PHRASE<|object_ref_end|><|mask_start|>[SEG]×N<|mask_end|>, …<|im_end|>\\n

(without the breaks of these lines). An answer may have text of its own before, between and after its phrases, or be
nothing but text; a conversation about no picture lacks <|vision_start|> … <|vision_end|>. Pieces are tokenised one by
one; since a special token or a header's line break stands on either side of each, the ids are those of the whole text
(unless an answer begins with a line break: its header must not depend on it, as an answer is written after it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from instructsam.errors import DataError
from instructsam.processing.special_tokens import QWEN_IDS, special_token_ids
from instructsam.structures import Turn
from instructsam.words import has_half

IGNORED = -100
CACHED_TEXT = 128
"""Texts up to this many characters come up again and again, longer ones would fill the memory of every worker."""


class ChatTurn(NamedTuple):
    """What the layout needs of a turn.

    Attributes:
        instruction: the user's words.
        phrases: of the answer; None (last turn only) leaves the answer to be written.
        pieces: text before, between and after the phrases, one more than there are, as `structures.Turn.answer` has
            it; empty = the phrases joined by ", ".
    """

    instruction: str
    phrases: Sequence[str] | None
    pieces: Sequence[str] = ()

    @classmethod
    def of(cls, turn: Turn) -> ChatTurn:
        """The turn as it stands, its instruction in particular."""
        return cls(turn.instruction, [phrase.text for phrase in turn.phrases], turn.answer)


TurnLike: TypeAlias = "ChatTurn | tuple[str, Sequence[str] | None]"
Turns: TypeAlias = "Sequence[TurnLike]"


def chat_turn(turn: TurnLike) -> ChatTurn:
    """The turn with named fields."""
    return turn if isinstance(turn, ChatTurn) else ChatTurn(*turn)


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
        self._cache()

    def _cache(self) -> None:
        self._markup = lru_cache(maxsize=None)(self._tokenise)
        self._known_text = lru_cache(maxsize=65536)(self._tokenise_user_text)

    def __getstate__(self) -> dict[str, Any]:  # data workers that are started anew get it pickled, without the caches
        return {key: value for key, value in self.__dict__.items() if key not in ("_markup", "_known_text")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache()

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenise_user_text(self, text: str) -> tuple[int, ...]:
        for token in self._reserved:
            if token in text:
                raise DataError(f"text {text[:80]!r} contains the reserved token {token!r}", "text")
        if has_half(text):
            raise DataError(f"text {text[:80]!r} holds half a character (a lone surrogate)", "text")
        return self._tokenise(text)

    def _piece(self, text: str) -> tuple[int, ...]:
        """Ids of text exactly as it stands, blanks at its ends included."""
        return self._known_text(text) if len(text) <= CACHED_TEXT else self._tokenise_user_text(text)

    def _text(self, text: str) -> tuple[int, ...]:
        """Ids of an instruction or phrase without blanks around it."""
        ids = self._piece(text.strip())
        if not ids:
            raise DataError(f"text {text!r} is empty", "text")
        return ids

    def prefix(self, num_image_tokens: int | None) -> list[int]:
        """The opening of the first user turn, up to the end of the image if there is one (None: no image)."""
        if num_image_tokens is None:
            return list(self._markup("<|im_start|>user\n"))
        start = self._markup("<|im_start|>user\n<|vision_start|>")
        return [*start, *[self.image_token_id] * num_image_tokens, *self._markup("<|vision_end|>")]

    def question(self, instruction: str) -> list[int]:
        """The instruction and the assistant's header."""
        return [*self._text(instruction), *self._markup("<|im_end|>\n<|im_start|>assistant\n")]

    def answer(self, phrases: Sequence[str], pieces: Sequence[str] = ()) -> list[int]:
        """Phrases with their query blocks and the `pieces` of text around them (see `ChatTurn`), without end of turn.

        Raises:
            DataError: an empty phrase, reserved tokens or half characters in the text.
        """
        before, *after = pieces or ["", *[", "] * (len(phrases) - 1), ""][: len(phrases) + 1]
        assert len(after) == len(phrases), f"{len(phrases)} phrases with {len(pieces)} pieces of text"
        block = [self.token_ids["mask_start"], *[self.token_ids["seg"]] * self.num_queries, self.token_ids["mask_end"]]
        ids = [*self._piece(before)]
        for phrase, piece in zip(phrases, after, strict=True):
            ids += [self.token_ids["ref_start"], *self._text(phrase), self.token_ids["ref_end"], *block]
            ids += self._piece(piece)
        return ids

    def encode(self, num_image_tokens: int | None, turns: Turns, independent_turns: bool = False) -> EncodedChat:
        """Encode an image's conversation, or one about no image.

        Args:
            num_image_tokens: positions that the image takes; None = there is no image.
            turns: `ChatTurn`s or tuples like them. No turns: an opened user turn, with nothing to learn from.
            independent_turns: every turn sees the image and itself only; each then looks exactly like a first turn.

        Raises:
            DataError: an empty instruction or phrase, reserved tokens in any text, an answer without phrase or text.
        """
        ids = self.prefix(num_image_tokens)
        labels = [IGNORED] * len(ids)
        turn_ids = [0] * len(ids)
        for k, turn in enumerate(turns):
            instruction, phrases, pieces = chat_turn(turn)
            reopen = [] if k == 0 or independent_turns else self.prefix(None)
            question = reopen + self.question(instruction)
            answer, tail = [], []
            if phrases is None:
                assert k == len(turns) - 1, "only the last answer can be open"
            else:
                if not phrases and not "".join(pieces).strip():
                    raise DataError(
                        f"instruction {instruction[:80]!r}: an answer needs at least one phrase, or text", "text"
                    )
                answer = [*self.answer(phrases, pieces), self.token_ids["eos"]]
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
