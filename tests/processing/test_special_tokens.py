"""The four tokens that are added to Qwen's tokenizer, and their ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_fixtures import QWEN_HUB_TOKENS, qwen_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from instructsam.models.configuration import QWEN_TOKEN_IDS
from instructsam.processing.chat import ChatLayout
from instructsam.processing.special_tokens import (
    ADDED_TOKENS,
    QWEN_IDS,
    QWEN_LENGTH,
    QWEN_TOKENS,
    SPECIAL_TOKENS,
    add_special_tokens,
    special_token_ids,
)
from instructsam.processing.tokenizer import build_word_tokenizer

LENGTH = 320 + len(QWEN_HUB_TOKENS)


@pytest.fixture(scope="module")
def full_size_vocabulary() -> dict[str, int]:
    return {f"w{k}": k for k in range(151643)}


def full_size_tokenizer(vocabulary: dict[str, int], extra: tuple[str, ...] = QWEN_HUB_TOKENS):
    """A word-level tokenizer of Qwen's length with its special tokens at their ids."""
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def test_the_lists_agree():
    assert ADDED_TOKENS == ("<REGION>", "[SEG]", "<|mask_start|>", "<|mask_end|>")
    assert set(QWEN_TOKENS) < set(QWEN_HUB_TOKENS)
    assert {token: QWEN_IDS[token] for token in QWEN_TOKENS} == {
        token: 151643 + QWEN_HUB_TOKENS.index(token) for token in QWEN_TOKENS
    }
    assert [QWEN_IDS[token] for token in ADDED_TOKENS] == [151669, 151670, 151671, 151672]
    assert {name: QWEN_IDS[token] for name, token in SPECIAL_TOKENS.items()} == QWEN_TOKEN_IDS


def test_missing_tokens_are_added_in_order_and_survive_the_disk(tmp_path: Path, qwen3_vl_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_dir)
    text = "the red circles <think>"
    before = tokenizer(text).input_ids
    ids = add_special_tokens(tokenizer, vocab_size=384)
    assert ids == {
        "ref_start": 323, "ref_end": 324, "region": LENGTH, "seg": LENGTH + 1, "mask_start": LENGTH + 2,
        "mask_end": LENGTH + 3, "eos": 322, "pad": 320,
    }  # fmt: skip
    assert len(tokenizer) == LENGTH + 4 and tokenizer(text).input_ids == before
    assert tokenizer("<|mask_start|>[SEG][SEG]<|mask_end|>").input_ids == [348, 347, 347, 349]
    assert add_special_tokens(tokenizer, vocab_size=384) == ids and len(tokenizer) == LENGTH + 4
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert special_token_ids(again) == ids
    assert set(again.all_special_tokens) == {*QWEN_HUB_TOKENS[:14], *ADDED_TOKENS}
    assert again("a[SEG]b").input_ids == tokenizer("a[SEG]b").input_ids


def test_present_tokens_stay():
    tokenizer = build_word_tokenizer(["red"])
    ids = special_token_ids(tokenizer)
    assert add_special_tokens(tokenizer, vocab_size=len(tokenizer)) == ids
    half = qwen_tokenizer()
    half.add_special_tokens({"extra_special_tokens": ["<|mask_end|>"]}, replace_extra_special_tokens=False)
    found = add_special_tokens(half, 384)
    assert (found["mask_end"], found["region"], found["seg"]) == (LENGTH, LENGTH + 1, LENGTH + 2)


def test_table_too_small_leaves_the_tokenizer_alone():
    tokenizer = qwen_tokenizer()
    with pytest.raises(ValueError, match=rf"ids up to {LENGTH + 3}, the embedding table has {LENGTH + 3} rows"):
        add_special_tokens(tokenizer, LENGTH + 3)
    assert len(tokenizer) == LENGTH
    assert add_special_tokens(tokenizer, LENGTH + 4)["mask_end"] == LENGTH + 3
    with pytest.raises(ValueError, match="another model"):  # present, but beyond the table
        add_special_tokens(tokenizer, LENGTH)


def test_not_a_qwen_tokenizer():
    backend = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}))
    with pytest.raises(ValueError, match=r"no token '<\|im_start\|>', '<\|im_end\|>'"):
        add_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), 100)


