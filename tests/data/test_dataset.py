"""Training items: which turns are asked, how many masks that makes, and what is too much for a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_fixtures import settings_of

from instructsam import masks
from instructsam.data.augmentation import Augmentation
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.composition import Composition
from instructsam.data.dataset import InstructionDataset
from instructsam.data.limits import Limits, most_image_tokens
from instructsam.data.samples import SampleList
from instructsam.errors import DataError
from instructsam.processing.images import VLMImageTransform
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn
from instructsam.training.build import build_task

RLE = {"size": [4, 4], "counts": "0"}
MASK = {"size": [64, 64], "counts": "0PP2"}
IMAGE_TOKENS = 16  # of a picture of 64x64 pixels for the tiny processor: the least


@pytest.fixture(scope="module")
def make_processor(checkpoint):
    """The tiny processor with limits of the test's choice."""

    def make(**limits) -> InstructSAMProcessor:
        loaded = InstructSAMProcessor.from_pretrained(checkpoint)
        settings = {"vlm_image": loaded.vlm_image, "detector_image_size": 96, "num_queries": 10, **limits}
        return InstructSAMProcessor(loaded.tokenizer, mask_size=(24, 24), **settings)

    return make


def sample(name: str, *counts: int) -> Sample:
    """One turn with one phrase for every number of masks."""
    turns = tuple(Turn(f"{name}-{n}", (PhraseTarget("things", (RLE,) * n),), kind=f"kind{n}") for n in counts)
    return Sample(name, Path(f"{name}.png"), 4, 4, turns)


def test_number_of_masks_is_the_mean_over_what_may_be_drawn(make_processor):
    samples = [sample("a", 1, 2, 3), sample("b", 5), sample("c", 0, 0), sample("d", 4, 0, 0, 4)]
    for turns in (1, 2, 9):
        dataset = InstructionDataset(SampleList(samples), make_processor(), turns_per_image=turns)
        found = dataset.num_masks()
        assert len(found) == len(dataset)
        for index, expected in enumerate(found):
            drawn = [dataset.draw((epoch, index)).turns for epoch in range(400)]
            masks = [sum(len(phrase.rles) for turn in some for phrase in turn.phrases) for some in drawn]
            assert np.mean(masks) == pytest.approx(expected, abs=0.3)


# ---- more instances than queries ------------------------------------------------------------------------------------


def crowded() -> list[Sample]:
    """Phrases of 1, 5 and 4 instances: in one turn, in a turn of its own, and in a sample of its own."""
    many = PhraseTarget("stars", tuple({"size": [4, 4], "counts": str(k)} for k in range(5)))
    few, four = PhraseTarget("dogs", (RLE,)), PhraseTarget("cats", (RLE,) * 4)
    mixed = Sample(
        "mixed", Path("m.png"), 4, 4, (Turn("both", (few, many)), Turn("stars", (many,)), Turn("c", (four,)))
    )
    return [mixed, Sample("full", Path("f.png"), 4, 4, (Turn("stars", (many,)),))]


def phrases_of(dataset: InstructionDataset) -> list[list[list[tuple[str, int]]]]:
    return [[[(p.text, len(p.rles)) for p in turn.phrases] for turn in some.turns] for some in usable(dataset)]


def usable(dataset: InstructionDataset) -> list[Sample]:
    return [dataset.usable(index) for index in range(len(dataset))]


def test_too_many_instances_raise(make_processor):
    with pytest.raises(ValueError, match="sample mixed: phrase 'stars' has 5 instances, more than the 4 queries"):
        InstructionDataset(SampleList(crowded()), make_processor(num_queries=4))
    assert len(InstructionDataset(SampleList(crowded()), make_processor(num_queries=5))) == 2


