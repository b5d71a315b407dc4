"""Instructions and phrases as they are given. Without torch, so that a command says at once what it cannot take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def has_half(text: str) -> bool:
    """Whether it holds half a character (a lone surrogate), which JSON may hold and no tokenizer takes."""
    return not text.isascii() and _HALF.search(text) is not None


def fault_of(value: Any) -> str | None:
    """Why it is no text that says something, to stand behind its name in a message; None = it is one."""
    if not isinstance(value, str):
        return f"is no text: {value!r}"
    if not value.strip():
        return "is empty"
    return "holds half a character (a lone surrogate)" if has_half(value) else None


def is_text(value: Any) -> bool:
    """Whether it is a text that says something: more than blanks, and no half characters."""
    return fault_of(value) is None


def are_phrases(value: Any) -> bool:
    """Whether it is a list of texts that say something, at least one."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_text, value))


def asked_by(instruction: str | None, phrases: Sequence[str] | None) -> str:
    """What is asked in words: the instruction; with phrases alone, these."""
    return instruction or " and ".join(phrases or ())
