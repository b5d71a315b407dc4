"""Figures of hand-made samples, and what weights do to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam.inspection.statistics import AREA, FEW, QUANTITIES, describe, facts_of, statistics
from instructsam.masks import box_to_rle
from instructsam.structures import PhraseTarget, Sample, Turn


def rle(width: int) -> dict:
    return box_to_rle([0, 0, width, 10], 10, 100)  # width % of the picture


def sample(*turns: Turn) -> Sample:
    return Sample("s", Path("a.png"), 10, 100, turns)


DOGS = Turn("the two dogs", (PhraseTarget("dogs", (rle(10), rle(50))),), "category", "1", "category")
NOTHING = Turn("red cat", (PhraseTarget("a red cat"), PhraseTarget("it")), "no-target")
BOXES = Turn("x", (PhraseTarget("car", (rle(20),), True), PhraseTarget("bus", (rle(30),) * 2, True)), "category")
TALK = Turn("hello you", answer=("Hi.",), kind="conversation")


def test_the_figures_of_hand_made_samples():
    found = statistics([([facts_of(sample(DOGS, NOTHING)), facts_of(sample(BOXES, TALK))], 1.0)])
    assert {name: found[name]["mean"] for name in QUANTITIES} == pytest.approx(
        {
            "instances_per_instruction": (2 + 0 + 3) / 3,  # that of plain words asks for none
            "instances_per_phrase": (2 + 0 + 0 + 1 + 2) / 5,
            "phrases_per_instruction": (1 + 2 + 2) / 3,
            "turns_per_sample": 2,
            "phrase_words": (1 + 3 + 1 + 1 + 1) / 5,
            "instruction_words": (3 + 2 + 1 + 2) / 4,
            "mask_area": (0.1 + 0.5 + 0.2 + 0.3 + 0.3) / 5,
            "longest_side": 100,
        }
    )
    assert (found["no_target"], found["text_only"], found["boxes_only"]) == (0.25, 0.25, 0.25)
    assert found["kinds"] == {"category": 0.5, "conversation": 0.25, "no-target": 0.25}
    assert found["forms"] == {"": 0.75, "category": 0.25}
    assert found["mask_area"]["bins"] == pytest.approx(
        {name: {"≤10": 0.2, "≤30": 0.6, "≤100": 0.2}.get(name, 0.0) for name, _ in AREA}
    )
    assert found["instances_per_instruction"]["bins"]["2"] == pytest.approx(1 / 3)


def test_the_longest_side_may_be_the_height():
    upright = [facts_of(Sample("s", Path("a.png"), height, 10, (TALK,))) for height in (300, 100)]
    found = statistics([(upright, 1.0)])["longest_side"]
    assert (found["min"], found["max"], found["mean"]) == (100, 300, 200)


def test_a_conversation_about_no_picture_has_no_size():
    found = statistics([([facts_of(Sample("t", None, 0, 0, (TALK,)))], 1.0)])
    assert found["longest_side"]["mean"] is None and found["turns_per_sample"]["mean"] == 1
    assert set(found["mask_area"]["bins"].values()) == {0.0}


def test_weights_are_as_good_as_repetitions():
    one, other = facts_of(sample(DOGS, TALK)), facts_of(sample(BOXES))
    weighted, repeated = statistics([([one], 3.0), ([other], 1.0)]), statistics([([one] * 3 + [other], 1.0)])
    for name in QUANTITIES:
        assert weighted[name]["bins"] == pytest.approx(repeated[name]["bins"])
        assert weighted[name]["mean"] == pytest.approx(repeated[name]["mean"])
        assert weighted[name]["median"] == repeated[name]["median"]
    assert weighted["kinds"] == pytest.approx(repeated["kinds"])
    assert weighted["boxes_only"] == pytest.approx(repeated["boxes_only"])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_bins_and_quantiles_hold_for_any_values(values):
    found = describe(values, np.ones(len(values)), FEW)
    assert sum(found["bins"].values()) == pytest.approx(1)
    for name, share in found["bins"].items():
        count = sum(value > 10 for value in values) if name == ">10" else values.count(int(name))
        assert share == pytest.approx(count / len(values))
    assert found["median"] == np.quantile(values, 0.5, method="inverted_cdf")
    assert (found["min"], found["max"]) == (min(values), max(values))


def test_every_value_has_a_bin():
    for _, _, _, bins in QUANTITIES.values():
        ends = [end for _, end in bins]
        assert ends == sorted(set(ends)) and (ends[-1] == np.inf or bins is AREA and ends[-1] == 1)
