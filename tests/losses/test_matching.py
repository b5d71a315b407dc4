"""Matching: the cost against naive loops, the assignment against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from double_precision import float64
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.losses import matching
from instructsam.losses.matching import assign, mask_sums, match, matching_cost

quick = settings(deadline=None, max_examples=40)


def scene(seed=0, phrases=3, queries=4, truths=3, height=6, width=7, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    pred_masks = torch.randn(phrases, queries, height, width, generator=generator) * scale
    pred_logits = torch.randn(phrases, queries, generator=generator)
    target_masks = torch.rand(phrases, truths, height, width, generator=generator) > 0.6
    return pred_masks, pred_logits, target_masks, torch.ones(phrases, truths, dtype=torch.bool)


def test_cost_equals_naive_loops():
    pred_masks, pred_logits, target_masks, _ = scene()
    cost = matching_cost(mask_sums(pred_masks, target_masks), pred_logits)
    for p, n, g in itertools.product(range(3), range(4), range(3)):
        logit, truth = pred_masks[p, n].double(), target_masks[p, g].double()
        prob = logit.sigmoid()
        dice = 1 - (2 * (prob * truth).sum() + 1e-3) / (prob.sum() + truth.sum() + 1e-3)
        bce = -(truth * prob.log() + (1 - truth) * (1 - prob).log()).mean()
        naive = 0.5 * dice + 2.0 * bce + F.softplus(-pred_logits[p, n].double())
        assert cost[p, n, g].item() == pytest.approx(naive.item(), rel=1e-5)


def test_cost_survives_extreme_logits_and_stays_exact_for_bf16():
    pred_masks, pred_logits, target_masks, _ = scene(scale=500.0)
    coarse = pred_masks.bfloat16()
    cost = matching_cost(mask_sums(coarse, target_masks), pred_logits.bfloat16())
    assert cost.dtype == torch.float32 and cost.isfinite().all()
    truth = target_masks[0, 1].float()
    bce = F.binary_cross_entropy_with_logits(coarse[0, 2].float(), truth)
    assert mask_sums(coarse, target_masks).bce[0, 2, 1].item() == pytest.approx(bce.item(), rel=1e-5)


def test_cross_entropy_of_confident_logits_keeps_its_digits():
    truth = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    logits = torch.where(truth, 11.0, -12.0)
    expected = F.binary_cross_entropy_with_logits(logits.double(), truth.double())
    assert mask_sums(logits, truth).bce.item() == pytest.approx(expected.item(), rel=1e-5)


@float64()
def test_chunks_of_phrases_do_not_matter(monkeypatch):
    pred_masks, _, target_masks, _ = scene(phrases=5)
    whole = mask_sums(pred_masks, target_masks)
    monkeypatch.setitem(matching.CHUNK_LOGITS, "cpu", 2 * 4 * 6 * 7)
    parts = mask_sums(pred_masks, target_masks)
    for name in ("overlap", "area", "bce"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_autocast_does_not_lower_the_precision_of_the_cost():
    pred_masks, pred_logits, target_masks, _ = scene(height=32, width=32)
    outside = matching_cost(mask_sums(pred_masks, target_masks), pred_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = matching_cost(mask_sums(pred_masks, target_masks), pred_logits)
    assert torch.equal(outside, inside)


@quick
@given(seed=st.integers(0, 10_000), queries=st.integers(1, 5), truths=st.integers(0, 4))
def test_assignment_is_the_cheapest_of_all(seed, queries, truths):
    truths = min(truths, queries)
    cost = torch.randn(2, queries, truths, generator=torch.Generator().manual_seed(seed))
    (matches,) = assign([cost], torch.ones(2, truths, dtype=torch.bool))
    for phrase in range(2):
        mine = matches.phrase_M == phrase
        rows, columns = matches.query_M[mine], matches.target_M[mine]
        assert sorted(columns.tolist()) == list(range(truths))
        assert len(set(rows.tolist())) == truths
        best = min(
            sum(cost[phrase, row, column].item() for column, row in enumerate(order))
            for order in itertools.permutations(range(queries), truths)
        )
        assert cost[phrase, rows, columns].sum().item() == pytest.approx(best, abs=1e-5)


@float64()
@quick
@given(seed=st.integers(0, 10_000), queries=st.permutations(range(4)), truths=st.permutations(range(3)))
def test_permuting_queries_and_targets_permutes_the_matching(seed, queries, truths):
    pred_masks, pred_logits, target_masks, valid = scene(seed)
    plain = match(pred_masks, pred_logits, target_masks, valid)
    moved = match(pred_masks[:, queries], pred_logits[:, queries], target_masks[:, truths], valid)
    pairs = set(zip(*(index.tolist() for index in plain), strict=True))
    back = {(p, queries[n], truths[g]) for p, n, g in zip(*(index.tolist() for index in moved), strict=True)}
    assert pairs == back


@float64()
def test_padding_between_and_after_targets_changes_nothing():
    pred_masks, pred_logits, target_masks, valid = scene()
    plain = match(pred_masks, pred_logits, target_masks, valid)
    padded = torch.ones(3, 7, 6, 7, dtype=torch.bool)
    where = [1, 2, 5]
    padded[:, where] = target_masks
    padded_valid = torch.zeros(3, 7, dtype=torch.bool)
    padded_valid[:, where] = True
    moved = match(pred_masks, pred_logits, padded, padded_valid)
    assert torch.equal(moved.phrase_M, plain.phrase_M) and torch.equal(moved.query_M, plain.query_M)
    assert torch.equal(moved.target_M, torch.tensor(where)[plain.target_M])


def test_several_layers_in_one_transfer_equal_each_alone():
    _, _, target_masks, valid = scene()
    valid[1] = False
    costs = [matching_cost(mask_sums(*scene(seed)[::2]), scene(seed)[1]) for seed in (1, 2, 3)]
    together = assign(costs, valid)
    for cost, matches in zip(costs, together, strict=True):
        (alone,) = assign([cost], valid)
        assert all(torch.equal(a, b) for a, b in zip(matches, alone, strict=True))
        assert 1 not in matches.phrase_M.tolist()


@pytest.mark.parametrize(("phrases", "truths"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_match(phrases, truths):
    matches = match(*scene(phrases=phrases, truths=truths))
    assert [index.shape for index in matches] == [(0,)] * 3
    assert all(index.dtype == torch.int64 for index in matches)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_cost_names_the_phrase(bad):
    pred_masks, pred_logits, target_masks, valid = scene()
    pred_masks[2, 1, 0, 0] = bad
    with pytest.raises(ValueError, match="phrase 2"):
        match(pred_masks, pred_logits, target_masks, valid)


def test_non_finite_cost_of_padding_is_no_error():
    cost = torch.zeros(1, 3, 2)
    cost[..., 1] = float("nan")
    (matches,) = assign([cost], torch.tensor([[True, False]]))
    assert matches.target_M.tolist() == [0]


def test_more_targets_than_queries_is_an_error_only_when_they_are_valid():
    pred_masks, pred_logits, target_masks, valid = scene(queries=2, truths=3)
    with pytest.raises(ValueError, match="phrase 0 .* 3 ground-truth masks .* 2 queries"):
        match(pred_masks, pred_logits, target_masks, valid)
    valid[:, 0] = False
    assert match(pred_masks, pred_logits, target_masks, valid).target_M.shape == (6,)
