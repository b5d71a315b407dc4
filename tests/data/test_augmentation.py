"""Flipped and tinted pictures: words stay true, masks stay where they belong, and nothing is drawn where all is off."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from instructsam import masks
from instructsam.data.augmentation import (
    Augmentation,
    PictureChange,
    flip_sample,
    may_be_flipped,
    names_colour,
    sides_are_clear,
    swap_sides,
)
from instructsam.structures import PhraseTarget, Sample, Turn


def sample_of(*texts: str, form: str = "phrase", **changes) -> Sample:
    turns = tuple(Turn(text, (PhraseTarget(text),), form=form) for text in texts)
    return Sample(**{"id": "s", "image": Path("s.png"), "height": 4, "width": 6, "turns": turns, **changes})


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, flipped",
    [
        ("the left one", "the right one"),
        ("2nd from left", "2nd from right"),
        ("Left guy", "Right guy"),
        ("LEFT", "RIGHT"),
        ("leftmost bowl, right-most cup", "rightmost bowl, left-most cup"),
        ("left-hand side, righthand side", "right-hand side, lefthand side"),
        ("upper-left corner and bottomright", "upper-right corner and bottomleft"),
        ("Leftward and rightwards", "Rightward and leftwards"),
        ("left-facing bird on the right of the tree", "right-facing bird on the left of the tree"),
        ("from left to right", "from right to left"),
        ("which cup is left of the plate", "which cup is right of the plate"),
        ("to the left of the bright upright cleft", "to the right of the bright upright cleft"),
        ("man in the middle", "man in the middle"),
        ("right side left elephant", "left side right elephant"),
        ("third zebra from the far left", "third zebra from the far right"),
        ("the second leftmost cup", "the second rightmost cup"),
        ("cup next to the plate", "cup next to the plate"),
        ("second shelf from the top", "second shelf from the top"),
        ("counting from the left, which star is the third?", "counting from the right, which star is the third?"),
        ("second zebra from left and third cup from right", "second zebra from right and third cup from left"),
        ("first leftmost cup, third one from the right", "first rightmost cup, third one from the left"),
    ],
)
def test_sides_that_are_clear_change_places(text, flipped):
    assert sides_are_clear(text) and swap_sides(text) == flipped and swap_sides(flipped) == text
    assert may_be_flipped(sample_of(text)) and flip_sample(sample_of(text)).turns[0].phrases[0].text == flipped


@pytest.mark.parametrize(
    "text",
    [
        "second zebra",
        "2nd giraffe",
        "the First cup",
        "last elephant in the row",
        "third man from the end",
        "the next dog, please",
        "second man in the back row",
        "second cup in front of the plate",
        "second dog on the left",
        "third book from left on the second shelf",
        "the second zebra and the third horse from the left",
        "third book from the top of the second shelf",
        "first, second and third cup from the left or from the right",
        "third rightmost cup, second zebra",
        "the 21st sheep",
        "the dog right behind him",
        "right next to the car",
        "what is he doing right now?",
        "the man right in front",
        "the man left in front",
        "all right",
        "the cup right here",
        "Which is the right way?",
        "what is left",
        "what's left on the plate",
        "the pizza left over",
        "the leftovers",
        "bag left behind",
        "which cup has left a stain",
        "the car that he left",
        "human rights",
        "this one, right?",
        "guy on L",
        "R side",
        "rigth guy",
        "LeFt",
        "the letter on the left",
        "player number 10",
        "the bus with 24",
        "#7",
        "sign that says stop",
        "where is the text",
        "man reading",
        "the clock at five o'clock",
        "clockwise arrow",
        'shirt with "love"',
        "shirt with 'love' on it",
        "the “love” shirt",
        "the west side",
    ],
)
def test_no_flip_where_words_would_be_false_or_doubtful(text):
    assert not may_be_flipped(sample_of("a man", text))
    turn = Turn("find it", (PhraseTarget("a man"),), answer=(text, ""))
    assert not may_be_flipped(sample_of(turns=(turn,)))


@pytest.mark.parametrize(
    "instruction, phrase, answer",
    [
        ("the second zebra", "zebra", ("Counted from the left: ", ".")),
        ("count them from the left", "second zebra", ("", ".")),
        ("count them from the left", "zebra", ("", " is the second.")),
    ],
)
def test_what_one_text_says_makes_no_other_clear(instruction, phrase, answer):
    """Where an order begins must stand in the same text as the place."""
    turn = Turn(instruction, (PhraseTarget(phrase),), answer=answer)
    assert sides_are_clear(" ".join(turn.texts)) and not may_be_flipped(sample_of(turns=(turn,)))


def test_no_flip_of_what_is_read_or_answered_in_plain_words():
    assert may_be_flipped(sample_of("exit")) and not may_be_flipped(sample_of("exit", form="ocr"))
    assert not may_be_flipped(sample_of(turns=(Turn("what is it?", answer=("a man",)),)))


@pytest.mark.slow
@given(st.text(st.sampled_from("left Right LEFT most-hand's.,é_2"), max_size=40) | st.text(max_size=20))
def test_words_flipped_twice_are_the_same(text):
    assert swap_sides(swap_sides(text)) == text
    pieces = [text, "left", text, "Right", text]
    joined = " ".join(pieces)
    assert swap_sides(swap_sides(joined)) == joined != swap_sides(joined)
    assert may_be_flipped(sample_of(text)) == may_be_flipped(sample_of(swap_sides(text)))


@pytest.mark.parametrize(
    "text",
    [
        "red car",
        "the reddish one",
        "Greenish",
        "a bluish hue",
        "whitish",
        "purplish-grey",
        "black-and-white photo",
        "darker",
        "in the dark",
        "brightest light",
        "what colour is it",
        "colorful",
        "blonde",
        "the lightest",
        "b&w",
        "whites",
        "the pale horse",
        "light-brown",
        "yellowy",
        "darkhaired",
        "shaded",
    ],
)
def test_colours(text):
    assert names_colour(text)


@pytest.mark.parametrize("text", ["man in hat", "bored redo", "tank", "stand", "delighted", "greenhouse", "slight", ""])
def test_no_colours(text):
    assert not names_colour(text)


# ---- masks and pictures ---------------------------------------------------------------------------------------------


@given(arrays(np.bool_, st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 9))), st.integers(0, 20))
def test_flipping_twice_is_the_identity(found, seed):
    count, height, width = found.shape
    rles = tuple(masks.encode_batch(found)) if count else ()
    rng = np.random.default_rng(seed)
    boxes = [[float(x) for x in rng.integers(0, 9, 4)] for _ in rles]
    objects = tuple({"id": k, "rle": rle, "bbox": box} for k, (rle, box) in enumerate(zip(rles, boxes, strict=True)))
    phrases = (PhraseTarget("left dog", rles[:2], True), PhraseTarget("Right", rles[2:]), PhraseTarget("none"))
    turns = (Turn("LEFT dog", phrases, "kind", "7", "phrase", ("on the left: ", "", "", ".")),)
    sample = Sample("s", Path("s.png"), height, width, turns, objects, joint=True)
    flipped = flip_sample(sample)
    assert flip_sample(flipped) == sample
    mirrored = [rle for phrase in flipped.turns[0].phrases for rle in phrase.rles]
    np.testing.assert_array_equal(masks.decode_batch(mirrored, height, width), np.flip(found, 2))
    assert [item["rle"] for item in flipped.objects] == mirrored
    for before, after in zip(boxes, flipped.objects, strict=True):
        x, y, w, h = before
        assert after["bbox"] == [width - (x + w), y, w, h]
    turn = flipped.turns[0]
    assert turn.instruction == "RIGHT dog" and turn.answer[0] == "on the right: " and flipped.joint
    assert [(p.text, p.box_only) for p in turn.phrases] == [("right dog", True), ("Left", False), ("none", False)]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def test_pictures():
    before = picture()
    pixels = np.asarray(before).astype(float)
    assert not PictureChange() and PictureChange().apply(before) is before
    np.testing.assert_array_equal(PictureChange(flip=True).apply(before), pixels[:, ::-1])
    brighter = np.asarray(PictureChange(factors=(1.3, 1.0, 1.0)).apply(before))
    assert np.abs(brighter - (pixels * 1.3).clip(0, 255)).max() <= 1
    flat = np.asarray(PictureChange(factors=(1.0, 0.5, 1.0)).apply(before))
    assert flat.std() < 0.6 * pixels.std() and flat.mean() == pytest.approx(pixels.mean(), abs=8)
    dull = np.asarray(PictureChange(factors=(1.0, 1.0, 0.5)).apply(before)).astype(float)
    assert np.ptp(dull, axis=2).mean() == pytest.approx(np.ptp(pixels, axis=2).mean() / 2, abs=2)
    np.testing.assert_array_equal(before, pixels)


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_probabilities_and_strengths():
    rng = np.random.default_rng(0)
    drawn = [Augmentation(flip=0.3, jitter=0.4).draw(sample_of("man on the left"), rng) for _ in range(2000)]
    assert np.mean([change.flip for change in drawn]) == pytest.approx(0.3, abs=0.04)
    factors = np.array([change.factors for change in drawn])
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 0.03 and np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.1


def test_words_that_forbid_a_change():
    both = Augmentation(flip=1.0, jitter=0.4)
    rng = np.random.default_rng(0)
    red = both.draw(sample_of("man", "red hat"), rng)
    assert red.flip and red.factors == (1.0, 1.0, 1.0)
    right = both.draw(sample_of("man", "hat right behind"), rng)
    assert not right.flip and right.factors != (1.0, 1.0, 1.0)
    assert not both.draw(sample_of("man", image=None, height=0, width=0), rng)


def test_nothing_is_drawn_where_all_is_off():
    rng = np.random.default_rng(3)
    assert not Augmentation().draw(sample_of("man"), rng)
    assert rng.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"flip": 1.5}, "augmentation.flip=1.5: must be between 0 and 1"),
        ({"flip": True}, "augmentation.flip=True"),
        ({"jitter": -0.1}, "augmentation.jitter=-0.1"),
        ({"jitter": 1.0}, "augmentation.jitter=1: would"),
        ({"flop": 1}, "augmentation: unknown flop; known are flip, jitter"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Augmentation.from_mapping(values)


def test_settings():
    assert dataclasses.asdict(Augmentation.from_mapping({})) == {"flip": 0.0, "jitter": 0.0}
    assert Augmentation.from_mapping({"flip": 0.5, "jitter": 0.4}) == Augmentation(0.5, 0.4)
