"""The words of the tiny world: every table and template that its instructions are put together from.

Nothing that is not in here can occur in an instruction or a phrase, so the vocabulary follows from this file
(DESIGN section 12).
"""

from __future__ import annotations

import re

from instructsam.data.shapes import ATTRIBUTES, COLORS, KINDS, SIZES, TEXTURES
from instructsam.processing.tokenizer import split_words

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times", 5: "five times"}
ADVERBS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "top": ("above", "higher than"),
    "bottom": ("below", "lower than", "under"),
}
EXTREMES = {
    "left": ("leftmost",),
    "right": ("rightmost",),
    "top": ("topmost", "highest"),
    "bottom": ("bottommost", "lowest"),
}
NEAR = ("closest to", "nearest to")
FAR = ("farthest from", "furthest from")
LARGEST = ("largest", "biggest")
SMALLEST = ("smallest", "tiniest")

# {d}: what is asked for, {be}: is or are, {p}/{s}: plural/singular noun phrase, {r}: a shape to refer to.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "request": (
        "{d}",
        "segment {d}",
        "find {d}",
        "show {d}",
        "show me {d}",
        "mark {d}",
        "select {d}",
        "outline {d}",
        "point out {d}",
        "please segment {d}",
        "give me the mask of {d}",
        "i am looking for {d}",
        "can you find {d}?",
        "could you mark {d}?",
        "where {be} {d}?",
        "which pixels belong to {d}?",
    ),
    "several": ("the {p}", "all {p}", "all the {p}", "all of the {p}"),
    "each": ("every {s}", "each {s}"),
    "single": ("the {s}",),
    "adjective": ("everything {a}", "everything that is {a}", "all that is {a}", "whatever is {a}"),
    "list": ("{d}, ", "{d} and ", "{d} as well as "),
    "side": ("the {p} {side} {r}", "all {p} {side} {r}", "every {s} {side} {r}", "the {p} that are {side} {r}"),
    "side_question": ("which {p} are {side} {r}?", "what {p} are {side} {r}?"),
    "half": ("the {p} in the {half} half", "all {p} in the {half} half of the picture"),
    "extreme": ("the {e} {s}", "the {s} that is {e}", "the {e} of the {p}"),
    "extreme_question": ("which {s} is the {e}?", "which of the {p} is {e}?"),
    "distance": ("the {s} {near} {r}", "the {s} that is {near} {r}", "the one of the {p} {near} {r}"),
    "distance_question": ("which {s} is {near} {r}?", "which of the {p} is {near} {r}?"),
    "superlative": ("the {m} {s}", "the {s} that is the {m}", "the {m} of the {p}", "the {m} one of the {p}"),
    "superlative_question": ("which {s} is the {m}?", "which of the {p} is the {m}?"),
    "ordinal": (
        "the {n} {s} from the {edge}",
        "the {n} {s} counting from the {edge}",
        "the {n} of the {p} from the {edge}",
    ),
    "ordinal_question": ("which {s} is the {n} from the {edge}?", "counting from the {edge}, which {s} is the {n}?"),
    "count": (
        "the shapes whose {x} appears exactly {k}",
        "all shapes whose {x} occurs exactly {k}",
        "the shapes with a {x} that appears exactly {k}",
        "every shape with a {x} that occurs exactly {k}",
    ),
    "count_question": (
        "which shapes have a {x} that appears exactly {k}?",
        "which shapes share a {x} seen exactly {k}?",
    ),
    "common": ("the shapes of the {c} common {x}", "all shapes that have the {c} common {x}"),
    "common_question": ("which shapes have the {c} common {x}?",),
    "not": (
        "the {p} that are not {a}",
        "all {p} that are not {a}",
        "every {s} that is not {a}",
        "the {p} except {a} ones",
    ),
    "not_question": ("which {p} are not {a}?",),
    "except": ("everything except the {p}", "all shapes but the {p}", "everything but the {p}", "all but the {p}"),
    "neither": ("the {p} that are neither {a} nor {b}", "every {s} that is neither {a} nor {b}"),
    "odd": (
        "the odd one out",
        "the shape that is the odd one out",
        "the one that does not belong",
        "the shape that does not belong to the group",
        "the shape that does not match the others",
        "the one that is unlike all the others",
    ),
    "odd_question": (
        "which one is the odd one out?",
        "which shape does not fit in with the others?",
        "which one does not belong?",
        "what does not match the rest?",
    ),
    "odd_hint": (
        "the one whose {x} differs from the others",
        "the shape with a different {x} than the rest",
        "the odd one out by {x}",
        "the only shape that does not share the {x} of the others",
    ),
    "odd_hint_question": ("which shape has a {x} unlike all the others?", "which one differs from the rest in {x}?"),
}
HALVES = {"left": "left", "right": "right", "top": "upper", "bottom": "lower"}
COMMON = ("most", "least")


def vocabulary() -> list[str]:
    """Every word that an instruction or a phrase of the tiny world can hold, sorted."""
    texts = [template for templates in TEMPLATES.values() for template in templates]
    texts += [*KINDS, *PLURALS.values(), *COLORS, *SIZES, *TEXTURES, *ATTRIBUTES, "shape", "shapes", "is", "are"]
    texts += [*ORDINALS, *TIMES.values(), *NEAR, *FAR, *LARGEST, *SMALLEST, *ADVERBS, *HALVES.values(), *COMMON]
    texts += [word for words in (*ADVERBS.values(), *EXTREMES.values()) for word in words]
    return sorted({word for text in texts for word in split_words(re.sub(r"\{\w+\}", " ", text))})
