"""Random samples: every one as likely as another, the same for a seed, from files and tables alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructsam.data.dataset import InstructionDataset
from instructsam.data.samples import SampleList
from instructsam.data.sources import READERS, parse_sources, table_recipe
from instructsam.data.table import write_table
from instructsam.inspection import drawing
from instructsam.inspection.drawing import Asker, Drawn, Reservoir
from instructsam.inspection.statistics import statistics
from instructsam.masks import bboxes, box_to_rle
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn

RLE = box_to_rle([0, 0, 2, 2], 8, 8)


def draw(data: dict[str, Any], num: int, limit: int, seed: int, num_queries: int | None = 10) -> list[Drawn]:
    return drawing.draw(data, num, limit, seed, Asker.of(data, num_queries))


def samples(count: int, instances: int = 1) -> list[Sample]:
    turn = Turn("dog", (PhraseTarget("dog", (RLE,) * instances),), form="phrase")
    return [Sample(f"s/{k}", Path("a.png"), 8, 8, (turn,)) for k in range(count)]


@pytest.fixture
def data(monkeypatch) -> dict[str, Any]:
    """A source of 200 samples that an epoch sees once, and one of 10 that it sees twice."""

    def read(count: int, instances: int, skips: Any) -> Any:
        for one in samples(count, instances):
            if one.id == "s/5":
                skips.counts["records"] += 1
            yield one

    monkeypatch.setitem(READERS, "made", read)
    large, small = {"count": 200, "instances": 1}, {"count": 10, "instances": 2, "repeats": 2}
    return {"sources": {"large": {"reader": "made", **large}, "small": {"reader": "made", **small}}, "prepared": None}


def test_a_reservoir_keeps_each_with_the_same_probability():
    kept: Counter[int] = Counter()
    for seed in range(2000):
        reservoir = Reservoir[int](3, np.random.default_rng(seed))
        for number in range(12):
            if reservoir.wants_next():
                reservoir.put(number)
        found = reservoir.kept()
        assert found == sorted(set(found)) and len(found) == 3
        kept.update(found)
    assert all(abs(kept[number] - 500) < 90 for number in range(12)), kept  # 500 ± 4.6 standard deviations


def test_a_reservoir_that_is_not_full_keeps_all():
    reservoir = Reservoir[str](5, np.random.default_rng(0))
    for letter in "abc":
        assert reservoir.wants_next()
        reservoir.put(letter)
    assert reservoir.kept() == ["a", "b", "c"]


def test_sources_share_what_is_shown_and_repeats_weigh(data):
    large, small = draw(data, num=7, limit=50, seed=0)
    assert (large.total, len(large.shown), len(large.facts)) == (200, 4, 50)
    assert (small.total, len(small.shown), len(small.facts)) == (10, 3, 10)
    assert large.weight * 50 == 200 and small.weight * 10 == 20  # samples that an epoch sees
    assert large.left_out == {"records": 1}
    assert all(facts.turns[0].phrases == ((1, 2, False),) for facts in small.facts)


def test_the_seed_decides(data):
    def shown(seed: int) -> list[str]:
        return [one.id for one in draw(data, 20, 5, seed)[0].shown]

    assert shown(0) == shown(0) != shown(1)
    assert draw({**data, "limit": 4}, 20, 100, 0)[0].total == 4


def test_tables_are_drawn_from_as_files_are(data, tmp_path):
    prepared = {**data, "prepared": str(tmp_path)}
    with pytest.raises(ValueError, match="not prepared"):
        draw(prepared, 8, 50, 0)
    for source in parse_sources(data["sources"]):
        made = samples(**{key: source.options[key] for key in ("count", "instances")})
        write_table(tmp_path / source.name, made, table_recipe(source, prepared))
    large, small = draw(prepared, 8, 50, 0)
    assert (large.total, len(large.shown), len(large.facts)) == (200, 4, 50)
    assert len({one.id for one in large.shown}) == 4 and large.weight == 4
    assert (small.total, len(small.facts)) == (10, 10)
    assert draw({**prepared, "limit": 3}, 8, 50, 0)[0].total == 3


def words(count: int = 3, instances: int = 1) -> Sample:
    names = ("dog", "cat", "bird", "fish", "fox")[:count]
    turns = tuple(Turn(word, (PhraseTarget(word, (RLE,) * instances),), form="phrase") for word in names)
    return Sample("s", Path("a.png"), 8, 8, turns, joint=True)


def test_a_sample_is_shown_as_it_would_be_asked():
    rng = np.random.default_rng(0)
    joint, _ = Asker.of({"composition": {"joint_probability": 1.0}, "turns_per_image": 9}, 10).ask(words(), rng)
    (turn,) = joint.turns
    assert sorted(phrase.text for phrase in turn.phrases) == ["bird", "cat", "dog"]
    assert all(word in turn.instruction for word in ("dog", "cat", "bird"))
    apart = {"composition": {"joint_probability": 0.0, "pairs": False}}
    alone, _ = Asker.of({**apart, "turns_per_image": 9}, 10).ask(words(), rng)
    assert len(alone.turns) == 3 and all(turn.instruction not in ("dog", "cat", "bird") for turn in alone.turns)
    few, _ = Asker.of({**apart, "turns_per_image": 2}, 10).ask(words(), rng)
    assert len(few.turns) == 2
    with pytest.raises(ValueError, match="turns_per_image=0"):
        Asker.of({"turns_per_image": 0}, 10)
    with pytest.raises(ValueError, match="too_many_instances='cut'"):
        Asker.of({"too_many_instances": "cut"}, 10)


def test_pictures_are_changed_as_training_changes_them():
    asker = Asker.of({"augmentation": {"flip": 1.0}, "turns_per_image": 1}, 10)
    flipped, change = asker.ask(words(1), np.random.default_rng(0))
    assert change.flip and bboxes(flipped.turns[0].phrases[0].rles).tolist() == [[6, 0, 8, 2]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("drop", [["few"], ["few"]]), ("truncate", [["few", "many"], ["few"], ["many"]]), ("raise", [["few"]])],
)
def test_phrases_of_too_many_instances_are_not_shown_as_asked(policy, expected):
    few, many = PhraseTarget("few", (RLE,) * 2), PhraseTarget("many", (RLE,) * 5)
    sample = Sample("s", Path("a.png"), 8, 8, (Turn("both", (few, many)), Turn("few", (few,)), Turn("many", (many,))))
    asker = Asker.of({"too_many_instances": policy, "turns_per_image": 9}, 3)
    asked, _ = asker.ask(sample, np.random.default_rng(0))
    assert sorted([phrase.text for phrase in turn.phrases] for turn in asked.turns) == sorted(expected)
    assert max(len(phrase.rles) for turn in asked.turns for phrase in turn.phrases) == (
        3 if policy == "truncate" else 2
    )
    free = Asker.of({"too_many_instances": policy, "turns_per_image": 9}, None)
    assert len(free.ask(sample, np.random.default_rng(0))[0].turns) == 3


def test_the_same_is_asked_as_by_the_training_set(checkpoint):
    """What is shown and measured must be what `InstructionDataset` draws."""
    processor = InstructSAMProcessor.from_pretrained(checkpoint)
    joint = {"joint_probability": 0.5, "max_phrases": 4}
    data = {"composition": joint, "augmentation": {"flip": 0.5}, "turns_per_image": 3, "too_many_instances": "truncate"}
    sample = words(5, processor.num_queries + 2)
    dataset = InstructionDataset(SampleList([sample]), processor, independent_turns=False, **data)
    asker = Asker.of({**data, "independent_turns": False}, processor.num_queries)
    for epoch in range(40):
        drawn = dataset.draw((epoch, 0))
        asked, _ = asker.ask(sample, dataset.generator((epoch, 0)))
        assert asked.turns == drawn.turns
        facts = asker.facts(sample, dataset.generator((epoch, 0)))
        assert [[count for _, count, _ in turn.phrases] for turn in facts.turns] == [
            [len(phrase.rles) for phrase in turn.phrases] for turn in drawn.turns
        ]


def test_samples_of_which_nothing_is_asked_are_counted_and_not_shown(data):
    large, small = draw(data, 20, 50, 0, num_queries=1)
    assert (large.silent, small.silent, len(small.shown), len(small.facts)) == (0, 10, 0, 10)
    assert statistics([(small.facts, 1.0)])["turns_per_sample"]["mean"] is None


def test_weights_say_how_often_an_epoch_sees_a_source(data):
    for name, weight in (("large", 1), ("small", 3)):
        data["sources"][name] |= {"weight": weight, "repeats": None}
    large, small = draw({**data, "epoch_samples": 40}, 8, 50, 0)
    assert (large.epoch, small.epoch) == (10, 30) and large.weight * 50 == 10 and small.weight * 10 == 30
