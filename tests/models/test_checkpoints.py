"""Parts of one checkpoint taken into another model."""

from __future__ import annotations

import pytest
import torch
from tiny_fixtures import settings_of

from instructsam.models.bridge import QueryBank
from instructsam.models.checkpoints import take_modules
from instructsam.models.factory import build_model
from instructsam.models.layouts import FIRST_ROWS


def tiny(world, *overrides: str, seed: int = 1):
    return build_model(settings_of("train", f"data.root={world}", *overrides)["model"], seed)[0]


def test_modules_are_taken_whole_and_others_left(world, checkpoint):
    model = tiny(world)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert take_modules(model, checkpoint, ["detector", "phrase_projector"]) == []
    moved = {key.split(".")[0] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {"detector", "phrase_projector"}


@pytest.mark.parametrize("num_queries", [2, 9])
def test_another_number_of_queries_takes_the_first_rows(world, checkpoint, num_queries):
    source = tiny(world, seed=0).state_dict()  # as the fixture's
    model = tiny(world, f"model.config.num_queries={num_queries}")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    notes = take_modules(model, checkpoint, ["detector"])
    assert len(notes) == len(FIRST_ROWS) and all(f"the first {num_queries} rows" in note for note in notes)
    after = model.state_dict()
    for key in FIRST_ROWS:
        common = min(num_queries, len(source[key]))
        assert torch.equal(after[key][:common], source[key][:common])
        assert torch.equal(after[key][common:], before[key][common:])
    assert all(torch.equal(after[k], source[k]) for k in after if k.startswith("detector.") and k not in FIRST_ROWS)


@pytest.mark.slow
def test_what_does_not_fit_is_named(world, checkpoint):
    with pytest.raises(ValueError, match="no module 'head'"):
        take_modules(tiny(world), checkpoint, ["head"])
    with pytest.raises(ValueError, match="'query_bank' does not fit"):
        take_modules(tiny(world, "model.config.num_queries=2"), checkpoint, ["query_bank"])


def test_a_new_query_bank_has_the_spread_that_was_asked_for():
    banks = {std: QueryBank(3, 8) for std in (1.0, 0.02)}
    for std, bank in banks.items():
        torch.manual_seed(0)
        bank.initialise("normal", std, None)
    torch.testing.assert_close(banks[0.02].weight, 0.02 * banks[1.0].weight)
    assert banks[1.0].weight.std() > 0
    banks[1.0].initialise("zeros", 1.0, None)
    assert not banks[1.0].weight.any()
