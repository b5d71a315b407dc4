"""Instructions and phrases as they are given. Without torch, so that a command says at once what it cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def is_text(value: Any) -> bool:
    """Whether it is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def are_phrases(value: Any) -> bool:
    """Whether it is a list of texts that say something, at least one."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_text, value))


def asked_by(instruction: str | None, phrases: Sequence[str] | None) -> str:
    """What is asked in words: the instruction; with phrases alone, these."""
    return instruction or " and ".join(phrases or ())
