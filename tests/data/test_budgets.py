"""Micro batches by budget: none beyond it, none that could have been fuller, a plan that depends on nothing else."""

from __future__ import annotations

import logging
from functools import partial
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.data.budgets import Budgets, Plan
from instructsam.data.samplers import DistributedBatchSampler


def random_sizes(length: int, most: int, epoch: int) -> np.ndarray:
    """Not whole numbers, as estimates are."""
    return np.random.default_rng([length, most, epoch]).uniform(0, most, length)


def planned(budgets: Budgets, length: int, epoch: int = 0, seed: int = 0, group_by: np.ndarray | None = None) -> Plan:
    return budgets.plan(np.random.default_rng([seed, epoch]), length, epoch, group_by)


def batches_of(plan: Plan) -> list[np.ndarray]:
    return np.split(plan.order, plan.ends[:-1])


@given(
    st.integers(1, 300),
    st.none() | st.integers(1, 100),
    st.none() | st.integers(1, 30),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=120)
def test_budgets_are_held_and_used(length, most_tokens, most_phrases, grouped, epoch):
    if most_tokens is None and most_phrases is None:
        most_tokens = 20
    sizes = partial(random_sizes, length, 25), partial(random_sizes, length, 9)
    tokens, phrases = (np.ceil(size(epoch)) for size in sizes)
    budgets = Budgets(most_tokens, most_phrases, *sizes)
    plan = planned(budgets, length, epoch, group_by=tokens if grouped else None)
    assert sorted(plan.order.tolist()) == list(range(length)) and plan.ends[-1] == length
    assert (np.diff(plan.ends, prepend=0) > 0).all()

    def fits(rows: np.ndarray) -> bool:
        padded = tokens[rows].max() * len(rows)
        return padded <= (most_tokens or np.inf) and phrases[rows].sum() <= (most_phrases or np.inf)

    batches = batches_of(plan)
    beyond = [rows for rows in batches if not fits(rows)]
    assert all(len(rows) == 1 for rows in beyond)
    assert plan.oversized == len(beyond) == sum(not fits(np.array([row])) for row in range(length))
    if not grouped:  # in the order of the permutation, each batch is as full as it gets
        assert all(not fits(np.append(rows, after[0])) for rows, after in zip(batches, batches[1:], strict=False))


@given(st.integers(1, 100), st.integers(1, 60), st.integers(0, 9), st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_plan_is_a_function_of_seed_epoch_sizes_and_budgets(length, budget, seed, epoch, grouped):
    """The sampler's split has no part in it."""
    sizes = partial(random_sizes, length, 25)
    expected = planned(Budgets(budget, None, sizes), length, epoch, seed, sizes(epoch) if grouped else None)
    for world, accumulation in ((1, 1), (3, 2)):
        sampler = DistributedBatchSampler(
            length,
            None,
            world,
            world - 1,
            accumulation,
            seed,
            group_by=sizes if grouped else None,
            budgets=Budgets(budget, None, sizes),
        )
        np.testing.assert_array_equal(sampler.plan(epoch).order, expected.order)
        np.testing.assert_array_equal(sampler.plan(epoch).ends, expected.ends)


def test_seeds_and_epochs_differ():
    budgets = Budgets(100, None, lambda epoch: np.arange(1.0, 51))
    orders = [planned(budgets, 50, epoch, seed).order.tolist() for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert orders[0] == planned(budgets, 50).order.tolist()


def test_grouping_saves_padding_and_keeps_batches_in_random_order():
    length = 6000
    tokens = np.random.default_rng(1).lognormal(5, 0.6, length)
    budgets = Budgets(3000, 200, lambda epoch: tokens, lambda epoch: np.ones(length))

    def padding(plan: Plan) -> float:
        return 1 - tokens.sum() / sum(tokens[rows].max() * len(rows) for rows in batches_of(plan))

    plain, grouped = planned(budgets, length), planned(budgets, length, group_by=tokens)
    assert padding(plain) > 0.3 and padding(grouped) < 0.07
    assert len(grouped.ends) < 0.8 * len(plain.ends)
    assert max(tokens[rows].max() / tokens[rows].min() for rows in batches_of(grouped)) < 5
    means = np.array([tokens[rows].mean() for rows in batches_of(grouped)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    again = planned(budgets, length, epoch=1, group_by=tokens)
    together = [
        {frozenset(pair) for rows in batches_of(plan) for pair in zip(rows, rows[1:], strict=False)}
        for plan in (grouped, again)
    ]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


def test_samples_beyond_a_budget_are_told_once(caplog):
    budgets = Budgets(10, 5, lambda epoch: np.array([3.0, 10.5, 3.0]), lambda epoch: np.array([1.0, 1.0, 6.0]))
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            sampler = DistributedBatchSampler(3, None, 2, rank, budgets=budgets)
            assert [len(batch) for batch in islice(sampler, 9)] == [1] * 9
    (message,) = caplog.messages
    assert message.startswith("2 of 3 samples are beyond tokens_per_batch=10 or phrases_per_batch=5 by themselves")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "give tokens_per_batch, phrases_per_batch or both"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a whole number of at least 1, or null, got 0"),
        ({"tokens_per_batch": 1.5}, "got 1.5"),
        ({"phrases_per_batch": True}, "phrases_per_batch must be a whole number"),
        ({"phrases_per_batch": 5}, "phrases_per_batch=5 needs the sizes of samples"),
    ],
)
def test_nonsense_is_an_error(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Budgets(**{"num_tokens": np.ones, **arguments})


def test_sizes_that_are_none_are_errors():
    with pytest.raises(ValueError, match="sizes for a budget must hold one finite number for each of the 4 samples"):
        planned(Budgets(5, None, np.ones), 4, epoch=3)
