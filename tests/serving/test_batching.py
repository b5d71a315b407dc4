"""Questions that come together are answered together, and none waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
from PIL import Image

from instructsam.inference.questions import Question, answer_each
from instructsam.serving.batching import Batcher, Overloaded, Room

PICTURE = Image.new("RGB", (4, 4))


class Toy:
    """Stands for a model: answers with the instruction; fails where it says so; may be held up."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.predictor = SimpleNamespace(check=lambda turns, size: None)
        self.go_on = threading.Event()
        self.go_on.set()

    def answer(self, images, conversations, thresholds):
        texts = [turns[-1].instruction for turns in conversations]
        self.batches.append(texts)
        assert self.go_on.wait(300)
        if "memory" in texts and len(texts) > 1:
            raise MemoryError("too much")
        if "bad" in texts:
            raise ValueError("bad is no question")
        return [SimpleNamespace(answer=text, threshold=least) for text, least in zip(texts, thresholds, strict=True)]


def ask(batcher: Batcher, texts, thresholds=None):
    async def all_of_them():
        thresholds_of = thresholds or [0.3] * len(texts)
        asked = [
            batcher.answer(Question(PICTURE, text, None, least))
            for text, least in zip(texts, thresholds_of, strict=True)
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def batcher(toy):
    made = Batcher(toy, max_batch=4, max_waiting=8, max_wait=0.2)
    made.start()
    yield made
    toy.go_on.set()
    made.stop()


def test_questions_share_batches(batcher, toy):
    found = ask(batcher, [str(k) for k in range(10)])
    assert [(prediction.answer, size) for prediction, size in found] == [(str(k), 4 if k < 8 else 2) for k in range(10)]
    assert [len(batch) for batch in toy.batches] == [4, 4, 2]


def test_every_question_of_a_batch_keeps_its_own_threshold(batcher):
    found = ask(batcher, ["a", "b", "c"], [0.5, 0.05, 0.3])
    assert [(prediction.threshold, size) for prediction, size in found] == [(0.5, 3), (0.05, 3), (0.3, 3)]


def test_a_bad_question_spoils_no_other(batcher):
    found = ask(batcher, ["a", "bad", "b"])
    assert [one[0].answer for one in (found[0], found[2])] == ["a", "b"]
    assert isinstance(found[1], ValueError) and str(found[1]) == "bad is no question"


def test_what_is_too_much_together_is_tried_alone(batcher, toy):
    found = ask(batcher, ["memory", "a"])
    assert [one[0].answer for one in found] == ["memory", "a"] and [len(batch) for batch in toy.batches] == [2, 1, 1]


def test_given_and_written_answers_are_not_mixed(toy):
    questions = [Question(PICTURE, "a"), Question(PICTURE, "b", ("x",)), Question(PICTURE, "c")]
    assert [one.answer for one in answer_each(toy, questions)] == ["a", "b", "c"]
    assert toy.batches == [["a", "c"], ["b"]]


def test_places_are_counted(batcher):
    for _ in range(8):
        batcher.admit()
    with pytest.raises(Overloaded, match="8 questions wait already"):
        batcher.admit()
    batcher.release()
    batcher.admit()
    assert batcher.waiting == 8


@contextlib.asynccontextmanager
async def held_up(batcher, toy):
    """Meanwhile a question is being answered, and others wait."""
    toy.go_on.clear()
    first = asyncio.ensure_future(batcher.answer(Question(PICTURE, "first")))
    while not toy.batches:
        await asyncio.sleep(0.01)
    yield
    toy.go_on.set()
    await first


def test_a_question_that_nobody_waits_for_is_not_asked(batcher, toy):
    """Nor does it take the place of another in a batch."""

    async def give_up():
        async with held_up(batcher, toy):
            late = [asyncio.ensure_future(batcher.answer(Question(PICTURE, "late"))) for _ in range(5)]
            others = [asyncio.ensure_future(batcher.answer(Question(PICTURE, str(k)))) for k in range(4)]
            await asyncio.sleep(0.05)
            for one in late:
                one.cancel()
            await asyncio.sleep(0.05)
        await asyncio.gather(*others)

    asyncio.run(give_up())
    assert toy.batches == [["first"], ["0", "1", "2", "3"]]


def test_nor_does_one_in_the_middle_of_a_batch_take_a_place(batcher, toy):
    async def give_up():
        async with held_up(batcher, toy):
            texts = ["0", "late", "late", "1", "2", "3"]
            asked = [asyncio.ensure_future(batcher.answer(Question(PICTURE, text))) for text in texts]
            await asyncio.sleep(0.05)
            for one in asked[1:3]:
                one.cancel()
            await asyncio.sleep(0.05)
        await asyncio.gather(asked[0], *asked[3:])

    asyncio.run(give_up())
    assert toy.batches == [["first"], ["0", "1", "2", "3"]]


def test_a_picture_that_nobody_waits_for_is_let_go(batcher, toy):
    """At once, not when the queue has come to it: behind a slow batch they would pile up."""

    async def give_up():
        async with held_up(batcher, toy):
            picture = Image.new("RGB", (4, 4))
            kept = weakref.ref(picture)
            late = asyncio.ensure_future(batcher.answer(Question(picture, "late")))
            del picture
            await asyncio.sleep(0.05)
            assert kept() is not None
            late.cancel()
            del late
            await asyncio.sleep(0.05)
            gc.collect()
            assert kept() is None

    asyncio.run(give_up())


def test_room_for_pictures_is_bounded():
    room = Room(100)
    with room.hold(60):
        with pytest.raises(Overloaded, match="room for 40 pixels, this one has 41"), room.hold(41):
            pass
        with room.hold(40):
            pass
    with pytest.raises(KeyError), room.hold(100):
        raise KeyError
    with room.hold(100):
        pass


def test_stopping_refuses_what_waits(toy):
    batcher = Batcher(toy, max_batch=1, max_wait=0)
    batcher.start()
    toy.go_on.clear()

    async def stop_meanwhile():
        asked = [asyncio.ensure_future(batcher.answer(Question(PICTURE, str(k)))) for k in range(3)]
        while not toy.batches:
            await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(asyncio.to_thread(batcher.stop))
        await asyncio.sleep(0.05)
        toy.go_on.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        await stopping
        return found

    found = asyncio.run(stop_meanwhile())
    assert len(found) == 3 and all(isinstance(one, (tuple, Overloaded)) for one in found)
    assert not batcher.alive
    with pytest.raises(Overloaded):
        batcher.admit()


@pytest.mark.parametrize("limits", [{"max_batch": 0}, {"max_waiting": 0}, {"max_wait": -1}])
def test_limits_that_cannot_be(limits):
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(Toy(), **limits)
