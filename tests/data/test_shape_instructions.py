"""Instructions about scenes: every answer is found again from the words and the masks by a separate, plain reading."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from instructsam.data.shape_instructions import INSTRUCTION_KINDS, Instruction, make_instruction
from instructsam.data.shape_wordings import vocabulary
from instructsam.data.shapes import Scene
from instructsam.data.tiny_world import make_example
from instructsam.processing.tokenizer import build_word_tokenizer, split_words

OWN_PHRASE = {"category", "phrases", "attribute"}
KIND_WORDS = "circle|square|triangle|star|cross|shape"
ADJECTIVES = "small|large|solid|striped|red|green|blue|yellow|purple|orange"
NOUN = re.compile(rf"\b((?:(?:{ADJECTIVES}) )*)({KIND_WORDS})(?:es|s)?\b")
EDGES = {
    "left": "left of|leftmost|from the left|left half",
    "right": "right of|rightmost|from the right|right half",
    "top": "above|higher than|topmost|highest|from the top|upper half",
    "bottom": "below|lower than|under|bottommost|lowest|from the bottom|lower half",
}
ORDINAL_WORDS = ["first", "second", "third", "fourth", "fifth", "sixth"]
TIMES_WORDS = {"once": 1, "twice": 2, "three times": 3, "four times": 4, "five times": 5}


@dataclass
class Seen:
    """A shape as its annotation shows it: attributes, and centre and area of its mask."""

    words: set[str]
    attributes: dict[str, str]
    x: float
    y: float
    area: int


def look(scene: Scene) -> list[Seen]:
    seen = []
    for shape, mask in zip(scene.shapes, scene.masks, strict=True):
        ys, xs = np.nonzero(mask)
        attributes = {name: getattr(shape, name) for name in ("kind", "color", "size", "texture")}
        seen.append(Seen({"shape", *attributes.values()}, attributes, xs.mean(), ys.mean(), len(xs)))
    return seen


def named(adjectives: str, noun: str, seen: list[Seen]) -> set[int]:
    wanted = {*adjectives.split(), noun}
    return {i for i, shape in enumerate(seen) if wanted <= shape.words}


def along(shape: Seen, edge: str) -> float:
    return {"left": shape.x, "right": -shape.x, "top": shape.y, "bottom": -shape.y}[edge]


def interpret(text: str, seen: list[Seen]) -> set[int]:
    """What a relational instruction means, by rules that look at its words only. Asserts the margins."""
    everything = set(range(len(seen)))
    nouns = [named(*match, seen) for match in NOUN.findall(text)]
    edge = next((name for name, words in EDGES.items() if re.search(rf"\b(?:{words})\b", text)), None)

    if match := re.search(r"\b(first|second|third|fourth|fifth|sixth)\b", text):
        place = ORDINAL_WORDS.index(match[1])
        order = sorted(nouns[0], key=lambda i: along(seen[i], edge))
        gaps = [along(seen[b], edge) - along(seen[a], edge) for a, b in zip(order, order[1:], strict=False)]
        assert all(gap >= 4 for gap in gaps)
        return set(order[place : place + 1])
    if match := re.search(r"\b(largest|biggest|smallest|tiniest)\b", text):
        sign = -1 if match[1] in ("largest", "biggest") else 1
        order = sorted(nouns[0], key=lambda i: sign * seen[i].area)
        if len(order) > 1:
            a, b = seen[order[0]].area, seen[order[1]].area
            assert max(a, b) >= 1.15 * min(a, b)
        return set(order[:1])
    if match := re.search(r"exactly (once|twice|three times|four times|five times)", text):
        name = "color" if "color" in text else "kind"
        values = Counter(shape.attributes[name] for shape in seen)
        return {i for i, shape in enumerate(seen) if values[shape.attributes[name]] == TIMES_WORDS[match[1]]}
    if match := re.search(r"(most|least) common (color|kind)", text):
        values = Counter(shape.attributes[match[2]] for shape in seen)
        extreme = (max if match[1] == "most" else min)(values.values())
        winners = [value for value, count in values.items() if count == extreme]
        assert len(winners) == 1
        return {i for i, shape in enumerate(seen) if shape.attributes[match[2]] == winners[0]}
    if match := re.search(r"neither (\w+) nor (\w+)", text):
        return {i for i in nouns[0] if not seen[i].words & {match[1], match[2]}}
    if match := re.search(r"(?:are|is) not (\w+)|except (\w+) ones", text):
        word = (match[1] or match[2]).removesuffix("s").replace("crosse", "cross")
        return {i for i in nouns[0] if word not in seen[i].words}
    if re.search(r"everything except|everything but|all shapes but|all but", text):
        return everything - nouns[-1]
    if match := re.search(r"closest to|nearest to|farthest from|furthest from", text):
        group, anchor = nouns
        assert len(anchor) == 1
        a = seen[next(iter(anchor))]
        sign = 1 if match[0] in ("closest to", "nearest to") else -1
        distances = {i: np.hypot(seen[i].x - a.x, seen[i].y - a.y) for i in group - anchor}
        order = sorted(distances, key=lambda i: sign * distances[i])
        if len(order) > 1:
            assert abs(distances[order[0]] - distances[order[1]]) >= 6
        return set(order[:1])
    if "half" in text:
        line = {"left": 48, "right": -48, "top": 48, "bottom": -48}[edge]
        differences = {i: line - along(seen[i], edge) for i in nouns[0]}
        assert all(abs(difference) >= 6 for difference in differences.values())
        return {i for i, difference in differences.items() if difference > 0}
    if edge is not None and len(nouns) == 2:
        group, anchor = nouns
        assert len(anchor) == 1
        line = along(seen[next(iter(anchor))], edge)
        differences = {i: line - along(seen[i], edge) for i in group - anchor}
        assert all(abs(difference) >= 6 for difference in differences.values())
        return {i for i, difference in differences.items() if difference > 0}
    if edge is not None:
        order = sorted(nouns[0], key=lambda i: along(seen[i], edge))
        assert len(order) < 2 or along(seen[order[1]], edge) - along(seen[order[0]], edge) >= 6
        return set(order[:1])
    if re.search(r"odd one out|does not|unlike|differs|different", text):
        hints = re.findall(r"\b(color|kind|texture)\b", text)
        odd = set()
        for name in hints or ("color", "kind", "texture", "size"):
            values = [shape.attributes[name] for shape in seen]
            odd |= {i for i, value in enumerate(values) if values.count(value) == 1 and len(set(values)) == 2}
        assert len(odd) <= 1 and len(seen) >= 4
        return odd
    raise AssertionError(f"no rule reads {text!r}")


@pytest.fixture(scope="module")
def examples() -> list[tuple[Scene, list[Instruction]]]:
    return [make_example(7, "train", i) for i in range(150)] + [make_example(7, "val", i) for i in range(150)]


def of_kind(examples, kind: str):
    found = [(scene, made) for scene, instructions in examples for made in instructions if made.kind == kind]
    assert len(found) >= 60, kind
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in INSTRUCTION_KINDS if kind not in OWN_PHRASE | {"no_target"}])
def test_relational_answers_follow_from_words_and_masks(examples, kind):
    for scene, made in of_kind(examples, kind):
        ((phrase, answer),) = made.phrases
        assert phrase == "shapes", made
        assert answer and set(answer) == interpret(made.text, look(scene)), made


def test_no_target_instructions_mean_nothing_in_the_picture(examples):
    plain = relational = 0
    for scene, made in of_kind(examples, "no_target"):
        ((phrase, answer),) = made.phrases
        assert answer == ()
        if phrase == "shapes":
            relational += 1
            assert interpret(made.text, look(scene)) == set(), made
        else:
            plain += 1
            assert named(*NOUN.fullmatch(phrase).groups(), look(scene)) == set(), made
            assert set(phrase.split()[:-1]) <= set(split_words(made.text)), made
    assert plain > 30 and relational > 30


@pytest.mark.parametrize("kind", sorted(OWN_PHRASE))
def test_plain_phrases_name_exactly_their_shapes(examples, kind):
    for scene, made in of_kind(examples, kind):
        seen, taken = look(scene), []
        assert len(made.phrases) in ((2, 3) if kind == "phrases" else (1,))
        for phrase, answer in made.phrases:
            assert answer and set(answer) == named(*NOUN.fullmatch(phrase).groups(), seen), made
            assert set(phrase.split()[:-1]) <= set(split_words(made.text)), made
            taken += answer
        assert len(taken) == len(set(taken))
        if kind == "phrases":  # in the order of the words
            asked = [" ".join(match).split() for match in NOUN.findall(made.text)]
            answered = [" ".join(NOUN.fullmatch(phrase).groups()).split() for phrase, _ in made.phrases]
            assert asked == answered


def test_training_scenes_get_about_twelve_different_instructions(examples):
    for _, instructions in examples[:150]:
        assert 9 <= len(instructions) <= 12
        assert len({made.text for made in instructions}) == len(instructions)
    counts = Counter(made.kind for _, instructions in examples[:150] for made in instructions)
    assert min(counts[kind] for kind in INSTRUCTION_KINDS) > 100


def test_other_splits_are_balanced(examples):
    counts = Counter(made.kind for _, instructions in examples[150:] for made in instructions)
    assert {counts[kind] for kind in INSTRUCTION_KINDS} == {75}


def test_wordings_vary_and_include_questions(examples):
    for kind in INSTRUCTION_KINDS:
        texts = [made.text for _, made in of_kind(examples, kind)]
        assert len(set(texts)) > 0.35 * len(texts)
        assert any(text.endswith("?") for text in texts) and any(not text.endswith("?") for text in texts)
        assert all(text == text.lower().strip() and "{" not in text for text in texts)


def test_vocabulary_covers_every_instruction_and_phrase(examples):
    tokenizer = build_word_tokenizer(vocabulary())
    for _, instructions in examples:
        for made in instructions:
            assert tokenizer.unk_token_id not in tokenizer.encode(made.text), made.text
            for phrase, _ in made.phrases:
                ids = tokenizer.encode(phrase)
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == phrase


def test_vocabulary_is_sorted_words_without_placeholders():
    words = vocabulary()
    assert words == sorted(set(words))
    assert {"circles", "odd", "twice", "?", "nor"} <= set(words)
    assert all(split_words(word) == [word] for word in words)
    assert not {"{", "d", "s", "p", "x"} & set(words)


def test_unknown_kind_is_refused(examples):
    with pytest.raises(ValueError, match="unknown instruction kind 'poetry'"):
        make_instruction(random.Random(0), examples[0][0].shapes, 96, "poetry")
