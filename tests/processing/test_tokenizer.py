"""The word-level tokenizer: fixed ids, Qwen's chat layout, exact phrases, and a round trip over the disk."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instructsam.processing.tokenizer import (
    ADDED_TOKENS,
    BASE_WORDS,
    QWEN_TOKENS,
    UNK_TOKEN,
    build_word_tokenizer,
    save_word_tokenizer,
    split_words,
)

WORDS = ["red", "circles", "the", "squares", "odd", "one", "out"]
TOKENIZER = build_word_tokenizer(WORDS)
CHAT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>the red circles?<|im_end|>\n"
    "<|im_start|>assistant\n<|object_ref_start|>red circles<|object_ref_end|><|mask_start|>[SEG][SEG]<|mask_end|>, "
    "<|object_ref_start|>squares<|object_ref_end|><|mask_start|>[SEG][SEG]<|mask_end|><|im_end|>\n"
)


def test_ids_follow_the_documented_order():
    known = [*QWEN_TOKENS, *ADDED_TOKENS, UNK_TOKEN, *BASE_WORDS, *sorted(WORDS)]
    assert TOKENIZER.convert_tokens_to_ids(known) == list(range(len(known)))
    assert len(TOKENIZER) == len(known)
    assert ADDED_TOKENS == ("<REGION>", "[SEG]", "<|mask_start|>", "<|mask_end|>")
    assert TOKENIZER.pad_token == "<|endoftext|>" and TOKENIZER.eos_token == "<|im_end|>"


def test_order_and_repetition_of_words_do_not_matter():
    again = build_word_tokenizer([*reversed(WORDS), "red", ",", "user"])
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_chat_layout_is_split_as_written():
    pieces = TOKENIZER.tokenize(CHAT)
    assert pieces[:12] == [
        "<|im_start|>", "user", "\n", "<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>",
        "the", "red", "circles", "?", "<|im_end|>",
    ]  # fmt: skip
    assert pieces[12:16] == ["\n", "<|im_start|>", "assistant", "\n"]
    assert pieces.count("[SEG]") == 4 and pieces.count(",") == 1 and UNK_TOKEN not in pieces


def test_nothing_is_added_around_a_text():
    assert TOKENIZER("red circles").input_ids == TOKENIZER.convert_tokens_to_ids(["red", "circles"])
    assert TOKENIZER("").input_ids == []


def test_upper_case_words_are_known_and_special_tokens_keep_their_case():
    assert TOKENIZER.tokenize("The RED\ncircles") == ["the", "red", "\n", "circles"]
    assert TOKENIZER.tokenize("[SEG]<REGION>") == ["[SEG]", "<REGION>"]


def test_unknown_words_become_unk():
    assert TOKENIZER.tokenize("the blue circles") == ["the", UNK_TOKEN, "circles"]
    assert TOKENIZER.unk_token_id == len(QWEN_TOKENS) + len(ADDED_TOKENS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join))
def test_phrases_decode_to_themselves(phrase):
    ids = TOKENIZER.encode(phrase)
    assert len(ids) == len(phrase.split())
    assert TOKENIZER.decode(ids) == phrase


def test_punctuation_is_closed_up_in_decoded_text():
    assert TOKENIZER.decode(TOKENIZER.encode("the odd one out, red circles?")) == "the odd one out, red circles?"


def test_special_tokens_can_be_left_out_of_decoded_text():
    answer = "<|object_ref_start|>red circles<|object_ref_end|><|mask_start|>[SEG][SEG]<|mask_end|><|im_end|>"
    assert TOKENIZER.decode(TOKENIZER.encode(answer), skip_special_tokens=True) == "red circles"


def test_saved_tokenizer_reads_back_the_same(tmp_path):
    save_word_tokenizer(WORDS, tmp_path / "tokenizer")
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again(CHAT).input_ids == TOKENIZER(CHAT).input_ids
    assert again.decode(again.encode("red circles")) == "red circles"
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(again, name) == getattr(TOKENIZER, name)
    assert set(again.all_special_tokens) == set(TOKENIZER.all_special_tokens) >= {"[SEG]", "<|object_ref_end|>"}


def test_padding_uses_the_pad_token():
    batch = TOKENIZER(["red", "the red circles"], padding=True)
    assert sorted(batch.input_ids[0]) == sorted([TOKENIZER.pad_token_id] * 2 + TOKENIZER.encode("red"))
    assert [sum(mask) for mask in batch.attention_mask] == [1, 3]


@pytest.mark.parametrize("word", ["two words", "Red", "a-b", ""])
def test_entries_that_are_not_one_token_are_refused(word):
    with pytest.raises(ValueError, match="not a single lower-case word"):
        build_word_tokenizer([word])


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab ?,.\n!", max_size=30))
def test_words_are_split_as_the_tokenizer_does(text):
    tokenizer = build_word_tokenizer(split_words(text))
    assert tokenizer.tokenize(text) == split_words(text)