def test_too_many_instances_are_dropped(make_processor, caplog):
    dataset = InstructionDataset(SampleList(crowded()), make_processor(num_queries=4), too_many_instances="drop")
    assert phrases_of(dataset) == [[[("dogs", 1)], [("cats", 4)]]]
    assert dataset.left_out == {"samples with dropped phrases": 1, "samples": 1}
    (record,) = caplog.records
    expected = "left out: 1 samples, 1 samples with dropped phrases; the first: sample mixed: phrase 'stars' has 5"
    assert record.message.startswith(expected)
    assert dataset.num_masks().tolist() == [pytest.approx(10 / 3)]  # 2.5 in truth: one of the two large ones is seen


def test_too_many_instances_are_truncated(make_processor, caplog):
    dataset = InstructionDataset(SampleList(crowded()), make_processor(num_queries=4), too_many_instances="truncate")
    expected = [[[("dogs", 1), ("stars", 4)], [("stars", 4)], [("cats", 4)]], [[("stars", 4)]]]
    assert phrases_of(dataset) == expected and dataset.left_out == {"samples with truncated phrases": 2}
    assert [rle["counts"] for rle in dataset.usable(1).turns[0].phrases[0].rles] == ["0", "1", "2", "3"]
    assert len(caplog.records) == 1


def test_too_many_instances_are_a_bad_record_to_skip(make_processor):
    dataset = InstructionDataset(SampleList(crowded()), make_processor(num_queries=4), on_bad="skip")
    assert phrases_of(dataset) == [[[("cats", 4)]]] and dataset.left_out == {"turns": 3, "samples": 1}


def test_nothing_left_and_unknown_policies_are_errors(make_processor):
    with pytest.raises(ValueError, match="no sample has a turn"):
        InstructionDataset(SampleList(crowded()[1:]), make_processor(num_queries=1), too_many_instances="drop")
    with pytest.raises(ValueError, match="too_many_instances='cut' is not one of raise, drop, truncate"):
        InstructionDataset(SampleList(crowded()), make_processor(), too_many_instances="cut")
    with pytest.raises(ValueError, match="on_bad must be"):
        InstructionDataset(SampleList(crowded()), make_processor(), on_bad="ignore")


# ---- more tokens than max_length ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.new("RGB", (64, 64)).save(path)
    return path


def talk(picture: Path, *phrases: int) -> Sample:
    """One turn for every number of phrases."""
    turns = (Turn(f"the red circles {n}", (PhraseTarget("red circles"),) * n, id=str(n)) for n in phrases)
    return Sample("talk", picture, 64, 64, tuple(turns))


def length_of(processor: InstructSAMProcessor, *turns: Turn, independent: bool) -> int:
    texts = [(turn.instruction, [phrase.text for phrase in turn.phrases]) for turn in turns]
    image_tokens = processor.vlm_image.num_tokens(64, 64)
    return len(processor.chat.encode(image_tokens, texts, independent).input_ids)


@pytest.mark.parametrize("independent", [False, True])
def test_last_turns_of_a_long_draw_are_left_out(make_processor, picture, independent, caplog):
    long = talk(picture, 1, 2, 3)
    processor = make_processor()
    exact = length_of(processor, long.turns[1], long.turns[2], independent=independent)
    for max_length, least in ((exact, 2), (exact - 1, 1)):
        caplog.clear()
        limited = make_processor(max_length=max_length)
        dataset = InstructionDataset(SampleList([long]), limited, turns_per_image=3, independent_turns=independent)
        free = InstructionDataset(SampleList([long]), processor, turns_per_image=3, independent_turns=independent)
        assert "1 samples are too long" in caplog.text and len(caplog.records) == 1 and not dataset.left_out
        sizes = set()
        for epoch in range(30):
            turns = dataset.draw((epoch, 0)).turns
            assert turns == dataset.draw((epoch, 0)).turns
            all_turns = free.draw((epoch, 0)).turns
            assert len(all_turns) == 3 and turns == all_turns[: len(turns)]
            assert length_of(processor, *turns, independent=independent) <= max_length
            more = all_turns[: len(turns) + 1]
            assert length_of(processor, *more, independent=independent) > max_length
            assert len(dataset[(epoch, 0)]["input_ids"]) <= max_length
            sizes.add(len(turns))
        assert min(sizes) == least and 3 not in sizes


