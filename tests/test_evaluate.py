"""The evaluate command: several benchmarks, several processes, from predictions alone, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from tiny_fixtures import settings_of

from instructsam import evaluate as command
from instructsam.evaluate import evaluate
from instructsam.evaluation.fingerprint import differences, weight_files, weights_digest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
QUICK = ["max_new_tokens=4", "query_reliance=false", "html=false", "gallery_rows=0", "bootstrap=20"]


def settings(*overrides: object) -> dict:
    return settings_of("eval", *QUICK, *map(str, overrides))


def run(processes: int, *overrides: object) -> subprocess.CompletedProcess:
    return forked.run(["-m", "instructsam.evaluate", *QUICK, *overrides], processes)


def figures(folder: Path) -> dict:
    found = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in found.items() if key not in ("settings", "checkpoint")}


@pytest.fixture(scope="module")
def evaluated(checkpoint, world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    found = evaluate(settings(f"checkpoint={checkpoint}", f"benchmark.root={world}", f"output_dir={folder}"))
    assert list(found) == ["tiny_world_val"]
    return folder


def test_the_figures_come_with_what_they_depend_on(evaluated, checkpoint, world):
    found = json.loads((evaluated / "metrics.json").read_text())
    assert found["checkpoint"]["sha256"] == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert found["checkpoint"]["layout"] == "InstructSAM"
    assert found["benchmark"]["name"] == "tiny_world" and found["benchmark"]["split"] == "val"
    assert found["benchmark"]["threshold"] == 0.3 and found["benchmark"]["conventions"]["kept"] == "score > 0.3"
    assert found["settings"]["benchmark"]["root"] == str(world)
    assert set(found["intervals"]) <= set(found["benchmark"]["headline"]) and "giou" in found["intervals"]
    records = [json.loads(line) for line in (evaluated / "predictions.jsonl").read_text().splitlines()]
    assert {(record["benchmark"], record["split"]) for record in records} == {("tiny_world", "val")}
    assert all(record["text"] for record in records)


def test_started_again_it_uses_what_is_there(evaluated, checkpoint, world, monkeypatch):
    before = (evaluated / "predictions.jsonl").read_bytes(), figures(evaluated)
    monkeypatch.setattr("instructsam.predictor.Predictor.compute", None)  # nothing is left to compute
    same = [f"checkpoint={checkpoint}", f"benchmark.root={world}", f"output_dir={evaluated}"]
    evaluate(settings(*same))
    assert ((evaluated / "predictions.jsonl").read_bytes(), figures(evaluated)) == before
    with pytest.raises(ValueError, match=r"another run \(segmenter.max_new_tokens: 4 there, 5 now\)"):
        evaluate({**settings(*same), "max_new_tokens": 5})
    with pytest.raises(ValueError, match=r"threshold: 0.3 there, 0.5 now"):
        evaluate(settings(*same, "threshold=0.5"))


def test_another_checkpoint_is_refused_until_told(evaluated, checkpoint, world, tmp_path):
    shutil.copytree(evaluated, tmp_path / "out")
    shutil.copytree(checkpoint, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    now = [f"checkpoint={tmp_path / 'other'}", f"benchmark.root={world}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"checkpoint.sha256: \w{12}… there, \w{12}… now"):
        evaluate(settings(*now))
    evaluate(settings(*now, "restart=true"))
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["checkpoint"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_several_splits_at_once(checkpoint, world, tmp_path, capsys):
    found = evaluate(
        settings(
            f"checkpoint={checkpoint}",
            f"benchmark.root={world}",
            "benchmark.split=[val,train]",
            "limit=5",
            f"output_dir={tmp_path}",
        )
    )
    assert list(found) == ["tiny_world_val", "tiny_world_train"]
    for name in found:
        assert len((tmp_path / name / "predictions.jsonl").read_text().splitlines()) == 5
        assert json.loads((tmp_path / name / "metrics.json").read_text())["benchmark"]["split"] in name
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == list(found) and summary["tiny_world_val"]["num_samples"] == 5
    assert re.search(r"tiny_world_train +5 +mAP", capsys.readouterr().out)
    assert "tiny_world_val" in (tmp_path / "summary.md").read_text()


def test_three_processes_give_the_same_files(evaluated, checkpoint, world, tmp_path):
    arguments = [f"checkpoint={checkpoint}", f"benchmark.root={world}", "batch_size=4", "untrained=true"]
    for processes in (1, 3):
        done = run(processes, *arguments, f"output_dir={tmp_path / str(processes)}")
        assert done.returncode == 0, done.stderr
    for name in ("predictions.jsonl", "untrained.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert figures(tmp_path / "1") == figures(tmp_path / "3")
    assert done.stdout.count("written to") == 1


def test_the_process_that_fails_says_why(checkpoint, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    broken = sorted((tmp_path / "world" / "val" / "images").glob("*.png"))[3]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    arguments = [f"checkpoint={checkpoint}", f"benchmark.root={tmp_path / 'world'}", f"output_dir={tmp_path}"]
    arguments.append("batch_size=2")
    failed = run(3, *arguments)
    assert failed.returncode != 0
    assert re.search(rf"error \(rank \d\): .*{broken.name}: cannot be read as an image", failed.stderr)
    assert "Traceback" not in failed.stderr
    broken.write_bytes(whole)
    done = run(1, *arguments)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 30


# ---- from predictions alone --------------------------------------------------------------------------------------


def test_predictions_alone_give_the_same_figures(evaluated, tmp_path, capsys):
    found = evaluate(settings(f"predictions={evaluated / 'predictions.jsonl'}", f"output_dir={tmp_path}"))
    assert list(found) == ["tiny_world_val"]
    assert figures(tmp_path) == figures(evaluated)
    stored, before = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path, evaluated))
    assert stored["checkpoint"] == before["checkpoint"]
    assert stored["settings"]["dtype"] == before["settings"]["dtype"]
    assert "written to" in capsys.readouterr().out


@pytest.mark.multiprocess
def test_predictions_need_neither_torch_nor_metrics(evaluated, tmp_path):
    shutil.copy(evaluated / "predictions.jsonl", tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from instructsam.evaluate import main; main()"
    )
    command = [sys.executable, "-c", code, *QUICK, f"predictions={tmp_path / 'predictions.jsonl'}"]
    done = subprocess.run(command, cwd=forked.REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "recomputed")["overall"] == figures(evaluated)["overall"]
    assert json.loads((tmp_path / "recomputed" / "metrics.json").read_text())["benchmark"]["name"] == "tiny_world"


def test_records_are_measured_once(evaluated, tmp_path, monkeypatch):
    from instructsam.evaluation import bootstrap, html, metrics

    for module in (bootstrap, html, metrics):
        monkeypatch.setattr(module, "measure", None)
    evaluate(settings(f"predictions={evaluated / 'predictions.jsonl'}", f"output_dir={tmp_path}", "html=true"))
    assert (tmp_path / "report.html").exists() and figures(tmp_path)["intervals"]


def test_predictions_under_another_threshold(tmp_path):
    rle = {"size": [4, 4], "counts": "04<"}
    record = {"id": "a", "image": "a.png", "instruction": "x", "height": 4, "width": 4, "gt_rles": [rle]}
    record |= {"pred_rles": [rle, rle], "pred_scores": [0.9, 0.4]}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(record) + "\n")
    benchmark = {"name": "b", "split": "s", "threshold": 0.3, "min_area": 0, "headline": ["giou"], "conventions": {}}
    (tmp_path / "metrics.json").write_text(json.dumps({"benchmark": benchmark}))
    whole = evaluate(settings(f"predictions={path}"))["b_s"]
    assert whole["overall"]["num_kept_instances"] == 2 and whole["overall"]["duplicate_rate"] == 0.5
    fewer = evaluate(settings(f"predictions={path}", "threshold=0.4"))["b_s"]
    assert fewer["overall"]["num_kept_instances"] == 1
    assert fewer["benchmark"]["threshold"] == 0.4 and fewer["benchmark"]["conventions"]["kept"] == "score > 0.4"
    with pytest.raises(ValueError, match=r"threshold=0.2: .* score 0.3 and above only"):
        evaluate(settings(f"predictions={path}", "threshold=0.2"))
    # AP and what is written see the same predictions as a model that was run with this threshold.
    assert fewer["overall"]["num_pred_instances"] == 1 and fewer["overall"]["mAP"] == 1.0
    (written,) = map(json.loads, (tmp_path / "recomputed" / "predictions.jsonl").read_text().splitlines())
    assert written["pred_scores"] == [0.9] and len(written["pred_rles"]) == 1
    with pytest.raises(ValueError, match="holds the run itself"):
        evaluate(settings(f"predictions={path}", f"output_dir={tmp_path}"))
    stored = {"benchmark": benchmark, "overall": {"num_samples": 2}}
    (tmp_path / "metrics.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="holds 1 records, but 2 instructions were evaluated"):
        evaluate(settings(f"predictions={path}"))
    (tmp_path / "metrics.json").write_text(json.dumps({"benchmark": benchmark}))
    small = evaluate(settings(f"predictions={path}", "min_area=50"))["b_s"]
    assert small["overall"]["giou"] == 0 and small["benchmark"]["min_area"] == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "holds no records"),
        (b'{"id": 1}\n[]\n', "predictions.jsonl:2: expected an object, got list"),
        (b'{"id": "a"}\n', "record 'a': has no height"),
    ],
)
def test_predictions_that_are_none(content, message, tmp_path):
    path = tmp_path / "predictions.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate(settings(f"predictions={path}"))


# ---- what is refused, before a model is loaded -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give checkpoint=DIR, or predictions=FILE"),
        (["checkpoint=CHECKPOINT", "predictions=x.jsonl"], "not both"),
        (["predictions=x.jsonl", "untrained=true", "limit=3"], "untrained=True, limit=3: needs the model"),
        (["predictions=x.jsonl", "query_reliance=true"], "query_reliance=true: needs the model"),
        (["checkpoint=CHECKPOINT", "batch_size=0"], "batch_size=0: must be a whole number of at least 1"),
        (["checkpoint=CHECKPOINT", "limit=many"], "limit=many"),
        (["checkpoint=CHECKPOINT", "threshold=1.5"], "threshold=1.5 is not between 0 and 1"),
        (["checkpoint=CHECKPOINT", "query_reliance=maybe"], "query_reliance=maybe"),
        (["checkpoint=CHECKPOINT", "untrained=5"], "untrained=5: must be true or false"),
        (["checkpoint=CHECKPOINT", "decoding=fast"], "decoding='fast'"),
        (["checkpoint=CHECKPOINT", "dtype=int8"], "dtype='int8'"),
        (["checkpoint=CHECKPOINT", "device=cuda:99"], "cuda:99"),
        (["checkpoint=CHECKPOINT", "benchmark=coco_instructions"], "not given: benchmark.root=..."),
        (["checkpoint=CHECKPOINT", "benchmark.root=nowhere"], "nowhere"),
        (["checkpoint=nowhere"], "no folder nowhere"),
    ],
)
def test_what_cannot_work_is_found_before_the_model_is_loaded(overrides, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("instructsam.predictor.Predictor.from_pretrained", None)
    overrides = [override.replace("CHECKPOINT", str(checkpoint)) for override in overrides]
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(settings(*overrides, f"output_dir={tmp_path}"))


@pytest.mark.multiprocess
def test_errors_are_one_line(checkpoint, tmp_path):
    done = run(1, f"checkpoint={checkpoint}", "benchmark.root=nowhere", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: ") and "\n" not in done.stderr.strip()


def test_processes_do_not_share_a_gpu(monkeypatch):
    from instructsam.evaluation.ranks import own_device

    assert own_device("cuda:1") == "cuda:1" and own_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda:3" and own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="4 processes would share it"):
        own_device("cuda:1")


# ---- digests ------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_all_weights_in_order(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "unused.safetensors").write_bytes(b"no")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_digest(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"three")
    assert weights_digest(tmp_path) == hashlib.sha256(b"onetwothree").hexdigest()
    assert [path.name for path in weight_files(tmp_path)][:2] == ["a.safetensors", "b.safetensors"]
    stat = (tmp_path / "a.safetensors").stat()
    (tmp_path / "a.safetensors").write_bytes(b"eno")  # same size, same time
    os.utime(tmp_path / "a.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_digest(tmp_path) == hashlib.sha256(b"enotwothree").hexdigest()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file .*b.safetensors"):
        weights_digest(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../b.safetensors"}}')
    with pytest.raises(ValueError, match=r"index.json names '../b.safetensors', which is no safetensors file in"):
        weights_digest(tmp_path)


def test_differences_name_nested_keys():
    there = {"a": {"b": 1, "c": 2}, "gone": None}
    assert differences(there, {"a": {"b": 1, "c": 3}, "new": 0}) == [
        "a.c: 2 there, 3 now",
        "gone: None there, nothing now",
        "new: nothing there, 0 now",
    ]
    assert differences(there, there) == []


def test_the_command_documents_itself():
    """Every setting that the docstring shows exists."""
    composed = settings_of("eval", "checkpoint=x")
    for name in re.findall(r"(?<=[ (])(\w+)=", command.__doc__ or ""):
        assert name in composed, name
