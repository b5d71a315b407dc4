"""Training items: which turns are asked, how many masks that makes, and what is too much for a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_fixtures import settings_of

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.dataset import InstructionDataset
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
        dataset = InstructionDataset(samples, make_processor(), turns_per_image=turns)
        found = dataset.num_masks()
        assert len(found) == len(dataset)
        for index, expected in enumerate(found):
            drawn = [dataset.draw((epoch, index)).turns for epoch in range(400)]
            masks = [sum(len(phrase.rles) for turn in some for phrase in turn.phrases) for some in drawn]
            assert np.mean(masks) == pytest.approx(expected, abs=0.3)


def test_only_the_kinds_that_are_asked_count(make_processor):
    samples = [sample("a", 1, 2), sample("b", 1)]
    dataset = InstructionDataset(samples, make_processor(), turns_per_image=8, kinds=["kind2"])
    assert dataset.num_masks() == [2.0]


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
    return [[[(p.text, len(p.rles)) for p in turn.phrases] for turn in some.turns] for some in dataset.samples]


def test_too_many_instances_raise(make_processor):
    with pytest.raises(ValueError, match="sample mixed: phrase 'stars' has 5 instances, more than the 4 queries"):
        InstructionDataset(crowded(), make_processor(num_queries=4))
    assert len(InstructionDataset(crowded(), make_processor(num_queries=5))) == 2


def test_too_many_instances_are_dropped(make_processor, caplog):
    dataset = InstructionDataset(crowded(), make_processor(num_queries=4), too_many_instances="drop")
    assert phrases_of(dataset) == [[[("dogs", 1)], [("cats", 4)]]]
    assert dataset.left_out == {"phrases": 3, "turns": 2, "samples": 1}
    (record,) = caplog.records
    assert record.message.startswith("left out: 3 phrases, 1 samples, 2 turns; the first: sample mixed: phrase 'stars'")
    assert dataset.num_masks() == [2.5]


def test_too_many_instances_are_truncated(make_processor, caplog):
    dataset = InstructionDataset(crowded(), make_processor(num_queries=4), too_many_instances="truncate")
    expected = [[[("dogs", 1), ("stars", 4)], [("stars", 4)], [("cats", 4)]], [[("stars", 4)]]]
    assert phrases_of(dataset) == expected and dataset.left_out == {"truncated phrases": 3}
    assert [rle["counts"] for rle in dataset.samples[1].turns[0].phrases[0].rles] == ["0", "1", "2", "3"]
    assert len(caplog.records) == 1


def test_too_many_instances_are_a_bad_record_to_skip(make_processor):
    dataset = InstructionDataset(crowded(), make_processor(num_queries=4), on_bad="skip")
    assert phrases_of(dataset) == [[[("cats", 4)]]] and dataset.left_out == {"turns": 3, "samples": 1}


def test_nothing_left_and_unknown_policies_are_errors(make_processor):
    with pytest.raises(ValueError, match="no sample has a turn"):
        InstructionDataset(crowded()[1:], make_processor(num_queries=1), too_many_instances="drop")
    with pytest.raises(ValueError, match="too_many_instances='cut' is not one of raise, drop, truncate"):
        InstructionDataset(crowded(), make_processor(), too_many_instances="cut")
    with pytest.raises(ValueError, match="on_bad must be"):
        InstructionDataset(crowded(), make_processor(), on_bad="ignore")


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
        dataset = InstructionDataset([long], limited, turns_per_image=3, independent_turns=independent)
        free = InstructionDataset([long], processor, turns_per_image=3, independent_turns=independent)
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
        InstructionDataset([long], processor)
    dataset = InstructionDataset([long], processor, on_bad="skip", turns_per_image=2)
    assert [turn.id for turn in dataset.samples[0].turns] == ["1"] and dataset.left_out == {"turns": 1}
    assert "left out: 1 turns; the first: sample talk" in caplog.text
    with pytest.raises(ValueError, match="no sample has a turn"):
        InstructionDataset([talk(picture, 3)], processor, on_bad="skip")


def test_a_picture_too_thin_to_be_shown(make_processor, picture):
    thin = Sample("thin", picture, 1, 201, talk(picture, 1).turns)
    with pytest.raises(ValueError, match="sample thin: a picture of 1x201 pixels is thinner"):
        InstructionDataset([thin], make_processor())
    dataset = InstructionDataset([thin, talk(picture, 1)], make_processor(), on_bad="skip")
    assert [some.id for some in dataset.samples] == ["talk"]


def test_the_bound_without_a_tokenizer_holds(make_processor, world):
    processor = make_processor()
    dataset = InstructionDataset(read_coco_instructions(world, "train"), processor)
    odd = [Turn("\U0001d15e\u0958 é   ", (PhraseTarget("ﬁ\u0344"),) * 3), Turn("x", (PhraseTarget("y"),))]
    for turns in [*(some.turns for some in dataset.samples), odd]:
        for independent in (True, False):
            dataset.independent_turns = independent
            encoded = dataset._num_tokens(turns)
            assert encoded <= sum(map(dataset._most_tokens, turns))


def test_limits_change_nothing_where_they_do_not_bind(make_processor, world):
    """The draws are those of the random generator, whatever the policies."""
    samples = read_coco_instructions(world, "train")
    for policy in ("raise", "drop", "truncate"):
        dataset = InstructionDataset(samples, make_processor(), turns_per_image=3, seed=5, too_many_instances=policy)
        assert dataset.samples == samples and not dataset.left_out
        for index, whole in enumerate(samples):
            chosen = np.random.default_rng((5, 2, index)).permutation(len(whole.turns))[:3]
            assert dataset.draw((2, index)).turns == tuple(whole.turns[k] for k in chosen)


def test_policies_come_from_the_configuration(world):
    settings = settings_of("train", f"data.root={world}", "model.config.num_queries=2")
    assert settings["data"]["too_many_instances"] == "raise"
    with pytest.raises(ValueError, match="more than the 2 queries"):
        build_task(settings)
    settings["data"]["too_many_instances"] = "drop"
    assert build_task(settings).dataset.left_out["phrases"] > 0
    settings["data"] |= {"too_many_instances": "raise", "on_bad": "skip"}
    assert build_task(settings).dataset.left_out["turns"] > 0
    own = settings_of("train", "data=coco_instructions", "data.root=somewhere")["data"]
    assert own["too_many_instances"] == "drop"
