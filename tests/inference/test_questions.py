"""One that cannot be answered spoils no other, and no memory is kept for those that failed."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
from PIL import Image

from instructsam.errors import DataError
from instructsam.inference.model import InstructSAM
from instructsam.inference.questions import OutOfMemory, Question, answer_each
from instructsam.structures import Prediction

PICTURE = Image.new("RGB", (40, 30))


class Tensor:
    """Stands for what a failed batch leaves on a GPU."""


class Toy:
    """Stands for a model that has memory for two questions, and for none that ask for everything."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.left_behind: list[weakref.ref[Tensor]] = []
        self.predictor = SimpleNamespace(check=self.check)

    def check(self, turns, size):
        assert size == (30, 40)
        if turns[-1].instruction == "reserved":
            raise ValueError("a reserved token")

    def answer(self, images, conversations, threshold):
        texts = [turns[-1].instruction for turns in conversations]
        assert not any(one() for one in self.left_behind), "a failed batch is still in memory"
        held = Tensor()
        self.left_behind.append(weakref.ref(held))
        self.batches.append(texts)
        if len(texts) > 2 or "everything" in texts:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if "broken" in texts:
            raise RuntimeError("device-side assert")
        return [SimpleNamespace(answer=text, threshold=least) for text, least in zip(texts, threshold, strict=True)]


@pytest.fixture
def toy():
    gc.disable()  # what is freed only by the next collection is not freed in time
    yield Toy()
    gc.enable()


def test_faults_are_found_before_anything_runs(toy):
    found = answer_each(toy, [Question(PICTURE, text) for text in ("reserved", "a", "reserved")])
    assert [type(one) for one in found] == [ValueError, SimpleNamespace, ValueError] and toy.batches == [["a"]]
    assert answer_each(toy, [Question(PICTURE, "reserved")])[0].args == ("a reserved token",)
    assert answer_each(toy, []) == []


def test_half_a_character_spoils_no_other(checkpoint):
    """A tokenizer refuses it with an error of its own kind."""
    model = InstructSAM.from_pretrained(checkpoint, device="cpu", max_new_tokens=4)
    asked = [Question(Image.new("RGB", (96, 96)), text) for text in ("every circle", "a \ud800 b", "every star")]
    found = answer_each(model, asked)
    assert [isinstance(one, Prediction) for one in found] == [True, False, True]
    assert isinstance(found[1], DataError) and "holds half a character" in str(found[1])


def test_whatever_is_wrong_with_a_question_spoils_no_other(toy):
    def check(turns, size):
        if turns[-1].instruction == "odd":
            raise TypeError("no text")

    toy.predictor.check = check
    found = answer_each(toy, [Question(PICTURE, "odd"), Question(PICTURE, "a")])
    assert isinstance(found[0], TypeError) and found[1].answer == "a"


def test_what_is_too_much_together_is_asked_alone(toy):
    texts = ["a", "everything", "broken", "b"]
    found = answer_each(toy, [Question(PICTURE, text) for text in texts])
    assert toy.batches == [texts, *([text] for text in texts)]
    assert [one.answer for one in (found[0], found[3])] == ["a", "b"]
    assert isinstance(found[1], OutOfMemory) and "a picture of 40x30 pixels: not enough memory" in str(found[1])
    assert isinstance(found[2], RuntimeError)


def test_given_and_written_answers_are_not_mixed(toy):
    questions = [Question(PICTURE, "a", threshold=0.1), Question(PICTURE, "b", ("x",), 0.2), Question(PICTURE, "c")]
    assert [(one.answer, one.threshold) for one in answer_each(toy, questions)] == [("a", 0.1), ("b", 0.2), ("c", 0.3)]
    assert toy.batches == [["a", "c"], ["b"]]