def test_a_turn_that_does_not_fit_alone(make_processor, picture, caplog):
    long = talk(picture, 1, 3)
    processor = make_processor(max_length=length_of(make_processor(), long.turns[1], independent=True) - 1)
    with pytest.raises(ValueError, match="sample talk: the instruction 'the red circles 3' alone does not fit max_le"):
        InstructionDataset(SampleList([long]), processor)
    dataset = InstructionDataset(SampleList([long]), processor, on_bad="skip", turns_per_image=2)
    assert [turn.id for turn in dataset.usable(0).turns] == ["1"] and dataset.left_out == {"turns": 1}
    assert "left out: 1 turns; the first: sample talk" in caplog.text
    with pytest.raises(ValueError, match="no sample has a turn"):
        InstructionDataset(SampleList([talk(picture, 3)]), processor, on_bad="skip")


@pytest.mark.parametrize("max_length", [16384, 300])
def test_a_picture_too_thin_to_be_shown(make_processor, picture, max_length, tmp_path):
    """Found when it is drawn, or when the data set is opened, where lengths have to be looked at."""
    Image.new("RGB", (201, 1)).save(tmp_path / "thin.png")
    thin = Sample("thin", tmp_path / "thin.png", 1, 201, talk(picture, 1).turns)
    processor = make_processor(max_length=max_length)
    with pytest.raises(DataError, match="sample thin: a picture of 1x201 pixels is thinner"):
        InstructionDataset(SampleList([thin]), processor)[(0, 0)]
    dataset = InstructionDataset(SampleList([thin, talk(picture, 1)]), processor, on_bad="skip")
    batch = processor.collate([dataset[(0, index)] for index in range(len(dataset))])
    assert batch["sample_ids"][-1] == "talk"
    assert (len(dataset), batch["skipped_ids"]) == ((1, []) if max_length == 300 else (2, ["thin"]))


def test_the_bound_without_a_tokenizer_holds(make_processor, world):
    processor = make_processor()
    odd = [Turn("\U0001d15e\u0958 é   ", (PhraseTarget("ﬁ\u0344"),) * 3), Turn("x", (PhraseTarget("y"),))]
    told = [Turn("who?", (PhraseTarget("a"),) * 2, answer=("It is \u0958", " with ", "!")), Turn("?", answer=("No.",))]
    for independent in (True, False):
        limits = Limits(processor, Composition(), independent_turns=independent)
        for turns in [*(some.turns for some in read_coco_instructions(world, "train")), odd, told]:
            assert limits.num_tokens(turns) <= sum(map(limits.most_tokens, turns))


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 4, 300]), st.sampled_from([1, 64, 5000]))
def test_no_picture_takes_more_tokens_than_the_bound(height, width, least, most):
    transform = VLMImageTransform(min_pixels=least * 1024, max_pixels=max(least, most) * 1024)
    if max(height, width) <= 200 * min(height, width):
        assert transform.num_tokens(height, width) <= most_image_tokens(transform)


def test_limits_change_nothing_where_they_do_not_bind(make_processor, world):
    """The draws are those of the random generator, whatever the policies."""
    samples = read_coco_instructions(world, "train")
    for policy in ("raise", "drop", "truncate"):
        options = {"turns_per_image": 3, "seed": 5, "too_many_instances": policy}
        dataset = InstructionDataset(SampleList(samples), make_processor(), **options)
        assert usable(dataset) == samples and not dataset.left_out
        for index, whole in enumerate(samples):
            chosen = np.random.default_rng((5, 2, index)).permutation(len(whole.turns))[:3]
            assert dataset.draw((2, index)).turns == tuple(whole.turns[k] for k in chosen)


