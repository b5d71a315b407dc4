"""What an epoch asks of a sample: jointly, in pairs or one by one, within limits, and all of it in the long run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructsam import masks
from instructsam.data.composition import Composition, Group, is_no_target
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

SIZE = 30


def strip(first: int, last: int) -> RLE:
    """A mask of the columns first to last of a picture of 30x30 pixels."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[:, first:last] = True
    return masks.encode(mask)


def turn(text: str, *rles: RLE, form: str = "phrase", **more) -> Turn:
    return Turn(text, (PhraseTarget(text, rles),), form=form, **more)


def sample_of(*turns: Turn, joint: bool = False) -> Sample:
    return Sample("s", Path("s.png"), SIZE, SIZE, turns, joint=joint)


def apart(count: int) -> list[Turn]:
    return [turn(f"t{k}", strip(2 * k, 2 * k + 2)) for k in range(count)]


def draws(composition: Composition, sample: Sample, count: int = 300) -> list[list[Group]]:
    return [composition.draw(sample, np.random.default_rng(seed)) for seed in range(count)]


def texts(groups: list[Group]) -> list[tuple[str, ...]]:
    return [tuple(turn.instruction for turn in group) for group in groups]


def test_turns_that_stand_as_they_are_come_one_by_one_and_nothing_else_is_drawn():
    turns = [dataclasses.replace(some, form="") for some in apart(5)] + [turn("none", form="")]
    for joint in (True, False):
        for seed in range(20):
            rng, plain = np.random.default_rng(seed), np.random.default_rng(seed)
            groups = Composition().draw(sample_of(*turns, joint=joint), rng)
            assert groups == [(turns[k],) for k in plain.permutation(6)]
            assert rng.random() == plain.random()


def test_joint_samples_are_asked_at_once_every_other_time():
    turns = apart(4) + [turn("why?", strip(0, 3), form="sentence"), turn("x", form="ocr")]
    turns.append(turn("with text", strip(8, 9), answer=("Here: ", ".")))
    turns.append(Turn("two", (PhraseTarget("a"), PhraseTarget("b")), form="phrase"))
    drawn = draws(Composition(pairs=False), sample_of(*turns, joint=True), 1000)
    joint = [groups for groups in drawn if len(groups) < 8]
    assert len(joint) == pytest.approx(500, abs=50)
    orders = set()
    for groups in joint:
        (several,) = [group for group in groups if len(group) > 1]
        assert {some.instruction for some in several} == {"t0", "t1", "t2", "t3"} and len(groups) == 5
        orders.add(tuple(some.instruction for some in several))
    assert len(orders) == 24
    for probability, count in ((0, 2), (1, 1)):
        composition = Composition(joint_probability=probability)
        assert all(len(groups) == count for groups in draws(composition, sample_of(*apart(2), joint=True)))


def test_the_same_words_are_listed_once():
    turns = [turn("Dog", strip(0, 1)), turn("dog", strip(4, 5)), turn("cat", strip(8, 9))]
    for groups in draws(Composition(joint_probability=1), sample_of(*turns, joint=True), 50):
        assert sorted(map(len, groups)) == [1, 2]
        (several,) = [group for group in groups if len(group) == 2]
        assert len({some.instruction.casefold() for some in several}) == 2
    same = turn("dog", strip(0, 1))
    for groups in draws(Composition(), sample_of(same, same, same), 20):
        assert groups == [(same,)] * 3


def test_two_of_three_or_more_are_asked_together_if_they_hardly_overlap():
    drawn = draws(Composition(), sample_of(*apart(4), turn("why?", form="sentence")), 600)
    pairs = Counter()
    for groups in drawn:
        assert sorted(map(len, groups)) == [1, 1, 1, 2]
        pairs[frozenset(next(names for names in texts(groups) if len(names) == 2))] += 1
        assert len({text for names in texts(groups) for text in names}) == 5
    assert len(pairs) == 6 and min(pairs.values()) > 60 and not any("why?" in pair for pair in pairs)
    for few in (sample_of(*apart(2), turn("why?", form="sentence")), sample_of(*apart(2))):
        assert all(len(group) == 1 for groups in draws(Composition(), few, 50) for group in groups)
    assert all(len(groups) == 4 for groups in draws(Composition(pairs=False), sample_of(*apart(4)), 50))


def test_the_overlap_is_that_of_unions():
    a, b = turn("a", strip(0, 5), strip(5, 10)), turn("b", strip(9, 10), strip(10, 19))  # 1 of 19 columns: 0.053
    c, d = turn("c", strip(0, 11)), turn("d", strip(10, 30))  # 1 of 30 columns: 0.033
    found = {frozenset(names) for groups in draws(Composition(), sample_of(a, b, c, d), 400) for names in texts(groups)}
    assert {pair for pair in found if len(pair) == 2} == {frozenset("ad"), frozenset("cd")}


