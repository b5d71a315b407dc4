"""The special tokens of the chat layout: which there are, which of them are added, and their ids (DESIGN section 4).

Qwen3-VL's tokenizer has 151,669 tokens, its embedding table 151,936 rows. The four tokens of this model take the first
of the spare rows, so that no table is ever resized.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken

QWEN_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<REGION>": 151669,
    "[SEG]": 151670,
    "<|mask_start|>": 151671,
    "<|mask_end|>": 151672,
}
"""Ids in Qwen3-VL's vocabulary of all tokens that the chat layout uses."""
ADDED_TOKENS = ("<REGION>", "[SEG]", "<|mask_start|>", "<|mask_end|>")
"""Special tokens that this model adds, in the order of their ids."""
QWEN_TOKENS = tuple(token for token in QWEN_IDS if token not in ADDED_TOKENS)
"""Special tokens that Qwen3-VL's tokenizer has already."""
QWEN_LENGTH = 151669
"""Length of Qwen3-VL's tokenizer without ours."""
SPECIAL_TOKENS = {
    "ref_start": "<|object_ref_start|>",
    "ref_end": "<|object_ref_end|>",
    "region": "<REGION>",
    "seg": "[SEG]",
    "mask_start": "<|mask_start|>",
    "mask_end": "<|mask_end|>",
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
}
"""Names (those of the configuration's ``token_ids``) of the tokens that the model itself must know."""


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token, None where the tokenizer has none."""
    found = tokenizer.convert_tokens_to_ids(token)
    unknown = found == tokenizer.unk_token_id and token != tokenizer.unk_token
    return None if found is None or unknown else int(found)


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """Name → id of `SPECIAL_TOKENS`.

    Raises:
        ValueError: the tokenizer lacks one of them, or one that the chat layout needs besides (names it).
    """
    ids = {token: token_id(tokenizer, token) for token in QWEN_IDS}
    lacking = [token for token, found in ids.items() if found is None]
    if lacking:
        raise ValueError(f"the tokenizer has no token {', '.join(map(repr, lacking))}")
    return {name: ids[token] for name, token in SPECIAL_TOKENS.items()}  # type: ignore[misc]


def add_special_tokens(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """Give a Qwen tokenizer the `ADDED_TOKENS` that it lacks, in place; those that it has stay as they are.

    Args:
        tokenizer: transformers tokenizer with Qwen's special tokens.
        vocab_size: rows of the embedding table; tokens beyond it have no embedding, and it is not enlarged.

    Returns:
        Name → id as in the configuration's ``token_ids``.

    Raises:
        ValueError: one of Qwen's own tokens is missing, the ids have gaps, an id falls outside of the table, or the
            vocabulary is Qwen's and a token is not at its id there. The tokenizer is then unchanged.
    """
    ids = {token: token_id(tokenizer, token) for token in QWEN_TOKENS}
    lacking = [token for token, found in ids.items() if found is None]
    if lacking:
        raise ValueError(f"not a Qwen tokenizer: it has no token {', '.join(map(repr, lacking))}")
    present = {token: token_id(tokenizer, token) for token in ADDED_TOKENS}
    missing = [token for token, found in present.items() if found is None]
    vocabulary = tokenizer.get_vocab()
    first_free = max(vocabulary.values()) + 1
    if missing and first_free != len(vocabulary):
        raise ValueError(f"the tokenizer has {len(vocabulary)} tokens but ids up to {first_free - 1}: no gaps, please")
    ids.update(present)
    ids.update({token: first_free + k for k, token in enumerate(missing)})

    # Qwen's vocabulary shows by its length or by its first special token, in case other tokens were added to it.
    own = len(vocabulary) - (len(ADDED_TOKENS) - len(missing))
    if own == QWEN_LENGTH or ids["<|endoftext|>"] == QWEN_IDS["<|endoftext|>"]:
        for token, wanted in QWEN_IDS.items():
            if ids[token] != wanted:
                raise ValueError(
                    f"token {token!r} gets id {ids[token]} in this tokenizer of {len(vocabulary)} tokens, but its id "
                    f"in the vocabulary of Qwen3-VL is {wanted}: take the tokenizer of Qwen3-VL as it is"
                )
    largest = max([first_free - 1, *(found for found in ids.values() if found is not None)])
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer with {', '.join(ADDED_TOKENS)} needs ids up to {largest}, the embedding table has "
            f"{vocab_size} rows: the tokenizer belongs to another model"
        )
    if missing:
        tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    for token, expected in ids.items():
        found = token_id(tokenizer, token)
        assert found == expected, f"{token!r} has id {found} after adding, not {expected}"
    return special_token_ids(tokenizer)