def test_policies_come_from_the_configuration(world):
    settings = settings_of("train", f"data.root={world}", "model.config.num_queries=2")
    assert settings["data"]["too_many_instances"] == "raise"
    with pytest.raises(ValueError, match="more than the 2 queries"):
        build_task(settings)
    settings["data"]["too_many_instances"] = "drop"
    assert build_task(settings).dataset.left_out["samples with dropped phrases"] > 0
    settings["data"] |= {"too_many_instances": "raise", "on_bad": "skip"}
    assert build_task(settings).dataset.left_out["turns"] > 0
    own = settings_of("train", "data=coco_instructions", "data.root=somewhere")["data"]
    assert own["too_many_instances"] == "drop"


# ---- forms, changed pictures, bad samples ---------------------------------------------------------------------------


class Watched(SampleList):
    """Counts the samples that are read."""

    def __init__(self, samples: list[Sample]):
        super().__init__(samples)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        return super().__getitem__(index)


def half(first: int, last: int) -> dict:
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, first:last] = True
    return masks.encode(mask)


def asked_in_forms(picture: Path, *more: Turn, joint: bool = False) -> Sample:
    left, right = PhraseTarget("left red dog", (half(0, 20),)), PhraseTarget("cat", (half(40, 64),))
    turns = (Turn("left red dog", (left,), form="phrase"), Turn("cat", (right,), form="category"), *more)
    return Sample("forms", picture, 64, 64, turns, joint=joint)


def test_a_large_set_is_opened_without_reading_it(make_processor, picture):
    """Only rows that no size can decide are looked at."""
    ordinary = [talk(picture, 1, 2) for _ in range(500)]
    full = Sample("full", picture, 64, 64, (Turn("stars", (PhraseTarget("stars", (MASK,) * 11),)),))
    nothing = Sample("nothing", picture, 64, 64, (Turn("n", (PhraseTarget("n"),)),))
    plain = Sample("plain", None, 0, 0, (Turn("who?", answer=("me",)),))
    silent = Sample("silent", picture, 64, 64, ())
    long = talk(picture, *[9] * 60)
    some = talk(picture, 1)
    some = dataclasses.replace(some, turns=(*some.turns, Turn("dog", (PhraseTarget("dog", (MASK,)),))))
    samples = Watched([*ordinary, full, nothing, plain, long, some, silent])
    processor = make_processor()
    kept = InstructionDataset(samples, processor, too_many_instances="drop")
    assert set(samples.read) == {500, 503}  # for the message, and for its length
    assert kept.rows.tolist() == [*range(500), *range(501, 505)] and kept.left_out == {"samples": 1}
    samples.read.clear()
    composition = {"no_target": "drop"}
    few = InstructionDataset(samples, processor, too_many_instances="drop", composition=composition)
    assert few.rows.tolist() == [502, 504] and few.left_out == {"samples": 1, "samples without a target": 502}
    assert all(few.draw((epoch, 1)).turns[0].instruction == "dog" for epoch in range(9))
    with pytest.raises(DataError, match="sample full: phrase 'stars' has 11 instances") as caught:
        InstructionDataset(samples, processor)
    assert caught.value.kind == "too many instances"


def test_no_target_and_large_phrases_in_one_sample(make_processor, picture):
    """What is left of it is decided by its turns: the sizes do not tell."""
    many, none = PhraseTarget("stars", (MASK,) * 11), PhraseTarget("moon")
    both = Sample("both", picture, 64, 64, (Turn("stars", (many,)), Turn("moon", (none,))))
    told = dataclasses.replace(both, id="told", turns=(*both.turns, Turn("what?", answer=("Stars.",))))
    options = {"too_many_instances": "drop", "composition": {"no_target": "drop"}}
    dataset = InstructionDataset(SampleList([both, told]), make_processor(), **options)
    assert [some.id for some in usable(dataset)] == ["told"]
    assert [turn.instruction for turn in dataset.draw((0, 0)).turns] == ["what?"]