def test_pairs_that_are_never_allowed():
    """All overlap: a few tries, then one by one."""
    turns = [turn(name, strip(0, 10)) for name in "abc"]
    assert all(len(groups) == 3 for groups in draws(Composition(), sample_of(*turns), 50))


def test_no_target():
    nothing = [turn("n0"), turn("n1")]
    plain = Turn("what is it?", answer=("A cat.",))
    whole = sample_of(*apart(1), *nothing, plain)
    assert is_no_target(nothing[0]) and not is_no_target(plain)
    keep = Composition(pairs=False, joint_probability=0)
    assert all(len(groups) == 4 for groups in draws(keep, whole, 20))
    drop = dataclasses.replace(keep, no_target="drop")
    assert all({names[0] for names in texts(g)} == {"t0", "what is it?"} for g in draws(drop, whole, 20))
    assert draws(drop, sample_of(*nothing), 5) == [[]] * 5
    some = draws(dataclasses.replace(keep, no_target=0.25), whole, 1000)
    assert np.mean([len(groups) - 2 for groups in some]) == pytest.approx(0.5, abs=0.06)
    only = [groups for groups in draws(dataclasses.replace(keep, no_target=0.0), sample_of(*nothing), 200)]
    assert Counter(names for groups in only for names in texts(groups)).keys() == {("n0",), ("n1",)}
    assert all(len(groups) == 1 for groups in only)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=9),
    st.integers(1, 6),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 999),
)
def test_limits_hold_and_nothing_that_fits_is_left_out(counts, max_phrases, max_instances, joint, seed):
    mask = strip(0, 1)
    turns = tuple(
        Turn(f"t{k}", tuple(PhraseTarget(f"p{k}-{n}", (mask,) * each) for n in range(number)), form="phrase")
        for k, (number, each) in enumerate(counts)
    )
    composition = Composition(max_phrases=max_phrases, max_instances=max_instances)
    groups = composition.draw(sample_of(*turns, joint=joint), np.random.default_rng(seed))
    asked = [some for group in groups for some in group]
    phrases = sum(len(some.phrases) for some in asked)
    instances = sum(len(phrase.rles) for some in asked for phrase in some.phrases)
    assert phrases <= max_phrases and instances <= max_instances and all(groups)
    for some in turns:
        number, each = counts[int(some.instruction[1:])]
        fits = phrases + number <= max_phrases and instances + number * each <= max_instances
        assert some in asked or not fits
        assert composition.within_limits(some) == (number <= max_phrases and number * each <= max_instances)


def test_what_a_limit_leaves_out_is_seen_in_other_epochs():
    for joint in (True, False):
        drawn = draws(Composition(max_phrases=3), sample_of(*apart(9), joint=joint), 200)
        seen = Counter(text for groups in drawn for names in texts(groups) for text in names)
        assert len(seen) == 9 and sum(seen.values()) == 600 and min(seen.values()) > 30


def test_a_dialogue_keeps_its_order():
    turns = [Turn(f"t{k}", answer=("yes",), kind="conversation") for k in range(4)]
    turns[2] = turn("t2", strip(0, 1), form="", kind="conversation")
    rng = np.random.default_rng(0)
    assert texts(Composition().draw(sample_of(*turns), rng)) == [("t0",), ("t1",), ("t2",), ("t3",)]
    turns[1] = Turn("t1", (PhraseTarget("a"), PhraseTarget("b")), kind="conversation")
    assert texts(Composition(max_phrases=1).draw(sample_of(*turns), rng)) == [("t0",)]


def test_a_dialogue_whose_first_turn_is_too_much_begins_with_the_next():
    first = Turn("t0", (PhraseTarget("a"), PhraseTarget("b")), kind="conversation")
    others = [Turn(f"t{k}", (PhraseTarget("a"),), kind="conversation") for k in (1, 2)]
    drawn = Composition(max_phrases=1).draw(sample_of(first, *others), np.random.default_rng(0))
    assert texts(drawn) == [("t1",)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"joint_probability": 1.5}, "composition.joint_probability=1.5: must be between 0 and 1"),
        ({"joint_probability": "half"}, "composition.joint_probability='half'"),
        ({"pairs": 1}, "composition.pairs=1: must be true or false"),
        ({"no_target": "never"}, "composition.no_target='never': must be keep, drop or a probability"),
        ({"no_target": True}, "composition.no_target=True"),
        ({"no_target": float("nan")}, "composition.no_target=nan"),
        ({"max_phrases": 0}, "composition.max_phrases=0: must be a whole number of at least 1, or null"),
        ({"max_instances": 2.5}, "composition.max_instances=2.5"),
        ({"max_masks": 3}, "composition: unknown max_masks; known are joint_probability, pairs"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Composition.from_mapping(values)
