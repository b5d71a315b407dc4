"""Instructions about a scene of the tiny world, of every kind that real ones have (DESIGN section 12).

Plain concepts (category, phrases, attribute) are answered with their own words, all other kinds with the generic phrase
"shapes": if the phrase repeated the instruction, the detector could find the target from the phrase alone and the
instance queries would learn nothing. Decisions about position and size are asked only where they are clear.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from instructsam.data.shape_wordings import (
    ADVERBS,
    COMMON,
    EXTREMES,
    FAR,
    HALVES,
    LARGEST,
    NEAR,
    ORDINALS,
    PLURALS,
    SMALLEST,
    TEMPLATES,
    TIMES,
)
from instructsam.data.shapes import ATTRIBUTES, COLORS, KINDS, REFERENCE_SIZE, SIZES, TEXTURES, Shape, odd_ones

INSTRUCTION_KINDS = (
    "category",
    "phrases",
    "attribute",
    "superlative",
    "spatial",
    "ordinal",
    "counting",
    "negation",
    "reasoning",
    "no_target",
)
GENERIC_PHRASE = "shapes"

SIDE_MARGIN = 6.0
"""Pixels (of a picture of 96) that centres must differ by for left/right/above/below, extremes and distances."""
ORDINAL_MARGIN = 4.0
AREA_MARGIN = 1.15
"""The largest shape has at least this many times the area of the next one."""


@dataclass(frozen=True)
class Instruction:
    """An instruction with its true answer: the phrases in order, each with indices of the scene's shapes."""

    text: str
    kind: str
    phrases: tuple[tuple[str, tuple[int, ...]], ...]


class Noun(NamedTuple):
    """A description by attributes, None = any."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    kind: str | None = None

    def matches(self, shape: Shape) -> bool:
        return all(
            wanted is None or getattr(shape, name) == wanted for name, wanted in zip(self._fields, self, strict=True)
        )

    def pick(self, shapes: Iterable[Shape]) -> tuple[int, ...]:
        """Indices of the shapes that it describes."""
        return tuple(i for i, shape in enumerate(shapes) if self.matches(shape))

    @property
    def singular(self) -> str:
        return " ".join(word for word in (*self[:3], self.kind or "shape") if word)

    @property
    def plural(self) -> str:
        return " ".join(word for word in (*self[:3], PLURALS[self.kind] if self.kind else "shapes") if word)

    @property
    def words(self) -> dict[str, str]:
        return {"s": self.singular, "p": self.plural}


class Asked(NamedTuple):
    """Wording (a complete question, or what to put into a request) and the indices of the shapes it means."""

    text: str
    answer: tuple[int, ...]
    plural: bool = True


Maker = Callable[[random.Random, tuple[Shape, ...], float, bool], Asked | None]
"""(rng, shapes, scale of lengths, whether an empty answer is wanted) → wording and answer; None = not this time."""


def make_instruction(
    rng: random.Random, shapes: tuple[Shape, ...], image_size: int, kind: str, tries: int = 12, unmet: str | None = None
) -> Instruction | None:
    """A random instruction of ``kind`` about the shapes; None when none was found that is clear.

    Args:
        unmet: for the kind "no_target", the relation that nothing fulfils; None: a plain description or any relation.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in INSTRUCTION_KINDS:
        raise ValueError(f"unknown instruction kind {kind!r}, expected one of {INSTRUCTION_KINDS}")
    for _ in range(tries):
        made: Instruction | None
        if kind == "category":
            made = _category(rng, shapes)
        elif kind == "phrases":
            made = _phrases(rng, shapes)
        elif kind == "attribute":
            made = _attribute(rng, shapes)
        elif kind == "no_target" and unmet is None and rng.random() < 0.6:
            made = _plain_no_target(rng, shapes)
        else:
            made = _relational(rng, shapes, image_size, kind, unmet)
        if made is not None:
            return made
    return None


