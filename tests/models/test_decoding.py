"""Decoding equals a single forward, and a batch equals its rows one by one (DESIGN section 7)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from double_precision import CLOSE, difference, doubled, float64
from golden_fixtures import GOLDEN_ROOT
from golden_model import load_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructsam.models.attention_mask import VARIANTS
from instructsam.models.decoding import DecodedAnswer, decode, greedy
from instructsam.models.decoding_rules import RULES


def close(actual, expected):
    assert difference(actual, expected) < CLOSE


@pytest.fixture(scope="module")
def tiny():
    model, meta, tensors = load_golden(GOLDEN_ROOT / "a")
    with float64():
        yield model.double(), meta, doubled(tensors)


def earlier_turn(meta) -> list[int]:
    """A turn that was answered with two phrases, as tokens up to the next assistant's header."""
    ids, num_queries = meta["tokens"], meta["num_queries"]
    block = [ids["mask_start"], *[ids["seg"]] * num_queries, ids["mask_end"]]
    said = [token for word in (20, 30) for token in (ids["ref_start"], word, ids["ref_end"], *block)]
    return [50, ids["eos"], 40, *said, ids["eos"], 60, 70]


def prompts(tensors, meta, seed: int, history: bool = False):
    """Two prompts of different length about the fixture's two images (the second gets a random number of words)."""
    ids = meta["tokens"]
    generator = torch.Generator().manual_seed(seed)
    starts = [(row != -100).nonzero()[0].item() for row in tensors["labels"]]
    # The fixture's prompts lack the end of the user's turn, by which rules know where the prompt ends.
    rows = [torch.cat([tensors["input_ids"][b, : starts[b]], torch.tensor([ids["eos"], 40])]) for b in range(2)]
    if history:  # of one row only, so that blocks of the two do not start at the same number
        rows[0] = torch.cat([rows[0], torch.tensor([*earlier_turn(meta), ids["eos"], 40])])
    extra = torch.randint(10, 200, (int(torch.randint(0, 5, (1,), generator=generator)),), generator=generator)
    rows[1] = torch.cat([rows[1], extra])
    length = max(map(len, rows))
    input_ids = torch.full((2, length), ids["pad"])
    for b, row in enumerate(rows):
        input_ids[b, : len(row)] = row
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    return input_ids, mask


def scripted(meta, seed: int, rows: list[int]):
    """A chooser that writes random answers: words, phrases of random length, broken markup, an early end for some."""
    ids = meta["tokens"]
    plans = []
    for row in rows:
        generator = torch.Generator().manual_seed(1000 * seed + row)

        def draw(low, high, generator=generator):
            return int(torch.randint(low, high, (1,), generator=generator))

        plan = []
        for _ in range(draw(0, 4)):
            plan += [draw(10, 200) for _ in range(draw(0, 3))]
            plan += [ids["ref_start"], *[draw(10, 200) for _ in range(draw(0, 4))], ids["ref_end"]]
        if draw(0, 4) == 0:
            plan.append(ids["ref_end"])
        plans.append([*plan, ids["eos"]])

    def choose(step, logits):
        assert torch.isneginf(logits[:, ids["seg"]]).all(), "a query token must never be written as text"
        return torch.tensor([plan[min(step, len(plan) - 1)] for plan in plans])

    return choose


def run(model, tensors, meta, seed, rows, rule="trained", history=False):
    input_ids, mask = prompts(tensors, meta, seed, history)
    grid = tensors["image_grid_thw"]
    patches = tensors["pixel_values"].split(grid.prod(-1).tolist())
    input_ids, mask = input_ids[rows], mask[rows]
    length = int(mask.sum(-1).max())
    pixel_values = torch.cat([patches[row] for row in rows])
    decoded = decode(
        model,
        input_ids[:, :length],
        mask[:, :length],
        pixel_values,
        grid[rows],
        choose=scripted(meta, seed, rows),
        rule=rule,
    )
    return decoded, pixel_values, grid[rows]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000), history=st.booleans())
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_decoding_equals_teacher_forcing(tiny, variant, seed, history):
    """With an earlier answer before it too, whose query blocks are blocks of their own."""
    model, meta, tensors = tiny
    model.config.attention_variant = variant
    decoded, pixel_values, grid = run(model, tensors, meta, seed, [0, 1], history=history)
    forced = model.run_language_model(decoded.input_ids, decoded.attention_mask, pixel_values, grid)
    valid = decoded.attention_mask
    close(decoded.language.hidden_BLC[valid], forced.hidden_BLC[valid])
    assert torch.equal(decoded.language.phrases.queries, forced.phrases.queries)
    if len(forced.phrases):
        features = model.detector.encode_image(tensors["detector_pixel_values"])
        ours = model.detect(features, model.bridge(decoded.input_ids, decoded.language))
        theirs = model.detect(features, model.bridge(decoded.input_ids, forced))
        close(ours.pred_masks, theirs.pred_masks)
        close(ours.pred_logits, theirs.pred_logits)


