"""The harness: same records whatever the batches, the processes and the kills; each instruction once."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import evaluation_toy as toy
import forked
import pytest
from double_precision import CLOSE, float64

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.pipeline import buckets, overlapped
from instructsam.evaluation.runner import EvalItem, flatten, make_record, run, spread
from instructsam.evaluation.segmenter import Segmenter, StagedSegmenter
from instructsam.evaluation.streaming import Part, begin
from instructsam.predictor import Predictor
from instructsam.structures import RLE, Sample, Turn

TOY = Path(toy.__file__)


def plain_loop(segmenter: Segmenter, items: list[EvalItem], threshold: float = 0.3) -> list[dict]:
    records = []
    for item in items:
        (prediction,) = segmenter.segment([item.sample.image], [item.turn.instruction], threshold=threshold)
        records.append(make_record(item, prediction))
    return json.loads(json.dumps(records))


def close(one: list[dict], other: list[dict]) -> None:
    """Equal but for the last digits of scores, worked out in float64."""
    assert [record["id"] for record in one] == [record["id"] for record in other]
    for a, b in zip(one, other, strict=True):
        assert a["answer"] == b["answer"] and a["pred_phrases"] == b["pred_phrases"]
        assert a["pred_scores"] == pytest.approx(b["pred_scores"], rel=CLOSE)
        assert a["pred_rles"] == b["pred_rles"] and a["gt_rles"] == b["gt_rles"]


def launch(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    return forked.run([TOY, *arguments], processes)


# ---- batches and stages -----------------------------------------------------------------------------------------


def test_batches_hold_similar_lengths_longest_first():
    lengths = [5, 90, 7, 50, 5, 91, 6]
    found = buckets(lengths, 2)
    assert found == [[5, 1], [3, 2], [6, 0], [4]]
    assert sorted(index for batch in found for index in batch) == list(range(7))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stages_keep_the_order(workers):
    def compute(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * 10

    def read(number: int) -> int:
        time.sleep(0.01 * (number % 2))
        return number

    found = overlapped(range(20), read, compute, lambda n, m: (n, m), workers)
    assert list(found) == [(n, 10 * n) for n in range(20)]


def test_stages_run_at_the_same_time():
    """Of three batches that follow each other each is held up in its stage until the others are in theirs."""
    met = threading.Barrier(3, timeout=300)

    def stage(held_up: int):
        def work(number: int, *_: int) -> int:
            if number == held_up:
                met.wait()
            return number

        return work

    assert list(overlapped(range(10), stage(5), stage(4), stage(3), 2)) == list(range(10))


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_any_stage_arrives(stage, workers):
    def fails(*values):
        raise ValueError("picture 7 is broken")

    stages: list[Any] = [lambda n: n, lambda n: n, lambda n, m: n]
    stages[stage] = fails
    with pytest.raises(ValueError, match="picture 7"):
        list(overlapped(range(5), stages[0], stages[1], stages[2], workers))


# ---- records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("kind", [toy.Toy, toy.StagedToy])
def test_same_records_as_a_plain_loop(kind, batch_size, tmp_path):
    items, segmenter = toy.items(30), kind()
    expected = plain_loop(segmenter, items)
    assert run(segmenter, items, batch_size=batch_size, progress=False) == expected
    assert run(segmenter, items, tmp_path / "p.jsonl", batch_size=batch_size, progress=False) == expected
    assert run(segmenter, items, batch_size=batch_size, workers=0, progress=False) == expected


def test_the_toys_are_what_they_pretend():
    assert isinstance(toy.Toy(), Segmenter) and not isinstance(toy.Toy(), StagedSegmenter)
    assert isinstance(toy.StagedToy(), StagedSegmenter)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Predictor, toy.told_predictor()])
@float64()
def test_the_model_answers_the_same_in_any_batch(kind, checkpoint, world, tmp_path):
    """An untrained model writes no phrase; told what to look for it gives masks."""
    predictor = kind.from_pretrained(checkpoint, max_new_tokens=6)
    assert isinstance(predictor, StagedSegmenter)
    items = flatten(read_coco_instructions(world, "val"), 13)
    expected = plain_loop(predictor, items, 0.02)
    assert (sum(len(record["pred_rles"]) for record in expected) > 0) == (kind is not Predictor)
    close(run(predictor, items, threshold=0.02, batch_size=5, progress=False), expected)
    close(run(predictor, items, tmp_path / "p.jsonl", threshold=0.02, batch_size=13, progress=False), expected)


def test_records_hold_what_the_items_do():
    (item,) = toy.items(1)
    ignore: RLE = {"size": [12, 16], "counts": "000"}
    item = EvalItem(item.sample, item.turn, ignore, "the plain words")
    (prediction,) = toy.Toy().segment([item.sample.image], [item.turn.instruction], threshold=0.3)
    record = make_record(item, prediction, {"split": "val"})
    assert record["ignore_rle"] == ignore and record["text"] == "the plain words" and record["split"] == "val"
    assert "ignore_rle" not in make_record(toy.items(1)[0], prediction)


def test_what_cannot_be_run():
    items = toy.items(4)
    with pytest.raises(ValueError, match="instruction 'toy/1' occurs twice"):
        run(toy.Toy(), [*items, items[1]], progress=False)
    with pytest.raises(ValueError, match="no instructions"):
        run(toy.Toy(), [], progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        run(toy.Toy(), items, batch_size=0, progress=False)
    with pytest.raises(ValueError, match="limit=0"):
        spread(items, 0)
    sample = items[2].sample
    turned = Sample(sample.id, sample.image, sample.width, sample.height, sample.turns)
    with pytest.raises(ValueError, match=r"instruction 'toy/2'.*EXIF"):
        run(toy.Toy(), [EvalItem(turned, items[2].turn)], progress=False)
    thin = Sample("thin", Path("thin.png"), 1, 1000, (Turn("x", id="t"),))
    with pytest.raises(ValueError, match=r"instruction 't' \(thin.png\).*thinner"):
        run(toy.StagedToy(), [EvalItem(thin, thin.turns[0])], progress=False)


# ---- on disk ----------------------------------------------------------------------------------------------------


class Stops(toy.Toy):
    """Breaks at its third batch."""

    calls = 0

    def segment(self, images, instructions, *, threshold):
        self.calls += 1
        if self.calls == 3:
            raise ValueError("interrupted")
        return super().segment(images, instructions, threshold=threshold)


def interrupted(path: Path, items: list[EvalItem]) -> None:
    with pytest.raises(ValueError, match="interrupted"):
        run(Stops(), items, path, batch_size=4, workers=0, progress=False)
    assert not path.exists()


def test_goes_on_after_the_finished_ones(tmp_path):
    items, path = toy.items(20), tmp_path / "p.jsonl"
    whole = run(toy.Toy(), items, tmp_path / "whole.jsonl", batch_size=4, progress=False)
    interrupted(path, items)
    part = path.with_suffix(".parts") / "rank-00000.jsonl"
    finished = part.read_bytes()
    assert len(finished.splitlines()) == 1 + 8
    part.write_bytes(finished[:-20])  # torn
    segmenter = toy.Toy()
    assert run(segmenter, items, path, batch_size=4, progress=False) == whole
    assert segmenter.answered == 16  # the torn one's whole batch again
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not path.with_suffix(".parts").exists()
    again = toy.Toy()
    assert run(again, items, path, batch_size=4, progress=False) == whole
    assert again.answered == 0


def test_another_run_in_the_same_place_is_refused(tmp_path):
    items, path = toy.items(20), tmp_path / "p.jsonl"
    for prepare in (lambda: interrupted(path, items), lambda: run(toy.Toy(), items, path, progress=False)):
        prepare()
        with pytest.raises(ValueError, match=r"another run \(threshold: 0.3 there, 0.5 now\).*restart=true"):
            run(toy.Toy(), items, path, threshold=0.5, progress=False)
        with pytest.raises(ValueError, match=r"segmenter.seed: 0 there, 1 now"):
            run(toy.Toy(seed=1), items, path, progress=False)
        with pytest.raises(ValueError, match=r"instructions.count: 20 there, 19 now"):
            run(toy.Toy(), items[1:], path, progress=False)
        with pytest.raises(ValueError, match=r"checkpoint.sha256: nothing there, abc now"):
            run(toy.Toy(), items, path, fingerprint={"checkpoint": {"sha256": "abc"}}, progress=False)
    other = run(toy.Toy(), items, path, threshold=0.5, restart=True, progress=False)
    assert other == plain_loop(toy.Toy(), items, 0.5) != plain_loop(toy.Toy(), items, 0.3)


def test_damage_is_named(tmp_path):
    items, path = toy.items(20), tmp_path / "p.jsonl"
    interrupted(path, items)
    part = path.with_suffix(".parts") / "rank-00000.jsonl"
    good = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*good[:2], b"\0\0\0\n", *good[3:]]))
    with pytest.raises(ValueError, match=r"rank-00000.jsonl:3: is not valid JSON"):
        run(toy.Toy(), items, path, progress=False)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="a run that nothing is known about"):
        run(toy.Toy(), items, path, progress=False)
    run(toy.Toy(), items, path, restart=True, progress=False)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has it been edited"):
        run(toy.Toy(), items, path, progress=False)


def test_one_run_at_a_time(tmp_path):
    items, path = toy.items(4), tmp_path / "p.jsonl"

    class Nested(toy.Toy):
        def segment(self, images, instructions, *, threshold):
            with pytest.raises(ValueError, match="another process is evaluating there"):
                run(toy.Toy(), items, path, progress=False)
            return super().segment(images, instructions, threshold=threshold)

    assert len(run(Nested(), items, path, progress=False)) == 4


# ---- processes --------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_three_processes_give_what_one_gives(tmp_path):
    """100 instructions in batches of 7: fifteen batches, the last of two."""
    for processes in (1, 3):
        done = launch(processes, "toy", tmp_path / f"{processes}.jsonl")
        assert done.returncode == 0, done.stderr
    one, three = ((tmp_path / f"{n}.jsonl").read_bytes() for n in (1, 3))
    assert one == three
    records = [json.loads(line) for line in one.splitlines()]
    assert [record["id"] for record in records] == [f"toy/{k}" for k in range(100)]
    shares = [json.loads(line) for line in (tmp_path / "3.shares").read_text().splitlines()]
    assert sorted(shares) == [30, 35, 35]  # answered by each process: every instruction once
    assert json.loads((tmp_path / "3.figures").read_text()) == evaluate_records(records)["overall"]
    assert (tmp_path / "1.figures").read_text() == (tmp_path / "3.figures").read_text()
    assert (tmp_path / "3.memory").read_text() == "same"  # and so in memory


@pytest.mark.multiprocess
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 1), (1, 3), (3, 2)])
def test_killed_and_started_again_gives_the_same_bytes(before, after, tmp_path):
    run(toy.StagedToy(), toy.items(100), tmp_path / "whole.jsonl", batch_size=7, progress=False)
    path = tmp_path / "p.jsonl"
    killed = launch(before, "toy", path, "--kill-after", 14)
    assert killed.returncode in (-signal.SIGKILL, 1) and not path.exists()
    left = sorted(path.with_suffix(".parts").glob("*.jsonl"))
    finished = sum(len(file.read_bytes().splitlines()) - 1 for file in left)
    assert 7 <= finished < 100
    done = launch(after, "toy", path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    answered = sum(json.loads(line) for line in path.with_suffix(".shares").read_text().splitlines())
    assert answered == 100 - finished


@pytest.mark.multiprocess
def test_an_error_on_the_first_rank_is_everyones(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("{}\n")
    failed = launch(2, "toy", path)
    assert failed.returncode != 0
    assert failed.stderr.count("ValueError: ") >= 1 and "nothing is known about" in failed.stderr


@pytest.mark.slow
def test_three_processes_with_the_model(checkpoint, world, tmp_path):
    for processes in (1, 3):
        done = launch(processes, "model", tmp_path / f"{processes}.jsonl", "--checkpoint", checkpoint, "--root", world)
        assert done.returncode == 0, done.stderr
    one, three = ((tmp_path / f"{n}.jsonl").read_bytes() for n in (1, 3))
    assert one == three
    records = [json.loads(line) for line in one.splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 30
    assert any(record["pred_rles"] for record in records)


def test_a_run_that_was_killed_before_its_first_record_is_another_run_all_the_same(tmp_path):
    path = tmp_path / "predictions.jsonl"
    assert begin(path, ["a"], {"threshold": 0.3}, restart=False) == set()
    Part(path, 0, {"threshold": 0.3}).close()
    with pytest.raises(ValueError, match=r"another run \(threshold: 0.3 there, 0.5 now\)"):
        begin(path, ["a"], {"threshold": 0.5}, restart=False)
    assert begin(path, ["a"], {"threshold": 0.3}, restart=False) == set()
