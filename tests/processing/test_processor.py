"""Chat layout, targets and post-processing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.errors import DataError
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
    with pytest.raises(DataError, match=f"has {N + 1} instances, more than the {N} queries") as error:
        processor.encode_sample(Sample("x", sample.image, 96, 96, (many,)))
    assert error.value.kind == "too many instances"
    long = Turn("all shapes", tuple(PhraseTarget("shapes", ()) for _ in range(40)))
    with pytest.raises(DataError, match="sample x: .* do not fit max_length=200") as error:
        processor.encode_sample(Sample("x", sample.image, 96, 96, (long,)))
    assert error.value.kind == "too long"


def fitting(world) -> list[Sample]:
    """Samples with one turn each, of phrases with no more than N instances."""
    samples = [dataclasses.replace(s, turns=s.turns[:1]) for s in read_coco_instructions(world, "train")]
    return [s for s in samples if all(len(phrase.rles) <= N for phrase in s.turns[0].phrases)]


def talk(text: str = "hello", answer: str = "red") -> Sample:
    """A conversation about no picture."""
    return Sample("talk", None, 0, 0, (Turn(text, answer=(answer,)),))


def test_faults_of_a_record_have_their_kind(processor, world, tmp_path):
    sample = dataclasses.replace(fitting(world)[0], id="x")
    turn = sample.turns[0]
    broken, thin = tmp_path / "broken.png", tmp_path / "thin.png"
    broken.write_bytes(sample.image.read_bytes()[:100])
    Image.new("RGB", (201, 1)).save(thin)
    reworded = dataclasses.replace(turn, instruction="the [SEG] star")
    faults = {
        "image missing": dataclasses.replace(sample, image=tmp_path / "nowhere.png"),
        "image broken": dataclasses.replace(sample, image=broken),
        "image size": dataclasses.replace(sample, width=97),
        "text": dataclasses.replace(sample, turns=(turn, reworded)),
        "other": dataclasses.replace(sample, image=thin, height=1, width=201),
    }
    for kind, bad in faults.items():
        with pytest.raises(DataError, match="^sample x: ") as error:
            processor.encode_sample(bad)
        assert error.value.kind == kind
    for bad in (dataclasses.replace(turn, instruction=" "), Turn("all", (PhraseTarget(" "),)), Turn("all")):
        with pytest.raises(DataError, match="^sample x: .*(empty|at least one phrase)") as error:
            processor.encode_sample(dataclasses.replace(sample, turns=(bad,)))
        assert error.value.kind == "text"


def test_a_picture_that_is_loaded_already(processor, world, tmp_path):
    sample = fitting(world)[0]
    with Image.open(sample.image) as opened:
        mirrored = ImageOps.mirror(opened.convert("RGB"))
    mirrored.save(tmp_path / "mirrored.png")
    read = processor.encode_sample(dataclasses.replace(sample, image=tmp_path / "mirrored.png"))
    given_ = processor.encode_sample(dataclasses.replace(sample, image=tmp_path / "not opened.png"), image=mirrored)
    for name in ("pixel_values", "detector_pixel_values", "image_grid_thw", "input_ids", "labels"):
        assert torch.equal(read[name], given_[name])
    assert not torch.equal(given_["pixel_values"], processor.encode_sample(sample)["pixel_values"])
    with pytest.raises(DataError, match=r"height and width \(96, 95\)") as error:
        processor.encode_sample(sample, image=mirrored.crop((0, 0, 95, 96)))
    assert error.value.kind == "image size"


def test_answer_with_text_of_its_own(processor, world):
    sample = read_coco_instructions(world, "train")[0]
    turn = Turn("all", (PhraseTarget("stars"), PhraseTarget("red circles")), answer=("the ", " and the ", "."))
    item = processor.encode_sample(dataclasses.replace(sample, turns=(turn, Turn("red?", answer=("red.",)))))
    answer = processor.tokenizer.decode(item["labels"][item["labels"] != IGNORED]).replace("[SEG]", "")
    assert answer.split("<|im_end|>")[1].strip() == "red."
    assert len(item["targets"]) == 2 and " and the " in answer.split("<|im_end|>")[0]


@pytest.mark.parametrize("independent", [False, True])
def test_sample_without_a_picture(processor, independent):
    item = processor.encode_sample(talk(), independent)
    assert processor.tokenizer.decode(item["input_ids"]).startswith("<|im_start|>")
    assert not {"pixel_values", "detector_pixel_values", "image_grid_thw"} & set(item)
    assert processor.chat.image_token_id not in item["input_ids"] and item["targets"] == item["box_only"] == []
    asked = Sample("talk", None, 0, 0, (Turn("all stars", (PhraseTarget("stars"),)),))
    with pytest.raises(DataError, match="sample talk: phrase 'stars' needs a picture") as error:
        processor.encode_sample(asked, independent)
    assert error.value.kind == "image missing"
    with pytest.raises(DataError, match=r"sample talk: .*\(0 phrases with 3 queries, 0 image tokens\) do not fit"):
        processor.encode_sample(talk("red " * 200), independent)


@pytest.mark.slow
@given(
    kinds=st.lists(st.sampled_from(["picture", "talk", "skipped"]), min_size=1, max_size=4), independent=st.booleans()
)
@settings(deadline=None, max_examples=30)
def test_any_mix_of_rows(processor, world, kinds, independent):
    """Pictures are those of the rows that have one, in their order; everything else is as in a batch of one."""
    samples = fitting(world)
    items = []
    for k, kind in enumerate(kinds):
        if kind == "picture":
            items.append(processor.encode_sample(dataclasses.replace(samples[k], id=f"{k}"), independent))
        elif kind == "talk":
            items.append(processor.encode_sample(dataclasses.replace(talk(), id=f"{k}"), independent))
        else:
            items.append(processor.neutral_item(f"{k}"))
    batch = processor.collate(items)
    assert batch["sample_ids"] == [str(k) for k in range(len(kinds))]
    assert batch["skipped_ids"] == [str(k) for k, kind in enumerate(kinds) if kind == "skipped"]
    alone = [processor.collate([item]) for item in items]
    for name in ("pixel_values", "image_grid_thw", "detector_pixel_values", "target_box_only"):
        expected = torch.cat([single[name] for single in alone])
        assert torch.equal(batch[name], expected) and batch[name].dtype == expected.dtype
    assert batch["pixel_values"].dtype == batch["detector_pixel_values"].dtype == torch.float32
    assert len(batch["detector_pixel_values"]) == len(batch["image_grid_thw"]) == kinds.count("picture")
    assert ("turn_ids" in batch) == (independent and kinds != ["skipped"] * len(kinds))
    for row, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        for name, rest in (("input_ids", processor.chat.token_ids["pad"]), ("labels", IGNORED), ("attention_mask", 0)):
            assert torch.equal(batch[name][row, :length], single[name][0]) and bool(
                (batch[name][row, length:] == rest).all()
            )
        if kinds[row] == "skipped":
            assert bool((batch["labels"][row] == IGNORED).all())
            assert "turn_ids" not in batch or not batch["turn_ids"][row].any()


def test_batches_for_inference_have_nothing_of_training(processor, world):
    item = processor.encode_image(read_coco_instructions(world, "train")[0].image)
    chat = processor.encode_chat(item["image_grid_thw"], [("all stars", None)])
    assert not {"labels", "skipped_ids", "target_masks", "turn_ids"} & set(
        processor.collate([{**item, "input_ids": chat.input_ids}])
    )


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


def test_many_masks_on_a_large_picture_take_turns(processor, monkeypatch):
    logits, scores, boxes = torch.randn(2, N, 8, 8), torch.rand(2, N), torch.rand(2, N, 4)
    together = processor.instances(logits, scores, boxes, ["a", "b"], (40, 30), threshold=0.0)
    for pixels in (1, 2 * 40 * 30, 3 * 40 * 30 + 1):
        monkeypatch.setattr("instructsam.processing.processor._PIXELS_AT_ONCE", pixels)
        assert processor.instances(logits, scores, boxes, ["a", "b"], (40, 30), threshold=0.0) == together
