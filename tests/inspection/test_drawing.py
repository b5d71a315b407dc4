"""Random samples: every one as likely as another, the same for a seed, from files and tables alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instructsam.data.composition import Composition
from instructsam.data.sources import READERS, parse_sources, table_recipe
from instructsam.data.table import write_table
from instructsam.inspection.drawing import Reservoir, as_asked, draw
from instructsam.masks import box_to_rle
from instructsam.structures import PhraseTarget, Sample, Turn

RLE = box_to_rle([0, 0, 2, 2], 8, 8)


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


def test_a_sample_is_shown_as_it_would_be_asked():
    turns = tuple(Turn(word, (PhraseTarget(word, (RLE,)),), form="phrase") for word in ("dog", "cat", "bird"))
    sample = Sample("s", Path("a.png"), 8, 8, turns, joint=True)
    rng = np.random.default_rng(0)
    (joint,) = as_asked(sample, Composition(joint_probability=1.0), rng).turns
    assert sorted(phrase.text for phrase in joint.phrases) == ["bird", "cat", "dog"]
    assert all(word in joint.instruction for word in ("dog", "cat", "bird"))
    alone = as_asked(sample, Composition(joint_probability=0.0, pairs=False), rng).turns
    assert len(alone) == 3 and all(turn.instruction not in ("dog", "cat", "bird") for turn in alone)