def released_by_hand(row, ids, num_queries):
    """Position and block of every token of a row under the released rule, spelt out token by token."""
    positions, blocks, found = list(range(len(row))), [-1] * len(row), 0
    for k, token in enumerate(row):
        if token == ids["ref_end"] and k + 1 < len(row) and row[k + 1] == ids["mask_start"]:
            appended = range(k, k + num_queries + 3)
            assert row[appended[-1]] == ids["mask_end"]
            for j in appended:
                positions[j] = j + 1
            for j in appended[2:]:  # the queries and <|mask_end|>
                blocks[j] = found
            found += 1
    return positions, blocks


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_released_decoding_equals_one_forward(tiny, variant, seed):
    model, meta, tensors = tiny
    model.config.attention_variant = variant
    decoded, pixel_values, grid = run(model, tensors, meta, seed, [0, 1], "released")
    valid = decoded.attention_mask
    positions, blocks = torch.zeros_like(decoded.input_ids), torch.full_like(decoded.input_ids, -1)
    for b, row in enumerate(decoded.input_ids):
        by_hand = released_by_hand(row[valid[b]].tolist(), meta["tokens"], meta["num_queries"])
        positions[b, valid[b]], blocks[b, valid[b]] = map(torch.tensor, by_hand)
    forced = model.run_language_model(
        decoded.input_ids,
        valid,
        pixel_values,
        grid,
        position_ids=positions.expand(3, -1, -1),
        layout=replace(model.layout(decoded.input_ids, valid), block=blocks),
    )
    close(decoded.language.hidden_BLC[valid], forced.hidden_BLC[valid])
    single = RULES["released"].run_language_model(model, decoded.input_ids, valid, pixel_values, grid)
    close(single.hidden_BLC[valid], forced.hidden_BLC[valid])
    ours, theirs = decoded.language.phrases, forced.phrases
    assert torch.equal(ours.queries, theirs.queries) and torch.equal(single.phrases.tokens, ours.tokens)
    for tokens, mask, inner, inner_mask in zip(ours.tokens, ours.mask, theirs.tokens, theirs.mask, strict=True):
        first, last = int(inner[0]) - 1, int(inner[inner_mask][-1]) + 1
        assert tokens[mask].tolist() == list(range(first, last + 1))


def test_the_markers_count_to_the_limit_of_a_phrase(tiny):
    model, meta, _ = tiny
    ids = meta["tokens"]
    block = [ids["mask_start"], *[ids["seg"]] * meta["num_queries"], ids["mask_end"]]
    row = torch.tensor([[7, ids["ref_start"], *[20] * 40, ids["ref_end"], *block]])
    limit = model.config.max_phrase_tokens
    for name, first in (("trained", 2), ("released", 1)):
        phrases = RULES[name].phrases(row, model.config)
        assert phrases.tokens[0, phrases.mask[0]].tolist() == list(range(first, first + limit))


def test_a_query_block_needs_a_phrase_of_at_least_one_token(tiny):
    """An empty phrase is refused, and markers missing or in wrong order."""
    model, meta, _ = tiny
    ids = meta["tokens"]
    start, end, word = ids["ref_start"], ids["ref_end"], 20
    block = [ids["mask_start"], *[ids["seg"]] * meta["num_queries"], ids["mask_end"]]
    good = [start, word, end, *block, word]
    for rule in RULES.values():
        for said in ([word, start, end], [start, word, word], [word, word, end], [end, word, start], [word] * 3):
            with pytest.raises(ValueError, match="batch row 1: a query block without a phrase"):
                rule.phrases(torch.tensor([good, [*said, *block, word]]), model.config)
            with pytest.raises(ValueError, match="batch row 0: a query block without a phrase"):
                rule.phrases(torch.tensor([[*said, *block, word], good]), model.config)
        phrases = rule.phrases(torch.tensor([good, [word, start, word, end, *block]]), model.config)
        first, last = (0, 2) if rule.marked_phrases else (1, 1)
        assert bool(phrases.mask.all())
        assert phrases.tokens.tolist() == [list(range(first + row, last + row + 1)) for row in range(2)]


def test_unknown_rule(tiny):
    model, meta, tensors = tiny
    input_ids, mask = prompts(tensors, meta, 0)
    with pytest.raises(ValueError, match="decoding='publishd' is not one of trained, released"):
        decode(model, input_ids, mask, tensors["pixel_values"], tensors["image_grid_thw"], rule="publishd")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_a_batch_equals_its_rows(tiny, variant, rule, seed):
    model, meta, tensors = tiny
    model.config.attention_variant = variant
    together, _, _ = run(model, tensors, meta, seed, [0, 1], rule)
    for row in (0, 1):
        alone, _, _ = run(model, tensors, meta, seed, [row], rule)
        valid = together.attention_mask[row]
        assert torch.equal(together.input_ids[row, valid], alone.input_ids[0, alone.attention_mask[0]])
        close(together.language.hidden_BLC[row, valid], alone.language.hidden_BLC[0, alone.attention_mask[0]])


