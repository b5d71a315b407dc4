"""Instruction templates: the bare words of a turn become something a person would say, newly chosen each time.

A template never needs to know whether its words are singular or plural, and puts no article before them: a category may
be "dog", "scissors" or "chair or stool", a phrase "man in red", "the left one" or "2nd from left". None of them names a
side or a colour, so that they stay true of a flipped or tinted picture (`instructsam.data.augmentation`). Sentences
stand as they are; to a question a request may be added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from instructsam.structures import Turn

ADDED_BYTES = 96
"""No template is longer than this (UTF-8), and listing words adds no more than this a turn."""

CATEGORY = (
    "Segment every instance of {}.",
    "Segment all instances of {}.",
    "Please segment all instances of the category {}.",
    "Find every instance of {} in this image.",
    "Find and segment all instances of {}.",
    "Mark every object of the category {}.",
    "Outline each instance of {} in the picture.",
    "Give me a mask for each instance of {}.",
    "Which objects in this image belong to the category {}?",
    "Can you segment every instance of {} that you see?",
    "Could you mark all instances of {} in the image?",
    'Show me everything in the picture that counts as "{}".',
    'What in this image would you call "{}"?',
    "I need a separate mask for every instance of {}.",
    "Detect and segment the category {}.",
    "Category to segment: {}.",
)
CATEGORIES = (
    "Segment every instance of {}.",
    "Segment all instances of these categories: {}.",
    "Please segment all instances of {}.",
    "Find every instance of {} in this image.",
    "Find and segment all objects of the categories {}.",
    "Outline each instance of the following: {}.",
    "Give me a mask for each instance of {}.",
    "Which objects in this image belong to the categories {}?",
    "Can you segment every instance of {} that you see?",
    "Could you mark all instances of {}, category by category?",
    "I need separate masks for all instances of {}.",
    "Go through these categories and segment each in turn: {}.",
    "Categories to segment: {}.",
)
PHRASE = (
    "Segment {}.",
    "Please segment {}.",
    "Segment {} in this image.",
    "Find {} and segment every match.",
    "Can you segment {}?",
    "Could you find and mark {} in the picture?",
    "Segment the following: {}.",
    "Show me where to find {}.",
    "Give me the mask of {}.",
    "I am looking for {}.",
    "Mark the pixels of {}.",
    'What does "{}" refer to in this image?',
    'Segment whatever is described by "{}".',
    'Which part of the picture fits the description "{}"?',
    "Look for {} and outline what you find.",
    "Locate and segment {}.",
)
PHRASES = (
    "Segment {}.",
    "Please segment {}.",
    "Segment {} in this image.",
    "Segment each of the following: {}.",
    "Find {} and segment each of them.",
    "Can you segment {}?",
    "Could you find and mark {} in the picture?",
    "Give me masks of {}.",
    "I am looking for {}.",
    "Mark each of these in the picture: {}.",
    "Here is what I want to see segmented: {}.",
    "Locate and segment {}.",
    "Show me where to find {}.",
)
OCR = (
    'Where does it say "{}"?',
    'Segment the text "{}".',
    'Segment the text that reads "{}".',
    'Please find the text "{}" in this image.',
    'Where in the picture can I read "{}"?',
    'Where is "{}" written?',
    'Mark the place where "{}" is written.',
    'Find the writing that says "{}" and segment it.',
    'Can you segment the text "{}"?',
    'Which region of the image contains the text "{}"?',
    'Outline the text "{}".',
    'Show me where it says "{}".',
    'Give me the mask of the text "{}".',
    'Read the image and segment "{}".',
)
AFTER_QUESTIONS = (
    "Please segment the answer.",
    "Segment what you find.",
    "Answer with segmentation masks.",
    "Please respond with masks.",
    "Show me by segmenting.",
    "Mark the answer in the image.",
    "Please mark every instance that fits.",
    "Outline the answer in the picture.",
    "Point to the answer with a mask.",
    "Give your answer as masks.",
    "Please show where in the image.",
    "Output the segmentation.",
)
SINGLE = {"category": CATEGORY, "phrase": PHRASE, "ocr": OCR}

_ENDS = ".?!…。？！"
_CLOSERS = "\"'”’)]»"
_QUESTION = re.compile(
    r"(what|which|where|who|whom|whose|when|why|how|in what|in which|on which|on what|for which|from which|"
    r"is|are|was|were|do|does|did|can|could|would|will|should|has|have)\b",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"\b(segment\w*|masks?|outlin\w*|highlight\w*|mark(ed|ing)?)\b", re.IGNORECASE)


def word(turn: Turn, rng: np.random.Generator) -> Turn:
    """The turn as it is asked; one without a form comes back unchanged, and nothing is drawn for it.

    Raises:
        ValueError: an unknown form.
    """
    if not turn.form:
        return turn
    words = _words(turn.instruction)
    if turn.form == "sentence":
        text = _sentence(words, rng)
    elif turn.form in SINGLE:
        text = _put(_choose(SINGLE[turn.form], rng), words)
    else:
        raise ValueError(f"instruction {turn.instruction!r}: there are no templates of the form {turn.form!r}")
    return Turn(text, turn.phrases, turn.kind, turn.id, "", turn.answer)


def word_joint(turns: Sequence[Turn], rng: np.random.Generator) -> Turn:
    """One turn that asks for everything that several ask for: "a, b and c", answered with all phrases in this order.

    Args:
        turns: two or more, of the forms "category" and "phrase". Their answers' own text is not kept.
    """
    assert len(turns) >= 2 and all(turn.form in ("category", "phrase") for turn in turns)
    templates = CATEGORIES if all(turn.form == "category" for turn in turns) else PHRASES
    text = _put(_choose(templates, rng), listed([_words(turn.instruction) for turn in turns]))
    kinds = dict.fromkeys(turn.kind for turn in turns)
    phrases = tuple(phrase for turn in turns for phrase in turn.phrases)
    return Turn(text, phrases, "+".join(kinds), "+".join(turn.id for turn in turns if turn.id))


def listed(words: Sequence[str]) -> str:
    """Words as a list in running text: "a and b", "a, b and c", and "a; b, c; d and e" where commas would mislead."""
    if any(mark in text for text in words for mark in (",", ";", " and ", " or ")):
        return "; ".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _choose(templates: Sequence[str], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]


def _words(text: str) -> str:
    return " ".join(text.split())


def _put(template: str, words: str) -> str:
    """The words in the template's place; no end of sentence after another, no quotation marks around others."""
    if '"' in words:
        template = template.replace('"{}"', "{}")
    before, after = template.split("{}")
    if words[-1:] in _ENDS and after in (".", "?"):
        after = ""
    return before + words + after


def _sentence(words: str, rng: np.random.Generator) -> str:
    """A whole sentence with its end; every other time a request is added to a question that holds none."""
    end = words.rstrip(_CLOSERS)[-1:]
    if end not in _ENDS and end not in ",;:":
        end = "?" if _QUESTION.match(words) else "."
        words += end
    number = int(rng.integers(2 * len(AFTER_QUESTIONS)))
    if end not in "?？" or number >= len(AFTER_QUESTIONS) or _REQUEST.search(words):
        return words
    return f"{words} {AFTER_QUESTIONS[number]}"
