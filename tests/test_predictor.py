"""The predictor's choices: decoding rule, precision, device; the commands that pass them on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from double_precision import CLOSE, difference, float64
from tiny_fixtures import settings_of

from instructsam import predictor as predictor_module
from instructsam.evaluate import evaluate
from instructsam.models.checkpoints import fresh_model
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.decoding import decode
from instructsam.models.decoding_rules import RULES
from instructsam.models.detector import DetectorOutput
from instructsam.models.placement import cast_parameters
from instructsam.models.stages import Detection
from instructsam.predictor import Predictor
from instructsam.processing.chat import ChatTurn
from instructsam.structures import Prediction

PHRASES = [["red circles"], ["stars", "large blue squares"]]
INSTRUCTIONS = ["the red circles", "stars and large blue squares"]


@pytest.fixture(scope="module")
def images(world) -> list[Path]:
    return sorted((world / "val" / "images").glob("*.png"))[:2]


def write(monkeypatch, predictor: Predictor, phrases) -> list[str]:
    """Let the model write these phrases of every row (of every batch alike), whatever it would choose itself.

    Returns the names of the rules of all later calls.
    """
    chat = predictor.processor.chat
    appended = {chat.token_ids[name] for name in ("mask_start", "seg", "mask_end")}
    answers = [[token for token in chat.answer(row) if token not in appended] for row in phrases]
    eos = chat.token_ids["eos"]

    def choose(step, logits):
        rows = [answers[k % len(answers)] for k in range(len(logits))]
        return torch.tensor([row[step] if step < len(row) else eos for row in rows])

    used: list[str] = []

    def scripted(*args, rule, **options):
        used.append(rule.name)
        return decode(*args, rule=rule, choose=choose, **options)

    monkeypatch.setattr(predictor_module, "decode", scripted)
    return used


def given_phrases(predictor: Predictor, images) -> list[Prediction]:
    return predictor.detect(predictor.understand(images, INSTRUCTIONS, PHRASES), 0.0)


def all_scores(predictions) -> list[list[float]]:
    return [[instance.score for instance in prediction.instances] for prediction in predictions]


@pytest.mark.parametrize("decoding", RULES)
@float64()
def test_given_phrases_equal_written_ones(decoding, checkpoint, images, monkeypatch):
    predictor = Predictor.from_pretrained(checkpoint, decoding=decoding)
    given = predictor.understand(images, INSTRUCTIONS, PHRASES)
    write(monkeypatch, predictor, PHRASES)
    written = predictor.understand(images, INSTRUCTIONS, [None, None])
    assert given.phrases == written.phrases == PHRASES
    assert given.answers == written.answers
    for name in ("queries_PNC", "phrase_features_PTC"):
        assert difference(getattr(given.bridge, name), getattr(written.bridge, name)) < CLOSE, name
    assert torch.equal(given.bridge.phrase_mask_PT, written.bridge.phrase_mask_PT)
    for one, other in zip(predictor.detect(given, 0.0), predictor.detect(written, 0.0), strict=True):
        assert [i.score for i in one.instances] == pytest.approx([i.score for i in other.instances], rel=CLOSE)
        assert [i.rle for i in one.instances] == [i.rle for i in other.instances]


@pytest.mark.slow
@float64()
def test_a_batch_equals_one_by_one(checkpoint, images):
    predictor = Predictor.from_pretrained(checkpoint, max_new_tokens=5)
    written = predictor.segment(images, INSTRUCTIONS)
    for k, together in enumerate(given_phrases(predictor, images)):
        alone = predictor.detect(
            predictor.understand(images[k : k + 1], INSTRUCTIONS[k : k + 1], PHRASES[k : k + 1]), 0
        )[0]
        assert len(alone.instances) == len(together.instances) > 0
        for one, other in zip(alone.instances, together.instances, strict=True):
            assert one.phrase == other.phrase and one.score == pytest.approx(other.score, rel=CLOSE)
            assert one.rle == other.rle
        assert predictor.segment(images[k : k + 1], INSTRUCTIONS[k : k + 1])[0].answer == written[k].answer


def test_limits_are_the_predictors_own_unless_given(checkpoint, images, monkeypatch):
    predictor = Predictor.from_pretrained(checkpoint, max_new_tokens=1)
    write(monkeypatch, predictor, PHRASES)
    assert predictor.understand(images, INSTRUCTIONS, [None, None]).finished == [False, False]
    encoded, turns = predictor.encode_images(images), [[ChatTurn(text, None)] for text in INSTRUCTIONS]
    assert predictor.answer(encoded, [0, 1], turns, max_new_tokens=64).finished == [True, True]
    assert not predictor.segment(images[:1], INSTRUCTIONS[:1])[0].meta["finished"]


def test_scores_are_the_class_times_the_presence(checkpoint):
    """In float32, each phrase with its own; the threshold is for the product."""
    predictor = Predictor.from_pretrained(checkpoint)
    logits = torch.tensor([[0.0, 2.0], [-1.0, 0.5], [0.0, 3.0]], dtype=torch.bfloat16)  # all of them exact
    presence = torch.tensor([[0.0], [1.5], [-2.0]], dtype=torch.bfloat16)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 2, 4)
    output = DetectorOutput(torch.ones(3, 2, 4, 4), logits, boxes, presence)
    detection = Detection(["", "", ""], [["a"], [], ["b", "c"]], [(4, 4)] * 3, [True] * 3, output)
    products = (logits.double().sigmoid() * presence.double().sigmoid()).sort(descending=True).values
    first, nothing, last = all_scores(predictor.finish(detection, 0.0))
    # Two sigmoids and a product in float32: a few roundings of 1.2e-7 each.
    assert first == pytest.approx(products[0].tolist(), rel=2e-6)
    assert last == pytest.approx(products[1:].flatten().tolist(), rel=2e-6)
    assert nothing == []
    # sigmoid(0) is 1/2 exactly, so one product of the first answer is 1/4.
    for threshold, kept in ((0.25, 1), ([0.25, 0.0, 0.0], 1), (0.2499, 2), ([0.2499, 1.0, 1.0], 2)):
        assert len(predictor.finish(detection, threshold)[0].instances) == kept
    output.presence_logits = None
    alone = logits.double().sigmoid().sort(descending=True).values
    assert all_scores(predictor.finish(detection, 0.0))[0] == pytest.approx(alone[0].tolist(), rel=2e-6)


def test_the_rules_differ(checkpoint, images):
    """By default it is `trained`; the released rule reads two more tokens a phrase and gives other queries."""
    found = {}
    for decoding in (None, "trained", "released"):
        choice = {} if decoding is None else {"decoding": decoding}
        found[decoding] = Predictor.from_pretrained(checkpoint, **choice).understand(images, INSTRUCTIONS, PHRASES)
    bridges = {decoding: understanding.bridge for decoding, understanding in found.items()}
    assert torch.equal(bridges[None].queries_PNC, bridges["trained"].queries_PNC)
    lengths = {decoding: bridge.phrase_mask_PT.sum(-1) for decoding, bridge in bridges.items()}
    assert torch.equal(lengths["released"], lengths["trained"] + 2)
    difference = bridges["released"].queries_PNC - bridges["trained"].queries_PNC
    assert float(difference.abs().max() / bridges["trained"].queries_PNC.abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("decoding", RULES)
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision(dtype, decoding, checkpoint, images, monkeypatch):
    """Scores of both ways to an answer stay near those of float32; masks and boxes come out."""
    exact = Predictor.from_pretrained(checkpoint, dtype="float32", decoding=decoding)
    half = Predictor.from_pretrained(checkpoint, dtype=dtype, decoding=decoding)
    assert half.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    expected = all_scores(given_phrases(exact, images))
    given = given_phrases(half, images)
    write(monkeypatch, half, PHRASES)
    written = half.segment(images, INSTRUCTIONS, threshold=0.0)
    for predictions in (given, written):
        for scores, wanted in zip(all_scores(predictions), expected, strict=True):
            assert sorted(scores) == pytest.approx(sorted(wanted), abs=0.02)
        assert all(i.rle["size"] == [96, 96] for p in predictions for i in p.instances)
    stored = Predictor.from_pretrained(checkpoint)
    assert stored.model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_the_ablations(dtype, checkpoint, images):
    """Every part that a configuration can add runs in half precision too."""
    exact = Predictor.from_pretrained(checkpoint)
    changed = {"presence_token": True, "query_mode": "add", "phrase_features": "hidden_states", "projector": "linear"}
    config = InstructSAMConfig.from_dict({**exact.model.config.to_dict(), **changed})
    scores = []
    for precision in (torch.float32, getattr(torch, dtype)):
        model = fresh_model(config, seed=0)
        cast_parameters(model.parameters(), precision)
        predictor = Predictor(model, exact.processor, "released")
        scores.append(all_scores(given_phrases(predictor, images)))
    for one, other in zip(*scores, strict=True):
        assert sorted(one) == pytest.approx(sorted(other), abs=0.02)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"decoding": "publishd"}, "decoding='publishd' is not one of trained, released"),
        ({"decoding": None}, "decoding=None is not one of trained, released"),
        ({"dtype": "int8"}, "dtype='int8' is not one of auto, float32, bfloat16, float16"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not one of"),
        ({"device": "gpu"}, "device='gpu' is no device"),
        ({"device": "cuda:99"}, "device='cuda:99': no such NVIDIA GPU"),
        ({"device": "meta"}, "device='meta' is not there"),
    ],
)
def test_choices_that_cannot_work(choice, message, checkpoint):
    with pytest.raises(ValueError, match=re.escape(message)):
        Predictor.from_pretrained(checkpoint, **choice)


def test_no_gpu_is_said_in_plain_words(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda': no such NVIDIA GPU \(PyTorch finds none\)"):
        Predictor.from_pretrained(checkpoint, "cuda")


def test_a_wrong_choice_is_found_before_anything_is_loaded():
    with pytest.raises(ValueError, match="decoding='x'"):
        Predictor.from_pretrained("nowhere", decoding="x")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(dtype, checkpoint, images):
    expected = given_phrases(Predictor.from_pretrained(checkpoint), images)
    found = given_phrases(Predictor.from_pretrained(checkpoint, "cuda", dtype), images)
    for scores, wanted in zip(all_scores(found), all_scores(expected), strict=True):
        assert sorted(scores) == pytest.approx(sorted(wanted), abs=0.02)


# ---- the commands -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluate_honours_and_records_the_choices(checkpoint, world, tmp_path, monkeypatch):
    used = write(monkeypatch, Predictor.from_pretrained(checkpoint), [["red circles"], ["stars"]])
    runs = {
        "default": [],
        "released": ["decoding=released"],
        "half": ["decoding=released", "dtype=bfloat16", "untrained=true"],
    }
    scores = {}
    for name, overrides in runs.items():
        settings = settings_of(
            "eval",
            f"checkpoint={checkpoint}",
            f"benchmark.root={world}",
            f"output_dir={tmp_path / name}",
            "limit=6",
            "threshold=0.0",
            "max_new_tokens=8",
            "gallery_rows=1",
            *overrides,
        )
        used.clear()
        evaluate(settings)
        # With `untrained` the fresh model answers beside the checkpoint, by the same rule.
        assert used == ["trained" if name == "default" else "released"] * (2 if name == "half" else 1)
        described = json.loads((tmp_path / name / "metrics.json").read_text())["settings"]
        assert described["decoding"] == ("trained" if name == "default" else "released")
        assert described["dtype"] == ("bfloat16" if name == "half" else "float32")
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        scores[name] = torch.tensor([json.loads(line)["pred_scores"] for line in lines])
    assert float((scores["default"] - scores["released"]).abs().max()) > 1e-3
    torch.testing.assert_close(scores["half"], scores["released"], rtol=0, atol=0.02)
