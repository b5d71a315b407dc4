"""What a user holds: one or many, pictures that are known, conversations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from double_precision import CLOSE, float64
from PIL import Image

import instructsam
from instructsam import InstructSAM, Result
from instructsam import predictor as predictor_module
from instructsam.data.tiny_world import make_example
from instructsam.inference import cache as cache_module
from instructsam.inference import model as model_module
from instructsam.inference.cache import ImageCache, picture_key
from instructsam.inference.inputs import read_picture
from instructsam.models.decoding import decode
from instructsam.processing.chat import ChatTurn

WORDS = ["red circles", "large blue squares"]


@pytest.fixture(scope="module")
def images(world) -> list[Path]:
    return sorted((world / "val" / "images").glob("*.png"))[:3]


@pytest.fixture
def model(checkpoint) -> InstructSAM:
    return InstructSAM.from_pretrained(checkpoint, device="cpu", max_new_tokens=6)


@pytest.fixture
def exact(checkpoint):
    """The same in float64."""
    with float64():
        yield InstructSAM.from_pretrained(checkpoint, device="cpu", max_new_tokens=6)


def scores_of(result: Result) -> list[float]:
    return [instance.score for instance in result]  # `scores` is float32


def same(one: Result, other: Result) -> None:
    """The same answer, worked out in float64 in two ways."""
    assert (one.answer, one.phrases, one.name, one.instruction) == (
        other.answer,
        other.phrases,
        other.name,
        other.instruction,
    )
    assert len(one) == len(other) > 0
    assert scores_of(one) == pytest.approx(scores_of(other), rel=CLOSE)
    np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-6, atol=1e-6)  # they are float32
    assert (one.masks == other.masks).all()


def test_a_list_equals_one_by_one(exact, images):
    """Of an untrained model with phrases given: every query is an instance."""
    found = exact.segment(images, phrases=WORDS, threshold=0.0, batch_size=2)
    assert [len(result) for result in found] == [2 * exact.predictor.model.config.num_queries] * 3
    for result, image in zip(found, images, strict=True):
        same(result, InstructSAM(exact.predictor, 0).segment(image, phrases=WORDS, threshold=0.0))


@pytest.mark.slow
@float64()
def test_the_shipped_model_answers_a_list_as_one_by_one():
    """With written answers of different length, and pictures of different size."""
    model, asked = InstructSAM.from_pretrained("tiny", device="cpu"), []
    for index in range(6):
        scene, instructions = make_example(5, "val", index, image_size=96 + 16 * index)
        asked += [(scene.image, one) for one in instructions]
    together = model.segment([image for image, _ in asked], [one.text for _, one in asked], batch_size=7)
    found = 0
    for k, (result, (image, instruction)) in enumerate(zip(together, asked, strict=True)):
        alone = InstructSAM(model.predictor, 0).segment(image, instruction.text)
        assert result.answer == alone.answer and len(result) == len(alone), (k, instruction.text)
        assert scores_of(result) == pytest.approx(scores_of(alone), rel=CLOSE)
        assert (result.masks == alone.masks).all()
        found += len(alone)
    assert found > 30


def test_what_comes_back(model, images):
    assert isinstance(model.segment(images[0], "stars"), Result)
    for image, instruction in ((images, "stars"), (images[0], ["a", "b"]), ([images[0]], "a"), ([images[0]], ["a"])):
        found = model.segment(image, instruction)
        assert isinstance(found, list) and all(isinstance(result, Result) for result in found)
    assert [result.instruction for result in model.segment(images[0], ["the stars", "circles"])] == [
        "the stars",
        "circles",
    ]
    assert [result.name for result in model.segment(images, "stars")] == [image.name for image in images]
    several = model.segment(images[0], phrases=[["stars"], ["circles", "squares"]], threshold=0.0)
    assert [result.phrases for result in several] == [("stars",), ("circles", "squares")]
    assert model.segment(np.asarray(Image.open(images[0])), phrases="stars").name == "image_0"


def test_the_selection_is_passed_on(model, images):
    everything = model.segment(images[0], phrases=WORDS, threshold=0.0)
    middle = float(np.median(everything.scores))
    some = model.segment(images[0], phrases=WORDS, threshold=middle, top_k=3, nms_iou=0.99)
    assert list(some.scores) == list(everything.where(middle, 3, 0.99).scores) and 0 < len(some) <= 3


def test_a_known_picture_is_not_encoded_again(exact, images, monkeypatch):
    encoded: list[int] = []
    encode = exact.predictor.encode_images
    monkeypatch.setattr(exact.predictor, "encode_images", lambda some: encoded.append(len(some)) or encode(some))
    first = exact.segment(images[0], phrases=WORDS, threshold=0.0)
    again = exact.segment(images[0], phrases=WORDS, threshold=0.0)
    assert encoded == [1] and (first.prediction.meta["cached"], again.prediction.meta["cached"]) == (False, True)
    same(first, again)
    mixed = exact.segment([images[1], images[0], images[1]], phrases=WORDS, threshold=0.0)
    assert encoded == [1, 1] and [result.prediction.meta["cached"] for result in mixed] == [False, True, False]
    same(mixed[1], first)
    same(mixed[0], mixed[2])
    assert exact.cache.hits == 2 and exact.cache.misses == 2
    exact.segment(images[0], ["a", "b", "c"])
    assert encoded == [1, 1]


def test_a_picture_of_several_batches_is_read_once(model, images, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(model_module, "read_picture", lambda source: read.append(source) or read_picture(source))
    assert len(model.segment(images[0], phrases=[["a"], ["b"], ["c"]], batch_size=1)) == 3
    assert read == [images[0]]
    model.segment([images[0], images[1]], phrases=WORDS, batch_size=1)
    assert read == [images[0], images[0], images[1]]


def test_the_oldest_picture_is_forgotten(checkpoint, images):
    model = InstructSAM.from_pretrained(checkpoint, device="cpu", cached_images=2)

    def known(*places: int) -> list[bool]:
        found = model.segment([images[k] for k in places], phrases=WORDS)
        return [result.prediction.meta["cached"] for result in found]

    assert known(0, 1) == [False, False] and known(0) == [True]
    assert known(2) == [False] and known(0, 1) == [True, False]
    assert len(model.cache) == 2
    model.cache.clear()
    assert len(model.cache) == 0 and known(0) == [False]
    with pytest.raises(ValueError, match="cached_images=-1"):
        ImageCache(-1)


def test_one_object_is_hashed_once(model, images, monkeypatch):
    hashed: list[Image.Image] = []
    monkeypatch.setattr(cache_module, "picture_key", lambda image: hashed.append(image) or picture_key(image))
    model.segment(images[0], phrases=[["a"], ["b"], ["c"]])
    assert len(hashed) == 1


def test_pictures_that_are_known_do_not_hold_the_others(checkpoint, images):
    """What is kept of a batch lies in memory of its own, and no more of it than may be kept."""
    model = InstructSAM.from_pretrained(checkpoint, device="cpu", cached_images=2)
    model.segment(images, phrases=WORDS)
    assert len(model.cache) == 2
    for kept in model.cache._known.values():
        tensors = [*kept.vision.tokens, *kept.vision.deepstack[0], kept.grid_thw, *kept.detector.maps]
        for tensor in [*tensors, kept.detector.position]:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_pictures_are_told_apart_by_their_pixels():
    one = Image.new("RGB", (4, 6))
    other = one.copy()
    other.putpixel((0, 0), (0, 0, 1))
    keys = {picture_key(image) for image in (one, other, Image.new("RGB", (6, 4)), Image.new("L", (12, 6)))}
    assert len(keys) == 4 and picture_key(one.copy()) in keys


def test_a_conversation_is_what_one_forward_says(exact, images):
    """The second answer of a session is the one of a chat of two turns in which both answers are given."""
    session = exact.session(images[0], context=True)
    session.segment("the stars", phrases=["stars"], threshold=0.0)
    found = session.segment("and the circles", phrases=["circles", "squares"], threshold=0.0)
    predictor = exact.predictor
    turns = [ChatTurn("the stars", ["stars"]), ChatTurn("and the circles", ["circles", "squares"])]
    item = predictor.processor.encode_image(images[0])
    chat = predictor.processor.encode_chat(item["image_grid_thw"], turns)
    batch = predictor.processor.collate([{**item, "input_ids": chat.input_ids}])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
    with torch.no_grad():
        output = predictor.model(**{name: batch[name] for name in names}).detections
    scores = output.pred_logits[1:].sigmoid().sort(dim=-1, descending=True).values.flatten()
    assert scores_of(found) == pytest.approx(scores.tolist(), rel=CLOSE)
    assert found.phrases == ("circles", "squares") and len(session.results) == 2
    alone = exact.segment(images[0], "and the circles", phrases=["circles", "squares"], threshold=0.0)
    assert scores_of(alone) != pytest.approx(scores_of(found), rel=1e-6)
    session.reset()
    same(session.segment("and the circles", phrases=["circles", "squares"], threshold=0.0), alone)


def test_a_conversation_without_context(exact, images):
    session = exact.session(images[0], context=False)
    session.segment("the stars", phrases=["stars"])
    found = session.segment("the circles", phrases=["circles"], threshold=0.0)
    same(found, exact.segment(images[0], "the circles", phrases=["circles"], threshold=0.0))


@pytest.mark.parametrize("independent", [True, False])
def test_conversations_are_as_the_model_was_trained(model, images, independent):
    model.predictor.model.config.independent_turns = independent
    session = model.session(images[0])
    assert session.context is not independent
    session.segment("the stars", phrases=["stars"])
    assert len(session._turns) == (0 if independent else 1)


def test_a_conversation_that_becomes_too_long(model, images):
    session = model.session(images[0], context=True)
    session.segment("x", phrases=["stars"] * 10)
    model.predictor.processor.max_length = 150
    with pytest.raises(ValueError, match=r"after 1 turns \(reset\(\) starts afresh\): .* do not fit max_length=150"):
        session.segment("x", phrases=["stars"] * 10)
    session.reset()
    session.segment("x", phrases=["stars"])


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ("<|object_ref_start|>red circle", []),
        ("ok<|object_ref_end|>", []),
        ("<|object_ref_start|> <|object_ref_end|>", [""]),
    ],
)
def test_an_answer_that_cannot_be_said_again_is_not_remembered(model, images, answer, phrases):
    """Or no later question of the conversation could be asked."""
    session = model.session(images[0], context=True)
    session.segment("the stars", phrases=["stars"])
    session._remember("x", answer, phrases)
    assert len(session._turns) == 1
    session.segment("and the circles", phrases=["circles"])


def test_an_answer_that_was_cut_off_is_not_remembered(model, images, monkeypatch):
    """The same words without and with room for the end of turn."""
    chat, asked, answer = model.predictor.processor.chat, [], model.answer
    eos, appended = chat.token_ids["eos"], {chat.token_ids[name] for name in ("mask_start", "seg", "mask_end")}
    words = [token for token in chat.answer(["stars"]) if token not in appended]

    def choose(step, logits):
        return torch.full((len(logits),), words[step] if step < len(words) else eos)

    def listened(pictures, conversations, *options):
        asked.append([turn.instruction for turn in conversations[0]])
        return answer(pictures, conversations, *options)

    monkeypatch.setattr(predictor_module, "decode", partial(decode, choose=choose))
    monkeypatch.setattr(model, "answer", listened)
    session = model.session(images[0], context=True)
    for number, room in enumerate((0, 1, 0, 1)):
        found = session.segment(f"question {number}", max_new_tokens=len(words) + room)
        assert found.phrases == ("stars",) and found.finished == bool(room)
    assert asked == [
        ["question 0"],
        ["question 1"],
        ["question 1", "question 2"],
        ["question 1", "question 3"],
    ]


def test_text_around_phrases_is_remembered(model, images):
    session = model.session(images[0], context=True)
    mark = "<|object_ref_start|>{}<|object_ref_end|>"
    session._remember("x", f"There are {mark.format(' stars ')} and {mark.format('dots')}.", ["stars", "dots"])
    session._remember("y", "Nothing of that kind.", [])
    session._remember("z", "", [])
    assert [list(turn.pieces) for turn in session._turns] == [["There are ", " and ", "."], ["Nothing of that kind."]]
    session.segment("and now", phrases=["circles"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": []}, "no picture is given"),
        ({"image": ["nowhere.png"]}, "nowhere.png: no such image file"),
        ({"image": [0, "nowhere.png"]}, "picture 1: nowhere.png: no such image file"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"instruction": None}, "nothing is asked"),
        ({"instruction": "a <|im_end|> b"}, "reserved token"),
        ({"instruction": "a \ud800 b"}, "the instruction holds half a character"),
        ({"instruction": None, "phrases": ["a \ud800"]}, "phrases must be a list of words"),
        ({"instruction": ["a", "a <|im_end|> b"]}, "question 1: text .* reserved token"),
        ({"instruction": None, "phrases": ["x"] * 11}, "11 phrases, more than max_phrases=10"),
        ({"instruction": None, "phrases": [["x"], ["x"] * 11]}, "question 1: 11 phrases, more than max_phrases=10"),
        ({"image": [0, Image.new("RGB", (2, 500))]}, "picture 1: a picture of 500x2 pixels is thinner than 1:200"),
        ({"threshold": 2}, "threshold=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"image": [0, 0], "instruction": ["a", "b", "c"]}, "3 instructions for 2 pictures"),
    ],
)
def test_what_cannot_be(model, images, given, message):
    given = {"image": 0, "instruction": "stars", **given}
    pictures = given.pop("image")
    pictures = [images[0] if one == 0 else one for one in pictures] if isinstance(pictures, list) else images[pictures]
    with pytest.raises(ValueError, match=message):
        model.segment(pictures, **given)


@pytest.mark.parametrize("instruction", [["stars", "stars", "[SEG]"], ["stars"] * 3])
def test_what_can_be_found_early_is_found_before_anything_runs(model, images, instruction, monkeypatch):
    """An error at the end of a long list would lose all answers before it."""
    monkeypatch.setattr(model.predictor, "encode_images", lambda some: pytest.fail("pictures were encoded"))
    with pytest.raises(ValueError, match=r"question 2: .*reserved token|picture 2: gone.png: no such image file"):
        model.segment([images[0], images[1], "gone.png"], instruction, batch_size=1)


def test_each_row_has_a_threshold_of_its_own(model, images):
    pictures, turns = [read_picture(path) for path in images[:2]], [ChatTurn("x", WORDS)]
    everything = model.answer(pictures, [turns, turns], 0.0)
    middle = float(np.median([instance.score for instance in everything[1].instances]))
    found = model.answer(pictures, [turns, turns], [0.0, middle])
    assert len(found[0].instances) == len(everything[0].instances)
    assert len(found[1].instances) == sum(one.score > middle for one in everything[1].instances) > 0


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        instructsam.Model  # noqa: B018
    with pytest.raises(ImportError):
        from instructsam import Model  # noqa: F401