def make_instructions(
    rng: random.Random, shapes: tuple[Shape, ...], image_size: int, kinds: Iterable[str], unmet: str | None = None
) -> list[Instruction]:
    """One instruction for each entry of ``kinds`` where there is one, all of them different texts."""
    made: dict[str, Instruction] = {}
    for kind in kinds:
        for _ in range(3):
            instruction = make_instruction(rng, shapes, image_size, kind, unmet=unmet)
            if instruction is None:
                break
            if instruction.text not in made:
                made[instruction.text] = instruction
                break
    return list(made.values())


# --- plain concepts: the phrase is the description itself


def _category(rng: random.Random, shapes: tuple[Shape, ...]) -> Instruction:
    noun = _describe(rng, rng.choice(shapes), ("kind",), rng.choices((0, 1, 2), weights=(3, 5, 1))[0])
    return _plain(rng, shapes, noun, "category")


def _attribute(rng: random.Random, shapes: tuple[Shape, ...]) -> Instruction:
    shape = rng.choice(shapes)
    fields = rng.sample(("size", "texture", "color"), rng.choices((1, 2), weights=(4, 1))[0])
    noun = _describe(rng, shape, fields, 0)
    if len(fields) == 1 and rng.random() < 0.4:
        body = rng.choice(TEMPLATES["adjective"]).format(a=getattr(shape, fields[0]))
        return Instruction(_request(rng, body, False), "attribute", ((noun.plural, noun.pick(shapes)),))
    return _plain(rng, shapes, noun, "attribute")


def _plain_no_target(rng: random.Random, shapes: tuple[Shape, ...]) -> Instruction | None:
    """Mostly descriptions whose words all occur in the scene, but not together."""
    if rng.random() < 0.6:
        kinds, colors = [shape.kind for shape in shapes], [shape.color for shape in shapes]
        extra = rng.choice((0, 0, 1))
        noun = Noun(color=rng.choice(colors), kind=rng.choice(kinds))
        if extra:
            noun = (
                noun._replace(texture=rng.choice(TEXTURES))
                if rng.random() < 0.5
                else noun._replace(size=rng.choice(SIZES))
            )
    else:
        noun = Noun(color=rng.choice((None, *COLORS)), kind=rng.choice((None, *KINDS)))
    if noun == Noun() or noun.pick(shapes):
        return None
    return _plain(rng, shapes, noun, "no_target")


def _phrases(rng: random.Random, shapes: tuple[Shape, ...]) -> Instruction | None:
    nouns: list[Noun] = []
    taken: set[int] = set()
    for _ in range(rng.choice((2, 2, 3))):
        free = [shape for i, shape in enumerate(shapes) if i not in taken]
        if not free:
            break
        fields = ("kind",) if rng.random() < 0.8 else ("color",)
        noun = _describe(rng, rng.choice(free), fields, rng.choice((0, 1, 1)))
        picked = noun.pick(shapes)
        if taken.isdisjoint(picked):
            nouns.append(noun)
            taken.update(picked)
    if len(nouns) < 2:
        return None
    body = ""
    for position, noun in enumerate(nouns):
        named = _named(rng, shapes, noun).text
        left = len(nouns) - position - 1
        joint = "{d}" if left == 0 else TEMPLATES["list"][0] if left > 1 else rng.choice(TEMPLATES["list"][1:])
        body += joint.format(d=named)
    phrases = tuple((noun.plural, noun.pick(shapes)) for noun in nouns)
    return Instruction(_request(rng, body, True), "phrases", phrases)


def _plain(rng: random.Random, shapes: tuple[Shape, ...], noun: Noun, kind: str) -> Instruction:
    asked = _named(rng, shapes, noun)
    return Instruction(_request(rng, asked.text, asked.plural), kind, ((noun.plural, asked.answer),))


# --- everything else: the phrase is generic


def _relational(
    rng: random.Random, shapes: tuple[Shape, ...], image_size: int, kind: str, unmet: str | None
) -> Instruction | None:
    empty = kind == "no_target"
    source = kind if not empty else rng.choice(tuple(RELATIONS)) if unmet is None else unmet
    asked = rng.choice(RELATIONS[source])(rng, shapes, image_size / REFERENCE_SIZE, empty)
    if asked is None or bool(asked.answer) == empty:
        return None
    text = asked.text if asked.text.endswith("?") else _request(rng, asked.text, asked.plural)
    return Instruction(text, kind, ((GENERIC_PHRASE, asked.answer),))