def test_turns_beyond_the_limits_of_a_composition(make_processor, picture):
    sample = talk(picture, 1, 4, 2)
    limits = {"max_phrases": 3}
    with pytest.raises(DataError, match="'the red circles 4' alone has 4 phrases and 0 instances, more than") as caught:
        InstructionDataset(SampleList([sample]), make_processor(), composition=limits)
    assert caught.value.kind == "too many phrases"
    options = {"composition": limits, "on_bad": "skip", "turns_per_image": 9}
    dataset = InstructionDataset(SampleList([sample]), make_processor(), **options)
    assert dataset.left_out == {"turns": 1}
    for epoch in range(20):
        assert sorted(turn.id for turn in dataset.draw((epoch, 0)).turns) == ["1", "2"]


def test_turns_are_worded_and_joined(make_processor, picture):
    dataset = InstructionDataset(SampleList([asked_in_forms(picture, joint=True)]), make_processor(), turns_per_image=9)
    drawn = [dataset.draw((epoch, 0)).turns for epoch in range(400)]
    assert drawn == [dataset.draw((epoch, 0)).turns for epoch in range(400)]
    joint = [turns[0] for turns in drawn if len(turns) == 1]
    assert len(joint) == pytest.approx(200, abs=40) and len({turn.instruction for turn in joint}) >= 20
    for turn in joint:
        assert ("left red dog and cat" in turn.instruction) == (turn.phrases[0].text == "left red dog")
        assert {phrase.text for phrase in turn.phrases} == {"left red dog", "cat"}
    alone = [turn for turns in drawn if len(turns) == 2 for turn in turns]
    assert all(turn.phrases[0].text in turn.instruction and not turn.form for turn in alone)
    assert len({turn.instruction for turn in alone}) >= 30
    assert dataset[(0, 0)]["targets"][0][0].shape == (1, 24, 24)


@pytest.mark.parametrize("joint", [True, False])
def test_templates_never_make_a_draw_too_long(make_processor, picture, joint):
    """Whatever the words get, what is drawn fits; and with room for the longest templates nothing is left out."""
    more = [Turn(f"cat {k}", (PhraseTarget("cat", (MASK,)),), form="category") for k in range(4)]
    sample = asked_in_forms(picture, *more, joint=joint)
    sizes = set()
    for max_length in (250, 400, 600, 1200):
        options = {"turns_per_image": 9, "composition": {"joint_probability": 1.0, "pairs": False}}
        dataset = InstructionDataset(SampleList([sample]), make_processor(max_length=max_length), **options)
        for epoch in range(20):
            assert len(dataset[(epoch, 0)]["input_ids"]) <= max_length
            turns = dataset.draw((epoch, 0)).turns
            sizes.add((max_length, sum(len(turn.phrases) for turn in turns)))
            assert len(turns) == 1 or not joint
    most = {length: max(n for other, n in sizes if other == length) for length, _ in sizes}
    assert most[250] >= 1 and most[250] < most[600] <= most[1200] == 6