@pytest.fixture
def asked(tiny):
    """What `decode` takes of two prompts, and the ids of tokens."""
    model, meta, tensors = tiny
    model.config.attention_variant = "hybrid"
    return (model, *prompts(tensors, meta, 0), tensors["pixel_values"], tensors["image_grid_thw"]), meta["tokens"]


def answers(decoded: DecodedAnswer) -> list[list[int]]:
    rows = zip(decoded.input_ids, decoded.attention_mask, decoded.answer_start.tolist(), strict=True)
    return [ids[mask][start:].tolist() for ids, mask, start in rows]


@torch.no_grad()
def test_greedy_decoding_stops_at_the_limits(asked):
    args, ids = asked

    def only_phrases(step, logits):
        wanted = [ids["ref_start"], 20, ids["ref_end"]][step % 3]
        return torch.where(torch.isneginf(logits[:, wanted]), ids["eos"], wanted)

    decoded = decode(*args, max_new_tokens=30, max_phrases=2, choose=only_phrases)
    assert len(decoded.language.phrases) == 4
    assert bool(decoded.finished.all())
    cut = decode(*args, max_new_tokens=4, choose=only_phrases)
    assert not bool(cut.finished.any())
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        decode(*args, max_new_tokens=0)


@torch.no_grad()
def test_as_many_tokens_are_written_as_the_limit_says(asked):
    """Queries do not count; only with room for its end is a row finished."""
    args, ids = asked
    block = [ids["mask_start"], *[ids["seg"]] * args[0].config.num_queries, ids["mask_end"]]
    phrase = [ids["ref_start"], 20, ids["ref_end"]]
    plans = [[*phrase, 30, 31], [40, 41, 42, 43, 44]]  # then both end

    def choose(step, logits):
        return torch.tensor([plan[step] if step < len(plan) else ids["eos"] for plan in plans])

    for limit in range(1, 7):
        decoded = decode(*args, max_new_tokens=limit, choose=choose)
        with_block = [*phrase, *block, *plans[0][3:limit]] if limit >= 3 else phrase[:limit]
        assert answers(decoded) == [with_block, plans[1][:limit]]
        assert decoded.finished.tolist() == [limit > len(plan) for plan in plans]


@torch.no_grad()
def test_markup_that_is_not_the_models_to_write_is_never_written(asked, monkeypatch):
    """Each in turn is the most probable; the second best is taken."""
    args, ids = asked
    model, ids, word = args[0], {**ids, "region": 311}, 20
    monkeypatch.setitem(model.config.token_ids, "region", 311)
    names = ("seg", "mask_start", "mask_end", "region", "pad", "image", "video", "vstart", "vend")
    wanted = iter([ids[name] for name in names])

    def lm_logits(hidden):
        logits = torch.zeros(len(hidden), model.config.vlm_config.text_config.vocab_size)
        logits[:, word], logits[:, next(wanted, 0)] = 1.0, 2.0
        return logits

    def choose(step, logits):
        chosen = greedy(step, logits)
        assert chosen.tolist() == [word, word], names[step]
        return chosen

    monkeypatch.setattr(model, "lm_logits", lm_logits)
    decoded = decode(*args, max_new_tokens=len(names), choose=choose)
    assert answers(decoded) == [[word] * len(names)] * 2


@torch.no_grad()
def test_independent_turns_equal_single_turns(tiny):
    """Turns that share an image in one sequence give the hidden states of each turn on its own."""
    model, meta, tensors = tiny
    model.config.attention_variant = "hybrid"
    ids = meta["tokens"]
    n = meta["num_queries"]
    start = int((tensors["labels"][0] != -100).nonzero()[0])
    image_end = int((tensors["input_ids"][0] == ids["vend"]).nonzero()[0]) + 1
    prefix = tensors["input_ids"][0, :image_end]
    block = [ids["mask_start"], *[ids["seg"]] * n, ids["mask_end"]]
    turns = [
        torch.tensor([30, 31, ids["eos"], 40, ids["ref_start"], 50, ids["ref_end"], *block, ids["eos"]]),
        torch.tensor([32, ids["eos"], 40, ids["ref_start"], 51, 52, ids["ref_end"], *block, ids["eos"]]),
    ]
    packed = torch.cat([prefix, *turns])[None]
    turn_ids = torch.cat([torch.zeros(len(prefix))] + [torch.full((len(t),), k + 1.0) for k, t in enumerate(turns)])
    patches = int(tensors["image_grid_thw"][0].prod())
    vision = (tensors["pixel_values"][:patches], tensors["image_grid_thw"][:1])
    ones = torch.ones_like(packed, dtype=torch.bool)
    together = model.run_language_model(packed, ones, *vision, turn_ids=turn_ids.long()[None])
    offset = len(prefix)
    for turn in turns:
        single = torch.cat([prefix, turn])[None]
        alone = model.run_language_model(single, torch.ones_like(single, dtype=torch.bool), *vision)
        close(together.hidden_BLC[0, offset : offset + len(turn)], alone.hidden_BLC[0, len(prefix) :])
        offset += len(turn)
    assert start > image_end