def _say(rng: random.Random, name: str, **words: str) -> str:
    """A wording of the template group ``name``, in a third of the cases as the question of its own (if it has any)."""
    questions = TEMPLATES.get(f"{name}_question", ())
    group = questions if questions and rng.random() < 0.35 else TEMPLATES[name]
    return rng.choice(group).format(**words)


def _is_plural(text: str) -> bool:
    return not text.startswith(("every ", "each ", "everything", "all that", "whatever", "all but"))


def _superlative(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    largest = rng.random() < 0.5
    noun, group = _group(rng, shapes, empty, least=2)
    words = {"m": rng.choice(LARGEST if largest else SMALLEST), **noun.words}
    if not empty:
        winners = set()
        for name in ("area", "full_area"):  # what is seen and what is known to be behind must agree
            values = sorted(((getattr(shapes[i], name), i) for i in group), reverse=largest)
            (first, winner), (second, _) = values[:2]
            if max(first, second) < AREA_MARGIN * min(first, second):
                return None
            winners.add(winner)
        if len(winners) > 1:
            return None
        group = tuple(winners)
    return Asked(_say(rng, "superlative", **words), group, plural=False)


def _side(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    anchor = rng.randrange(len(shapes))
    name = _unique_name(rng, shapes, anchor)
    if name is None:
        return None
    noun, group = _group(rng, shapes, empty=False, least=1)
    if noun.matches(shapes[anchor]) and rng.random() < 0.5 and name.kind is not None:
        noun, group = Noun(), Noun().pick(shapes)
    others = [i for i in group if i != anchor]
    edge = rng.choice(tuple(ADVERBS))
    answer = _beyond(shapes, others, edge, _position(shapes[anchor], edge), scale)
    if not others or answer is None:
        return None
    text = _say(rng, "side", side=rng.choice(ADVERBS[edge]), r=f"the {name.singular}", **noun.words)
    return Asked(text, answer, _is_plural(text))


def _half(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    noun, group = _group(rng, shapes, empty=False, least=1)
    edge = rng.choice(tuple(HALVES))
    middle = REFERENCE_SIZE * scale / 2
    answer = _beyond(shapes, group, edge, middle if edge in ("left", "top") else -middle, scale)
    if answer is None or len(answer) == len(shapes):
        return None
    return Asked(_say(rng, "half", half=HALVES[edge], **noun.words), answer)


def _extreme(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    noun, group = _group(rng, shapes, empty, least=2)
    edge = rng.choice(tuple(EXTREMES))
    if not empty:
        values = sorted((_position(shapes[i], edge), i) for i in group)
        if values[1][0] - values[0][0] < SIDE_MARGIN * scale:
            return None
        group = (values[0][1],)
    return Asked(_say(rng, "extreme", e=rng.choice(EXTREMES[edge]), **noun.words), group, plural=False)


def _distance(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    anchor = rng.randrange(len(shapes))
    name = _unique_name(rng, shapes, anchor)
    noun, group = _group(rng, shapes, empty, least=2)
    group = tuple(i for i in group if i != anchor)
    if name is None or (len(group) < 2 and not empty):
        return None
    near = rng.random() < 0.65
    if not empty:
        a = shapes[anchor]
        centres = [(((shapes[i].x - a.x) ** 2 + (shapes[i].y - a.y) ** 2) ** 0.5, i) for i in group]
        gaps = [(distance - shapes[i].radius, i) for distance, i in centres]
        winners = set()
        for values in (centres, gaps):  # from centre to centre and from rim to rim must agree
            values.sort(reverse=not near)
            if abs(values[0][0] - values[1][0]) < SIDE_MARGIN * scale:
                return None
            winners.add(values[0][1])
        if len(winners) > 1:
            return None
        group = tuple(winners)
    words = {"near": rng.choice(NEAR if near else FAR), "r": f"the {name.singular}", **noun.words}
    return Asked(_say(rng, "distance", **words), group, plural=False)


def _ordinal(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    noun, group = _group(rng, shapes, empty=False, least=1 if empty else 2)
    edge = rng.choice(tuple(EXTREMES))
    values = sorted((_position(shapes[i], edge), i) for i in group)
    if any(b[0] - a[0] < ORDINAL_MARGIN * scale for a, b in zip(values, values[1:], strict=False)):
        return None
    place = len(group) + rng.choice((0, 0, 1)) if empty else rng.randrange(len(group))
    if place >= len(ORDINALS):
        return None
    answer = () if empty else (values[place][1],)
    return Asked(_say(rng, "ordinal", n=ORDINALS[place], edge=edge, **noun.words), answer, plural=False)


def _count(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    attribute = rng.choice(("color", "kind"))
    counts = Counter(getattr(shape, attribute) for shape in shapes)
    times = rng.choice((1, 2, 3, 4)) if empty else rng.choice(sorted({n for n in counts.values() if n in TIMES}) or [0])
    if not times:
        return None
    answer = tuple(i for i, shape in enumerate(shapes) if counts[getattr(shape, attribute)] == times)
    if len(answer) == len(shapes):
        return None
    text = _say(rng, "count", x=attribute, k=TIMES[times])
    return Asked(text, answer, _is_plural(text))


def _common(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    attribute, which = rng.choice(("color", "kind")), rng.choice(COMMON)
    counts = Counter(getattr(shape, attribute) for shape in shapes).most_common()
    if which == "least":
        counts.reverse()
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return None
    answer = tuple(i for i, shape in enumerate(shapes) if getattr(shape, attribute) == counts[0][0])
    return Asked(_say(rng, "common", x=attribute, c=which), answer)


def _not(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    """The circles that are not red; the red shapes that are not circles."""
    noun, group = _group(rng, shapes, empty=False, least=1 if empty else 2)
    options = [name for name in ATTRIBUTES if getattr(noun, name) is None]
    attribute = rng.choice(options)
    value = getattr(shapes[rng.choice(group)], attribute)
    answer = tuple(i for i in group if getattr(shapes[i], attribute) != value)
    if attribute == "kind":
        text = rng.choice(TEMPLATES["not"][:2]).format(a=PLURALS[value], **noun.words)
    else:
        text = _say(rng, "not", a=value, **noun.words)
    return Asked(text, answer, _is_plural(text))


def _except(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    noun = _describe(rng, rng.choice(shapes), rng.choice((("kind",), ("color",), ("texture",))), rng.choice((0, 0, 1)))
    excluded = noun.pick(shapes)
    answer = tuple(i for i in range(len(shapes)) if i not in excluded)
    text = _say(rng, "except", **noun.words)
    return Asked(text, answer, _is_plural(text) and not text.startswith("everything"))


def _neither(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    noun, group = _group(rng, shapes, empty=False, least=2)
    if noun.color is not None:
        return None
    present = sorted({shapes[i].color for i in group})
    if len(present) < 2:
        return None
    first, second = rng.sample(present, 2)
    answer = tuple(i for i in group if shapes[i].color not in (first, second))
    text = _say(rng, "neither", a=first, b=second, **noun.words)
    return Asked(text, answer, _is_plural(text))


def _odd(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    """Without a hint: only where no other shape could be meant."""
    odd = {odd_ones(shapes, name) for name in ATTRIBUTES} - {None}
    alike = len(shapes) >= 4 and all(len({getattr(shape, name) for shape in shapes}) == 1 for name in ATTRIBUTES)
    if (not alike) if empty else len(odd) != 1:
        return None
    answer = () if empty else tuple(index for index in odd if index is not None)
    return Asked(_say(rng, "odd"), answer, plural=False)


def _odd_hint(rng: random.Random, shapes: tuple[Shape, ...], scale: float, empty: bool) -> Asked | None:
    names = ["kind", "color", "texture"]
    if empty:  # all the same in this attribute: nothing differs
        names = [name for name in names if len(shapes) >= 4 and len({getattr(shape, name) for shape in shapes}) == 1]
    else:
        names = [name for name in names if odd_ones(shapes, name) is not None]
    if not names:
        return None
    name = rng.choice(names)
    index = odd_ones(shapes, name)
    return Asked(_say(rng, "odd_hint", x=name), () if index is None else (index,), plural=False)


RELATIONS: dict[str, tuple[Maker, ...]] = {
    "superlative": (_superlative,),
    "spatial": (_side, _side, _side, _half, _extreme, _distance),
    "ordinal": (_ordinal,),
    "counting": (_count, _count, _common),
    "negation": (_not, _not, _except, _neither),
    "reasoning": (_odd, _odd_hint),
}


# --- small parts of the above


def _describe(rng: random.Random, shape: Shape, fields: Iterable[str], extra: int) -> Noun:
    """A description of the shape by ``fields`` and so many further attributes, colour before the others."""
    chosen = list(fields)
    for _ in range(extra):
        options = [name for name in Noun._fields if name not in chosen]
        colored = "color" in options and rng.random() < 0.7
        chosen.append("color" if colored else rng.choice(options))
    return Noun(**{name: getattr(shape, name) for name in chosen})


def _named(rng: random.Random, shapes: tuple[Shape, ...], noun: Noun) -> Asked:
    """Wording for all the shapes of a description: the circles, every circle, or the circle if it is alone."""
    answer = noun.pick(shapes)
    groups = ["several", "several", "each"] + (["single"] * 2 if len(answer) == 1 else [])
    group = rng.choice(groups)
    return Asked(rng.choice(TEMPLATES[group]).format(**noun.words), answer, plural=group == "several")


def _request(rng: random.Random, body: str, plural: bool) -> str:
    return rng.choice(TEMPLATES["request"]).format(d=body, be="are" if plural else "is")


def _group(rng: random.Random, shapes: tuple[Shape, ...], empty: bool, least: int) -> tuple[Noun, tuple[int, ...]]:
    """A description by kind, colour or texture with the shapes it fits: at least ``least``, or with ``empty`` none."""
    for _ in range(10):
        if empty:
            noun = Noun(color=rng.choice((None, *COLORS)), kind=rng.choice(KINDS))
        else:
            fields = rng.choice(((), ("kind",), ("kind",), ("color",), ("color", "kind"), ("texture", "kind")))
            noun = _describe(rng, rng.choice(shapes), fields, 0)
        group = noun.pick(shapes)
        if not group if empty else len(group) >= least:
            return noun, group
    if empty:
        missing = [noun for kind in KINDS if not (noun := Noun(kind=kind)).pick(shapes)]
        if missing:
            return rng.choice(missing), ()
        raise AssertionError("six shapes of every kind and colour cannot be")
    return Noun(), Noun().pick(shapes)


def _unique_name(rng: random.Random, shapes: tuple[Shape, ...], index: int) -> Noun | None:
    """A short description that fits this shape alone; None if there is none."""
    options = (
        ("kind",),
        ("color",),
        ("color", "kind"),
        ("size", "kind"),
        ("texture", "kind"),
        ("size", "color", "kind"),
    )
    names = [_describe(rng, shapes[index], fields, 0) for fields in options]
    unique = [name for name in names if name.pick(shapes) == (index,)]
    return rng.choice(unique[:3]) if unique else None


def _position(shape: Shape, edge: str) -> float:
    """How far the shape is from an edge, up to a constant: smaller is nearer to it."""
    return {"left": shape.x, "right": -shape.x, "top": shape.y, "bottom": -shape.y}[edge]


def _beyond(
    shapes: tuple[Shape, ...], group: Iterable[int], edge: str, line: float, scale: float
) -> tuple[int, ...] | None:
    """Those of ``group`` nearer to the edge than ``line``; None if one of them is too close to tell."""
    answer = []
    for i in group:
        difference = line - _position(shapes[i], edge)
        if abs(difference) < SIDE_MARGIN * scale:
            return None
        if difference > 0:
            answer.append(i)
    return tuple(answer)
