"""Answers with text around their phrases, answers in plain words, conversations about no picture."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instructsam.errors import DataError, kind_of
from instructsam.processing.chat import CACHED_TEXT, IGNORED, ChatLayout, ChatTurn
from instructsam.processing.special_tokens import add_special_tokens
from instructsam.structures import PhraseTarget, Turn

N = 2
BLOCK = "<|mask_start|>" + "[SEG]" * N + "<|mask_end|>"
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def chat(qwen3_vl_dir):
    """With a byte-level BPE, to which every blank matters."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_dir)
    add_special_tokens(tokenizer, 384)
    return ChatLayout(tokenizer, N)


def written(turns: list[ChatTurn], image: str = IMAGE) -> str:
    """The conversation in one text."""
    text = ""
    for number, (instruction, phrases, pieces) in enumerate(turns):
        text += f"<|im_start|>user\n{'' if number else image}{instruction.strip()}<|im_end|>\n<|im_start|>assistant\n"
        text += pieces[0]
        for phrase, piece in zip(phrases, pieces[1:], strict=True):
            text += f"<|object_ref_start|>{phrase}<|object_ref_end|>{BLOCK}{piece}"
        text += "<|im_end|>\n"
    return text


def whole(chat: ChatLayout, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_around_the_phrases(chat):
    turns = [
        ChatTurn("Where?", ["red mug", "plate"], ["Sure,  ", " stands on the ", ".  "]),
        ChatTurn("a", ["b"], [""] * 2),
    ]
    encoded = chat.encode(2, turns)
    assert encoded.input_ids.tolist() == whole(chat, written(turns))
    trained = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[trained], encoded.input_ids[trained])
    first, second = chat.tokenizer.decode(encoded.labels[trained]).split("<|im_end|>")[:2]
    assert first.startswith("Sure,  <|object_ref_start|>") and first.endswith(f"{BLOCK}.  ")
    assert second == f"<|object_ref_start|>b<|object_ref_end|>{BLOCK}"
    assert chat.phrases_of(encoded.labels[trained].tolist()) == ["red mug", "plate", "b"]


# An answer that begins with a line break is the one exception, see the module.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<>[]|", exclude_categories=["Cs"]), max_size=12)
texts |= st.sampled_from([", ", " and ", "Sure, ", "  ", " \t", "It is the\n", "é" * (CACHED_TEXT + 1)])
words = texts.map(str.strip).filter(bool)
answers = st.lists(words, max_size=3).flatmap(
    lambda phrases: st.tuples(st.just(phrases), st.lists(texts, min_size=len(phrases) + 1, max_size=len(phrases) + 1))
)


@given(st.lists(st.tuples(words, answers), min_size=1, max_size=3), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=150)
def test_piece_by_piece_gives_the_ids_of_the_whole_text(chat, made, num_image_tokens):
    turns = [ChatTurn(words, phrases, [pieces[0].lstrip(), *pieces[1:]]) for words, (phrases, pieces) in made]
    text = written(turns, IMAGE if num_image_tokens else "")
    if all(turn.phrases or turn.pieces[0].strip() for turn in turns):
        assert chat.encode(num_image_tokens, turns).input_ids.tolist() == whole(chat, text)
    else:
        with pytest.raises(DataError, match="at least one phrase, or text"):
            chat.encode(num_image_tokens, turns)


@pytest.mark.parametrize("phrases", [["one"], ["one", "two"], ["one", "two", "three"]])
def test_without_pieces_phrases_are_joined_by_commas(chat, phrases):
    pieces = ["", *[", "] * (len(phrases) - 1), ""]
    assert chat.answer(phrases) == chat.answer(phrases, pieces) != chat.answer(phrases, ["", *[" "] * len(phrases)])
    assert chat.answer([]) == []
    plain, full = (chat.encode(2, [turn]) for turn in (("all", phrases), ChatTurn("all", phrases, pieces)))
    assert torch.equal(plain.input_ids, full.input_ids) and torch.equal(plain.labels, full.labels)


def test_plain_answer(chat):
    encoded = chat.encode(2, [ChatTurn("What is it?", [], ["It is a mug."])])
    assert chat.tokenizer.decode(encoded.labels[encoded.labels != IGNORED]) == "It is a mug.<|im_end|>"


@pytest.mark.parametrize("pieces", [(), ("",), (" \n",)])
def test_neither_phrase_nor_text(chat, pieces):
    with pytest.raises(DataError, match=r"instruction 'all': .* at least one phrase, or text") as error:
        chat.encode(2, [ChatTurn("all", [], pieces)])
    assert kind_of(error.value) == "text"


@pytest.mark.parametrize("long", ["", "x" * CACHED_TEXT])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_reserved_tokens_in_a_piece(chat, where, long):
    pieces = ["a ", " b ", " c"]
    pieces[where] += f"{long}[SEG]"
    with pytest.raises(DataError, match=r"contains the reserved token '\[SEG\]'") as error:
        chat.encode(2, [ChatTurn("all", ["d", "e"], pieces)])
    assert kind_of(error.value) == "text"


def test_conversation_about_no_picture(chat):
    turns = [ChatTurn("Hello?", [], ["Hi."]), ChatTurn("And now?", [], ["Nothing."])]
    encoded = chat.encode(None, turns)
    assert encoded.input_ids.tolist() == whole(chat, written(turns, image=""))
    packed = chat.encode(None, turns, independent_turns=True)
    prefix = packed.input_ids[packed.turn_ids == 0]
    assert chat.tokenizer.decode(prefix) == "<|im_start|>user\n"
    for k, turn in enumerate(turns):
        alone = chat.encode(None, [turn])
        assert torch.equal(torch.cat([prefix, packed.input_ids[packed.turn_ids == k + 1]]), alone.input_ids)


def test_turn_of_a_sample():
    turn = Turn("Where?", (PhraseTarget("mug"),), kind="phrase", answer=("The ", "."))
    assert ChatTurn.of(turn) == ("Where?", ["mug"], ("The ", "."))


def test_a_pickled_layout_encodes_as_before(chat):
    turns = [ChatTurn("Where?", ["red mug"], ["Sure, ", "."])]
    expected = chat.encode(2, turns)  # with filled caches
    copy = pickle.loads(pickle.dumps(chat))
    for _ in range(2):
        assert torch.equal(copy.encode(2, turns).input_ids, expected.input_ids)
    with pytest.raises(DataError, match="reserved token"):
        copy.encode(2, [ChatTurn("a [SEG]", ["b"])])