def test_flipped_pictures_have_flipped_masks_and_words(make_processor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    sample = asked_in_forms(tmp_path / "picture.png")
    processor = make_processor()
    options = {"turns_per_image": 2, "composition": {"pairs": False}}
    plain = InstructionDataset(SampleList([sample]), processor, **options)
    flips = InstructionDataset(SampleList([sample]), processor, **options, augmentation={"flip": 0.5})
    seen = {"left red dog": 0, "right red dog": 0}
    for epoch in range(30):
        asked, item = flips.draw((epoch, 0)), flips[(epoch, 0)]
        before = plain[(epoch, 0)]
        (dog,) = (turn for turn in asked.turns if "dog" in turn.instruction)
        seen[dog.phrases[0].text] += 1
        assert dog.phrases[0].text in dog.instruction
        picture, target = before["detector_pixel_values"], [found for found, _ in before["targets"]]
        if dog.phrases[0].text == "right red dog":
            whole = masks.decode_batch([p.rles[0] for turn in asked.turns for p in turn.phrases], 64, 64)
            sides = {turn.phrases[0].text: mask for turn, mask in zip(asked.turns, whole, strict=True)}
            assert sides["right red dog"][:, 44:].all() and sides["right red dog"].sum() == 20 * 64
            assert sides["cat"][:, :24].all() and sides["cat"].sum() == 24 * 64
            mirrored = picture.flip(-1)
            assert torch.allclose(item["detector_pixel_values"], mirrored, atol=0.02)
            assert not torch.allclose(item["detector_pixel_values"], picture, atol=0.02)
            assert (item["targets"][0][0].float() - target[0].flip(-1).float()).abs().mean() < 0.1
        else:
            assert torch.equal(item["detector_pixel_values"], picture)
            assert all(torch.equal(found, other) for (found, _), other in zip(item["targets"], target, strict=True))
    assert min(seen.values()) > 5


def test_tinted_pictures(make_processor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    both = asked_in_forms(tmp_path / "picture.png")
    cat = dataclasses.replace(both, turns=both.turns[1:])
    for sample, tinted in ((both, False), (cat, True)):
        items = [
            InstructionDataset(SampleList([sample]), make_processor(), turns_per_image=2, augmentation=change)[(0, 0)]
            for change in ({}, {"jitter": 0.4})
        ]
        assert torch.equal(items[0]["pixel_values"], items[1]["pixel_values"]) != tinted


def test_samples_that_cannot_be_encoded(make_processor, picture, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    bad = [dataclasses.replace(talk(tmp_path / "none.png", 1), id=f"none {k}") for k in range(30)]
    bad.append(dataclasses.replace(talk(broken, 1), id="broken"))
    bad.append(dataclasses.replace(talk(picture, 1), id="size", height=63))
    samples = SampleList([*bad, talk(picture, 1)])
    processor = make_processor()
    for augmentation in ({}, {"flip": 1.0}):
        strict = InstructionDataset(samples, processor, augmentation=augmentation)
        for index, (name, kind) in {0: ("none 0", "missing"), 30: ("broken", "broken"), 31: ("size", "size")}.items():
            with pytest.raises(DataError, match=f"sample {name}: ") as caught:
                strict[(0, index)]
            assert caught.value.kind == f"image {kind}"
    dataset = InstructionDataset(samples, processor, on_bad="skip")
    assert len(dataset) == 33 and not dataset.left_out
    batch = processor.collate([dataset[(0, index)] for index in range(33)])
    assert batch["skipped_ids"] == [sample.id for sample in bad] and batch["sample_ids"][32] == "talk"
    assert len(caplog.records) == 20 and "skipped: sample none 0: " in caplog.messages[0]


def test_wrong_settings_of_parts(make_processor, picture):
    samples = SampleList([talk(picture, 1)])
    with pytest.raises(ValueError, match="composition: unknown jont"):
        InstructionDataset(samples, make_processor(), composition={"jont": 1})
    with pytest.raises(ValueError, match="augmentation.flip=2"):
        InstructionDataset(samples, make_processor(), augmentation={"flip": 2})
    dataset = InstructionDataset(samples, make_processor(), composition=None, augmentation=None)
    assert dataset.asking.composition == Composition() and dataset.asking.augmentation == Augmentation()


def test_sizes_for_the_sampler_respect_the_limits(make_processor):
    samples = SampleList([sample("a", 2, 2, 2, 2), sample("b", 9, 1), sample("c", 3)])
    options = {"turns_per_image": 9, "too_many_instances": "truncate"}
    processor = make_processor(num_queries=4)
    found = {
        limit: InstructionDataset(samples, processor, **options, composition={name: limit}).num_masks().tolist()
        for name, limit in (("max_phrases", 2), ("max_instances", 6))
    }
    assert found == {2: [4.0, 5.0, 3.0], 6: [6.0, 5.0, 3.0]}


def test_pretraining_items_are_flipped_as_a_whole(make_processor, world):
    from instructsam.pretraining.dataset import GroundedDataset, collate_grounded

    samples = read_coco_instructions(world, "train")
    processor = make_processor()
    options = {"generic_phrase": "shapes", "num_generic": 2, "turns_per_image": 1}
    plain = GroundedDataset(SampleList(samples), processor, **options)
    flips = GroundedDataset(SampleList(samples), processor, **options, augmentation={"flip": 1.0})
    flipped = 0
    for index in range(len(plain)):
        before, after = plain[(0, index)], flips[(0, index)]
        assert before["generic"] == after["generic"] and before["generic"][-2:] == [True, True]
        map_before, map_after = before["object_map"], after["object_map"]
        if not torch.equal(map_before, map_after):
            flipped += 1
            assert torch.equal(map_before.flip(-1), map_after)
            boxes = before["object_boxes"][1:]
            mirrored = torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)
            assert torch.allclose(after["object_boxes"][1:], mirrored, atol=1e-5)
    assert flipped > len(plain) / 2
    batch = collate_grounded(processor, [flips[(0, k)] for k in range(2)])
    assert len(batch["generic"]) == len(batch["target_valid"])
    gone = [dataclasses.replace(samples[0], image=Path("none.png"))]
    with pytest.raises(DataError, match="no such image file"):
        GroundedDataset(SampleList(gone), processor, on_bad="skip")[(0, 0)]


@pytest.mark.multiprocess
def test_data_workers_may_be_started_anew(make_processor, picture):
    """As torch does where forking is not safe; everything then goes through a pickle."""
    dataset = InstructionDataset(SampleList([talk(picture, 1, 2), talk(picture, 1)]), make_processor())
    keys = [(0, 0), (0, 1), (3, 0)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=keys, num_workers=1, multiprocessing_context="spawn"
    )
    for key, item in zip(keys, loader, strict=True):
        assert torch.equal(item["input_ids"], dataset[key]["input_ids"])


def test_a_turn_that_is_too_large_does_not_hide_behind_plain_ones(make_processor, picture):
    plain = tuple(Turn(f"hello {k}", answer=("Good day.",)) for k in range(2))
    phrases = tuple(PhraseTarget(f"p{k}", (MASK,)) for k in range(12))
    for turn, limits in (
        (Turn("list all", phrases), {"max_phrases": 10}),
        (Turn("list all", phrases), {"max_instances": 11}),
        (Turn("all", (PhraseTarget("many", (MASK,) * 9), *phrases[:3])), {"max_instances": 10, "max_phrases": 10}),
    ):
        hidden = Sample("hidden", picture, 64, 64, (*plain, turn))
        with pytest.raises(DataError, match=r"sample hidden: the instruction '.*' alone has"):
            InstructionDataset(SampleList([hidden]), make_processor(), composition=limits)
        dataset = InstructionDataset(SampleList([hidden]), make_processor(), composition=limits, on_bad="skip")
        assert dataset.left_out == {"turns": 1} and len(dataset.usable(0).turns) == 2


def test_a_dialogue_is_asked_from_its_beginning(make_processor):
    turns = tuple(Turn(f"t{k}", answer=("yes",), kind="conversation") for k in range(15))
    dialogue = Sample("dialogue", None, 0, 0, turns)
    dataset = InstructionDataset(SampleList([dialogue]), make_processor(), turns_per_image=10, independent_turns=False)
    for epoch in range(20):
        assert [turn.instruction for turn in dataset.draw((epoch, 0)).turns] == [f"t{k}" for k in range(10)]
    alone = InstructionDataset(SampleList([dialogue]), make_processor(), turns_per_image=10, independent_turns=True)
    assert {tuple(turn.instruction for turn in alone.draw((epoch, 0)).turns) for epoch in range(20)} == {("t0",)}
    mixed = dataclasses.replace(dialogue, turns=(*turns[:3], dataclasses.replace(turns[3], kind="other")))
    free = InstructionDataset(SampleList([mixed]), make_processor(), turns_per_image=10, independent_turns=True)
    assert len(free.draw((0, 0)).turns) == 4
