"""Chat layout, targets and post-processing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.masks import decode, encode
from instructsam.processing.chat import IGNORED, ChatLayout
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn

N = 3


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(str(world / "tokenizer"))


@pytest.fixture(scope="module")
def processor(tokenizer):
    image = {"patch_size": 8, "min_pixels": 4096, "max_pixels": 65536}
    return InstructSAMProcessor(tokenizer, N, (24, 24), image, 96, max_length=200)


def test_layout_is_the_text_of_the_design(tokenizer):
    chat = ChatLayout(tokenizer, N)
    encoded = chat.encode(2, [("the red circles and stars", ["red circles", "stars"]), ("all squares", ["squares"])])
    block = "<|mask_start|>" + "[SEG]" * N + "<|mask_end|>"
    text = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>the red circles and stars"
        "<|im_end|>\n"
        f"<|im_start|>assistant\n<|object_ref_start|>red circles<|object_ref_end|>{block}, "
        f"<|object_ref_start|>stars<|object_ref_end|>{block}<|im_end|>\n"
        "<|im_start|>user\nall squares<|im_end|>\n<|im_start|>assistant\n"
        f"<|object_ref_start|>squares<|object_ref_end|>{block}<|im_end|>\n"
    )
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[trained], encoded.input_ids[trained])
    answer = tokenizer.decode(encoded.labels[trained])
    assert answer.count("<|im_end|>") == 2
    assert "user" not in answer and "image_pad" not in answer


def test_independent_turns_look_like_first_turns(tokenizer):
    chat = ChatLayout(tokenizer, N)
    turns = [("all stars", ["stars"]), ("all squares", ["squares"])]
    packed = chat.encode(2, turns, independent_turns=True)
    prefix = packed.input_ids[packed.turn_ids == 0]
    for k, turn in enumerate(turns):
        single = chat.encode(2, [turn])
        assert torch.equal(torch.cat([prefix, packed.input_ids[packed.turn_ids == k + 1]]), single.input_ids)


def test_answers_are_read_back(tokenizer):
    chat = ChatLayout(tokenizer, N)
    ids = [*chat.answer(["red circles", "large stars"]), chat.token_ids["eos"]]
    assert chat.phrases_of(ids) == ["red circles", "large stars"]
    assert "[SEG]" not in chat.answer_text(ids)
    assert chat.phrases_of([chat.token_ids["ref_end"], 20, chat.token_ids["ref_start"], 21]) == []


@pytest.mark.parametrize("text", ["", "   ", "stars [SEG]", "<|im_end|> stars"])
def test_bad_text(tokenizer, text):
    chat = ChatLayout(tokenizer, N)
    with pytest.raises(ValueError, match=r"empty|reserved token"):
        chat.encode(1, [(text, ["stars"])])


def test_tokenizer_without_our_tokens():
    from instructsam.processing.tokenizer import build_word_tokenizer

    plain = build_word_tokenizer(["red"])

    class Lacking:
        unk_token_id, unk_token, all_special_tokens = plain.unk_token_id, plain.unk_token, plain.all_special_tokens

        def convert_tokens_to_ids(self, token):
            return None if token == "[SEG]" else plain.convert_tokens_to_ids(token)

    with pytest.raises(ValueError, match=r"no token '\[SEG\]'"):
        ChatLayout(Lacking(), N)


def test_too_long_and_too_many(processor, world):
    sample = read_coco_instructions(world, "train")[0]
    full = encode(np.ones((96, 96), dtype=bool))
    many = Turn("all shapes", (PhraseTarget("shapes", (full,) * (N + 1)),))
    with pytest.raises(ValueError, match=f"has {N + 1} instances, more than the {N} queries"):
        processor.encode_sample(Sample("x", sample.image, 96, 96, (many,)))
    long = Turn("all shapes", tuple(PhraseTarget("shapes", ()) for _ in range(40)))
    with pytest.raises(ValueError, match="sample x: .* do not fit max_length=200"):
        processor.encode_sample(Sample("x", sample.image, 96, 96, (long,)))


def test_batches(processor, world):
    samples = read_coco_instructions(world, "train")
    keep = [t for s in samples[:3] for t in s.turns if all(len(p.rles) <= N for p in t.phrases)]
    items = [processor.encode_sample(Sample(f"s{k}", samples[k].image, 96, 96, (t,))) for k, t in enumerate(keep[:3])]
    batch = processor.collate(items)
    phrases = sum(len(t.phrases) for t in keep[:3])
    assert batch["target_masks"].shape[0] == phrases
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    counts = [len(p.rles) for t in keep[:3] for p in t.phrases]
    assert batch["target_valid"].sum(-1).tolist() == counts
    assert not batch["target_masks"][~batch["target_valid"]].any()
    assert batch["sample_ids"] == ["s0", "s1", "s2"]


@given(seed=st.integers(0, 1000), height=st.integers(20, 70), width=st.integers(20, 70))
@settings(deadline=None, max_examples=20)
def test_post_processing(processor, seed, height, width):
    """Kept are scores above the threshold; masks are upsampled logits above 0; order is phrase, then score."""
    torch.manual_seed(seed)
    logits, scores, boxes = torch.randn(2, N, 8, 8), torch.rand(2, N), torch.rand(2, N, 4)
    found = processor.instances(logits, scores, boxes, ["a", "b"], (height, width), threshold=0.5)
    assert len(found) == int((scores > 0.5).sum())
    keys = [(instance.phrase_index, -instance.score) for instance in found]
    assert keys == sorted(keys)
    for instance in found:
        p = instance.phrase_index
        n = int((scores[p] - instance.score).abs().argmin())
        whole = torch.nn.functional.interpolate(logits[p, n][None, None], size=(height, width), mode="bilinear")
        assert np.array_equal(decode(instance.rle), (whole[0, 0] > 0).numpy())
        expected = boxes[p, n] * torch.tensor([width, height, width, height])
        assert instance.box == pytest.approx(expected.tolist(), abs=1e-3)


def test_threshold_is_strict(processor):
    found = processor.instances(torch.ones(1, 1, 4, 4), torch.tensor([[0.5]]), torch.rand(1, 1, 4), ["a"], (4, 4), 0.5)
    assert found == []
