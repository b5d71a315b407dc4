"""Instructions in templates: grammatical around any words, the words as they stand, the same for the same draw."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.data import wording
from instructsam.data.augmentation import names_colour, swap_sides
from instructsam.data.wording import ADDED_BYTES, listed, word, word_joint
from instructsam.structures import PhraseTarget, Turn

FORMS = ("category", "phrase", "sentence", "ocr")
LISTS = {
    "category": wording.CATEGORY,
    "categories": wording.CATEGORIES,
    "phrase": wording.PHRASE,
    "phrases": wording.PHRASES,
    "ocr": wording.OCR,
    "sentence": wording.AFTER_QUESTIONS,
}


def turn_of(text: str, form: str) -> Turn:
    answer = ("Here: ", ".") if form == "sentence" else ()
    return Turn(text, (PhraseTarget(text[:9] or "x"),), "kind", "7", form, answer)


def asked(text: str, form: str, count: int = 200) -> set[str]:
    rng = np.random.default_rng(0)
    return {word(turn_of(text, form), rng).instruction for _ in range(count)}


@pytest.mark.parametrize("name", LISTS)
def test_templates(name):
    templates = LISTS[name]
    assert len(set(templates)) == len(templates) >= 12
    for template in templates:
        assert template.count("{}") == (name != "sentence") and template == " ".join(template.split())
        assert template[0].isupper() and template[-1] in ".?" and len(template.encode()) <= ADDED_BYTES
        assert not re.search(r"\b(a|an|the|any|some|is|are) \{\}", template), "an article or number that may not fit"
        assert not re.search(r"\{\}s|\bone\b", template)
        assert swap_sides(template) == template and not names_colour(template)


def test_every_template_is_used():
    for form in ("category", "phrase", "ocr"):
        assert len(asked("dog", form)) == len(LISTS[form])
    assert len(asked("Which one barks?", "sentence")) == 1 + len(wording.AFTER_QUESTIONS)


def test_what_a_turn_is_besides_its_words_stays():
    for form in FORMS:
        before = turn_of("what barks?", form)
        after = word(before, np.random.default_rng(1))
        assert (after.phrases, after.kind, after.id, after.answer) == (before.phrases, "kind", "7", before.answer)
        assert after.form == ""
    plain = turn_of("  as it  stands", "")
    rng = np.random.default_rng(1)
    assert word(plain, rng) is plain and rng.random() == np.random.default_rng(1).random()
    with pytest.raises(ValueError, match="no templates of the form 'verse'"):
        word(turn_of("dog", "verse"), rng)


def test_examples():
    assert "Segment every instance of chair or stool." in asked("chair or stool", "category")
    assert "Segment 2nd from left." in asked("2nd from left", "phrase")
    assert 'Where does it say "EXIT"?' in asked("EXIT", "ocr")
    assert "Can you segment who is it?" in asked("who is it?", "phrase")
    assert 'Where does it say 5" pipe?' in asked('5" pipe', "ocr") and not any('""' in t for t in asked('"a"', "ocr"))


@pytest.mark.parametrize(
    "text, ended",
    [
        ("what can one sit on", "what can one sit on?"),
        ("Something to sit on", "Something to sit on."),
        ("Something to sit on.", "Something to sit on."),
        ("He said “sit!”", "He said “sit!”"),
        ("Which of them, if any:", "Which of them, if any:"),
        ("Can you segment the dog?", "Can you segment the dog?"),
    ],
)
def test_sentences_get_an_end_and_only_questions_a_request(text, ended):
    found = asked(text, "sentence")
    assert ended in found and all(some.startswith(ended) for some in found)
    assert (len(found) > 1) == (ended == "what can one sit on?")
    assert "what can one sit on? Please segment the answer." in asked("what can one sit on", "sentence")


words = st.text(st.sampled_from("abAB {}.?!,;\"'%éß\n left"), min_size=1).filter(str.strip)


@given(words, st.sampled_from(FORMS), st.integers(0, 2**32))
def test_words_stand_in_it_as_they_are(text, form, seed):
    clean = " ".join(text.split())
    found = word(turn_of(text, form), np.random.default_rng(seed)).instruction
    assert found == word(turn_of(text, form), np.random.default_rng(seed)).instruction
    assert found.count(clean) >= 1
    around = found.replace(clean, "\0", 1)
    assert "  " not in found and len(around.encode()) <= ADDED_BYTES
    assert clean[-1] not in ".?!" or not re.search(r"\0[.?]$", around), "a second end of sentence"
    assert "{}" not in around


@given(st.lists(words, min_size=2, max_size=5), st.lists(st.sampled_from(FORMS[:2]), min_size=5), st.integers(0, 99))
def test_several_at_once(texts, forms, seed):
    turns = [turn_of(text, form) for text, form in zip(texts, forms, strict=False)]
    found = word_joint(turns, np.random.default_rng(seed))
    assert found == word_joint(turns, np.random.default_rng(seed)) and found.form == "" and found.answer == ()
    assert found.phrases == tuple(turn.phrases[0] for turn in turns)
    assert found.kind == "kind" and found.id == "+".join(["7"] * len(turns))
    position = 0
    for text in texts:
        clean = " ".join(text.split())
        position = found.instruction.index(clean, position) + len(clean)
    bare = sum(len(" ".join(text.split()).encode()) for text in texts)
    assert "  " not in found.instruction and len(found.instruction.encode()) <= bare + ADDED_BYTES * len(texts)


def test_lists():
    assert listed(["a", "b"]) == "a and b" and listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["man, left", "dog"]) == "man, left; dog" and listed(["a", "b and c"]) == "a; b and c"
    assert listed(["cat", "chair or stool"]) == "cat; chair or stool"
    rng = np.random.default_rng(0)
    several = {word_joint([turn_of(t, "category") for t in ("dog", "cat")], rng).instruction for _ in range(200)}
    assert len(several) == len(wording.CATEGORIES) and "Segment every instance of dog and cat." in several
    mixed = [turn_of("dog", "category"), turn_of("the left one", "phrase")]
    assert "I am looking for dog and the left one." in {word_joint(mixed, rng).instruction for _ in range(200)}
