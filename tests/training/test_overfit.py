"""debug=overfit: the real command learns four scenes by heart, far enough in few steps; and what it says of itself."""

from __future__ import annotations

import json

import forked
import pytest
from tiny_fixtures import settings_of

from instructsam.training.overfit import verdict


def losses(*values: float) -> list[dict[str, float]]:
    return [{"loss": value} for value in values]


def test_verdict():
    good = verdict(losses(70.0, 30.0, 1.0, 0.2), {"AP50": 1.0})
    assert (
        "the loss went from 70 to 0.2, AP50 of the samples it trained on is 1.000" in good and "as it should be" in good
    )
    for bad in (
        verdict(losses(70.0, 30.0, 2.0), {"AP50": 1.0}),  # too high a loss
        verdict(losses(70.0, 0.2), {"AP50": 0.98}),
        verdict(losses(70.0, 0.2), {}),
        verdict(losses(float("nan"), float("nan")), {"AP50": 1.0}),
    ):
        assert "something does not learn" in bad and "as it should be" not in bad
    # Some steps at either end, so that one lucky step decides nothing.
    wavy = losses(*[70.0] * 50, *[5.0, 0.1] * 25)
    assert "went from 70 to 2.55" in verdict(wavy, {"AP50": 1.0})


def test_it_is_evaluated_on_what_it_trains_on():
    settings = settings_of("train", "debug=overfit")
    assert settings["evaluation"]["data"] == "train" and settings["evaluation"]["num_instructions"] is None
    assert settings["data"]["limit"] == 4 == settings["trainer"]["per_device_batch_size"]
    assert settings["trainer"]["max_steps"] % settings["trainer"]["eval_every"] == 0
    assert settings["model"]["init"] == [] and settings["objective"]["name"] == "instruct"


@pytest.mark.slow
def test_the_command_learns_its_scenes(world, tmp_path):
    """In 200 of the 400 steps: the loss falls to a 20th, the words are right, and masks are found.

    After 160 it was 2.6 or 3.0, by the processor's way of adding up, of 2.8 allowed.
    """
    command = ["-m", "instructsam.train", "debug=overfit", f"data.root={world}", f"output_dir={tmp_path}/run"]
    command += ["trainer.max_steps=200", "trainer.eval_every=200", "trainer.progress_bar=false"]
    done = forked.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overfit: the loss went from" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert len(records) == 200
    end = records[-10:]
    assert sum(r["loss"] for r in end) / 10 < records[0]["loss"] / 20
    assert all(r["terms"]["language"] < 0.05 for r in end)
    (evaluation,) = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert evaluation["metrics"]["phrase_accuracy"] == 1.0 and evaluation["metrics"]["AP50"] > 0.3
