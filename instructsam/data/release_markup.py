"""Conversations of the release's training JSON: turns in their order, phrases marked in the answers (DESIGN section 9).

    [{"from": "human", "value": "<image>\\nWhich dogs sleep?"},
     {"from": "gpt", "value": "It is <p>the brown dog</p> [SEG] on <p>the sofa</p> [SEG]."}]

becomes the text around the phrases ("It is ", " on ", ".") and the phrases ("the brown dog", "the sofa").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

from instructsam.errors import DataError
from instructsam.processing.special_tokens import QWEN_IDS

PHRASE_MARKS = (("<p>", "</p>"), ("<|object_ref_start|>", "<|object_ref_end|>"))
"""What opens and what closes a phrase."""
MASK_BLOCK = ("<|mask_start|>", "<|mask_end|>")
"""May stand behind a phrase, and is removed."""
PLACEHOLDERS = ("[SEG]", "<REGION>")
"""May stand behind a phrase or in a mask block, any number of times, and are removed."""
IMAGE_PLACEHOLDER = "<image>"
"""May stand in the first question, once, and is removed."""
ROLES = (("human", "user"), ("gpt", "assistant"))
"""Names of who asks and who answers; a turn need not say."""

_MAX_NAME, _MAX_PATH = 255, 3000  # bytes of a file's name, characters of a path; file systems refuse longer ones
_RESERVED = re.compile("|".join([r"<\|\w+\|>", *map(re.escape, (*QWEN_IDS, IMAGE_PLACEHOLDER))]))


class Exchange(NamedTuple):
    """A question and its answer: phrases, and the pieces of text before, between and after them."""

    instruction: str
    pieces: tuple[str, ...]
    phrases: tuple[str, ...]


def check_text(value: Any, what: str) -> str:
    """A text without blanks around it.

    Raises:
        DataError: no string ("field"); empty, a reserved token in it, or not writable as UTF-8 ("text").
    """
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {short(value)}", "field")
    text = value.strip()
    if not text:
        raise DataError(f"{what} is empty: {short(value)}", "text")
    return _check_tokens(text, what)


def _check_tokens(text: str, what: str) -> str:
    if found := _RESERVED.search(text):
        raise DataError(f"{what} holds the reserved token {found[0]!r}", "text")
    return _check_characters(text, what)


def _check_characters(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold one half of a character that needs two
        raise DataError(f"{what} holds half a character ({error.reason})", "text") from None
    return text


def check_file_name(name: str) -> str:
    """A name that a file can have. Raises DataError."""
    longest = max(map(len, _check_characters(name, "the name of the picture").encode().split(b"/")))
    if "\0" in name or longest > _MAX_NAME or len(name) > _MAX_PATH:
        raise DataError(f"no file can be called {short(name)}", "text")
    return name


def read_conversation(
    turns: Any, has_image: bool, marked: bool, phrase_marks: Sequence[Sequence[str]] = PHRASE_MARKS
) -> list[Exchange]:
    """The questions and answers of a conversation.

    Args:
        turns: list of {"value": text, "from": role or absent}, user and assistant by turns.
        marked: the answers have phrases marked in them; else they are taken as they stand. About a picture, phrases
            must not be marked then.

    Raises:
        DataError: "field", "text" or "markup", naming the turn.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"conversations must be a list of turns, got {short(turns)}", "field")
    texts: list[str] = []
    for index, turn in enumerate(turns):
        what = f"conversations[{index}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{what}: expected an object with a text as value", "field")
        role = turn.get("from")
        if role is not None and role not in ROLES[index % 2]:
            raise DataError(f"{what}: is from {short(role)}, expected {' or '.join(ROLES[index % 2])}", "field")
        texts.append(turn["value"])
    if len(texts) % 2:
        raise DataError(f"conversations has {len(texts)} turns: the last question has no answer", "field")

    exchanges = []
    for index in range(0, len(texts), 2):
        question, answer = (f"conversations[{k}]" for k in (index, index + 1))
        instruction = texts[index]
        if count := instruction.count(IMAGE_PLACEHOLDER):
            if not has_image or index or count > 1:
                reason = "the picture belongs once into the first question" if has_image else "there is no picture"
                raise DataError(f"{question}: holds {IMAGE_PLACEHOLDER} {count} times, but {reason}", "markup")
            instruction = instruction.replace(IMAGE_PLACEHOLDER, "")
        instruction = check_text(instruction, question)
        if marked:
            pieces, phrases = split_marked(texts[index + 1], answer, phrase_marks)
        else:
            for opening, closing in phrase_marks if has_image else ():  # elsewhere they are words, such as HTML
                if closing in texts[index + 1].partition(opening)[2]:
                    reason = f"{answer}: a phrase is marked with {opening} ... {closing}, but the record has no mask"
                    raise DataError(reason, "markup")
            pieces, phrases = (check_text(texts[index + 1], answer),), ()
        exchanges.append(Exchange(instruction, pieces, phrases))
    return exchanges


def split_marked(
    text: str, what: str = "answer", phrase_marks: Sequence[Sequence[str]] = PHRASE_MARKS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Text before, between and after the marked phrases (one piece more than phrases), and the phrases.

    Raises:
        DataError: "markup" for marks that are not closed, stand within one another or behind no phrase; "text" for an
            empty phrase or answer, or another reserved token.
    """
    closing_of = {opening: closing for opening, closing in (*phrase_marks, MASK_BLOCK)}
    marks = re.compile("(" + "|".join(map(re.escape, (*closing_of, *closing_of.values(), *PLACEHOLDERS))) + ")")
    pieces, phrases = [""], []
    opened = inside = ""
    for index, token in enumerate(marks.split(text)):
        if index % 2 == 0:  # text between marks
            if not opened:
                pieces[-1] += token
            else:
                inside += token
        elif opened:
            if opened == MASK_BLOCK[0] and token in PLACEHOLDERS:
                continue
            if token != closing_of[opened]:
                raise DataError(f"{what}: {token} stands within {opened} ... {closing_of[opened]}", "markup")
            if opened == MASK_BLOCK[0]:
                if inside.strip():
                    raise DataError(f"{what}: a mask block holds {short(inside.strip())}", "markup")
            else:
                phrases.append(check_text(inside, f"{what}: a phrase"))
                pieces.append("")
            opened = ""
        else:
            if token in PLACEHOLDERS or token == MASK_BLOCK[0]:
                if not phrases or pieces[-1].strip():
                    raise DataError(f"{what}: {token} stands behind no marked phrase", "markup")
                pieces[-1] = ""  # blanks between the phrase and what is removed
            elif token not in closing_of:
                raise DataError(f"{what}: {token} closes nothing", "markup")
            if token in closing_of:
                opened, inside = token, ""
    if opened:
        raise DataError(f"{what}: {opened} is not closed", "markup")
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    if not phrases:
        check_text(pieces[0], what)
    return tuple(_check_tokens(piece, what) for piece in pieces), tuple(phrases)