def test_gaps_are_refused():
    vocabulary = {**{f"w{k}": k for k in range(5)}, "far": 40}
    tokenizer = full_size_tokenizer(vocabulary, tuple(QWEN_TOKENS))
    with pytest.raises(ValueError, match="gaps"):
        add_special_tokens(tokenizer, 1000)


def test_unknown_token_that_is_a_real_one():
    """Some files name <|endoftext|> as unknown token: it is there nevertheless."""
    tokenizer = qwen_tokenizer()
    tokenizer.unk_token = "<|endoftext|>"
    assert add_special_tokens(tokenizer, 384)["pad"] == 320
    with pytest.raises(ValueError, match="reserved"):
        ChatLayout(tokenizer, 2).question("stars <|endoftext|>")


class TestFullSize:
    def test_ids_are_those_of_the_release(self, full_size_vocabulary):
        tokenizer = full_size_tokenizer(full_size_vocabulary)
        assert len(tokenizer) == QWEN_LENGTH
        assert add_special_tokens(tokenizer, 151936) == QWEN_TOKEN_IDS
        assert tokenizer.convert_tokens_to_ids(list(QWEN_IDS)) == list(QWEN_IDS.values())

    def test_other_order(self, full_size_vocabulary):
        tokenizer = full_size_tokenizer(full_size_vocabulary, (*QWEN_HUB_TOKENS, "[SEG]"))
        with pytest.raises(ValueError, match=r"'<REGION>' gets id 151670 .* is 151669"):
            add_special_tokens(tokenizer, 151936)
        assert len(tokenizer) == QWEN_LENGTH + 1

    def test_foreign_token_in_front(self, full_size_vocabulary):
        tokenizer = full_size_tokenizer(full_size_vocabulary, (*QWEN_HUB_TOKENS, "<foo>"))
        with pytest.raises(ValueError, match=r"'<REGION>' gets id 151670 in this tokenizer of 151670 tokens"):
            add_special_tokens(tokenizer, 151936)

    def test_older_qwen_with_fewer_tokens(self, full_size_vocabulary):
        tokenizer = full_size_tokenizer(full_size_vocabulary, QWEN_HUB_TOKENS[:22])
        with pytest.raises(ValueError, match=r"'<REGION>' gets id 151665 .* is 151669"):
            add_special_tokens(tokenizer, 151936)

    def test_right_length_but_other_ids(self, full_size_vocabulary):
        order = (QWEN_HUB_TOKENS[1], QWEN_HUB_TOKENS[0], *QWEN_HUB_TOKENS[2:])
        with pytest.raises(ValueError, match=r"'<\|endoftext\|>' gets id 151644 .* is 151643"):
            add_special_tokens(full_size_tokenizer(full_size_vocabulary, order), 151936)


def test_chat_layout_with_a_byte_level_bpe(qwen3_vl_dir: Path):
    """Tokenising piece by piece gives the ids of the whole text, and phrases are read back exactly."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_dir)
    add_special_tokens(tokenizer, 384)
    chat = ChatLayout(tokenizer, 2)
    turns = [("Which are the red circles, or stars?", ["red circles", "Crème-brûlée no. 7"]), ("all", ["blue square"])]
    encoded = chat.encode(3, turns)
    block = "<|mask_start|>[SEG][SEG]<|mask_end|>"
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "Which are the red circles, or stars?<|im_end|>\n<|im_start|>assistant\n"
        f"<|object_ref_start|>red circles<|object_ref_end|>{block}, "
        f"<|object_ref_start|>Crème-brûlée no. 7<|object_ref_end|>{block}<|im_end|>\n"
        "<|im_start|>user\nall<|im_end|>\n<|im_start|>assistant\n"
        f"<|object_ref_start|>blue square<|object_ref_end|>{block}<|im_end|>\n"
    )
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert chat.phrases_of(chat.answer(turns[0][1])) == turns[0][1]
    content = [{"type": "image"}, {"type": "text", "text": turns[0][0]}]
    template = json.loads((qwen3_vl_dir / "chat_template.json").read_text())["chat_template"]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert (
        tokenizer(asked, add_special_tokens=False).input_ids == chat.encode(1, [(turns[0][0], None)]).input_ids.tolist()
    )
