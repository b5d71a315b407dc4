"""A word-level tokenizer with Qwen's special tokens, for the tiny model (DESIGN sections 4 and 12).

It takes the place of Qwen's own tokenizer where no weights are at hand: same special tokens, same chat layout, but one
token a word. Everything is lower-cased, and a line break is a token of its own as the chat layout needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from instructsam.processing.special_tokens import ADDED_TOKENS, QWEN_TOKENS

PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
UNK_TOKEN = "<unk>"
BASE_WORDS = ("\n", ",", ".", "?", "!", ":", "user", "assistant", "system")
"""What the chat layout needs whatever the vocabulary."""

_WORD = re.compile(r"\n|\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """The words of a text as the tokenizer sees them (special tokens apart): lower case, punctuation on its own."""
    return _WORD.findall(text.lower())


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Tokenizer over ``words`` (in sorted order, after the special tokens and ``BASE_WORDS``).

    Ids: 0…8 ``QWEN_TOKENS``, 9…12 ``ADDED_TOKENS``, 13 ``<unk>``, then ``BASE_WORDS``, then the words. The same words
    give the same ids whatever their order. Raises ValueError for an entry that would not be one token.
    """
    known = [*QWEN_TOKENS, *ADDED_TOKENS, UNK_TOKEN, *BASE_WORDS]
    extra = sorted(set(words) - set(known))
    for word in extra:
        if split_words(word) != [word]:
            raise ValueError(f"vocabulary entry {word!r} is not a single lower-case word or punctuation mark")
    vocabulary = {token: i for i, token in enumerate([*known, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), behavior="isolated"),
        ]
    )
    # No continuation prefix is in use: this decoder only joins words by blanks and closes up punctuation.
    tokenizer.decoder = decoders.WordPiece(prefix="\x00", cleanup=True)
    special = [AddedToken(token, special=True, normalized=False) for token in (*QWEN_TOKENS, *ADDED_TOKENS)]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        extra_special_tokens=[token for token in (*QWEN_TOKENS, *ADDED_TOKENS) if token not in (PAD_TOKEN, EOS_TOKEN)],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def save_word_tokenizer(words: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer and write it so that ``AutoTokenizer.from_pretrained(folder)`` reads it."""
    tokenizer = build_word_tokenizer(words)
    tokenizer.save_pretrained(str(folder))
    return tokenizer
