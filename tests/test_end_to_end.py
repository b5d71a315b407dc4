"""A user's path in small: train, evaluate, segment; bad input; the run that must not change."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fixtures import settings_of

from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.evaluate import evaluate
from instructsam.evaluation.reliance import same_image, same_instruction
from instructsam.evaluation.runner import run
from instructsam.models.checkpoints import replace_folder
from instructsam.predictor import Predictor
from instructsam.train import train
from instructsam.training import evaluating
from instructsam.training.build import build_task
from instructsam.training.evaluating import periodic_evaluation

pytestmark = pytest.mark.slow

GOLDEN_LOSSES = Path(__file__).parent / "golden" / "tiny_losses.json"
RUNS = ("tiny_detector", "tiny_vlm", "tiny_stage1", "tiny_stage2")


def run_settings(experiment: str, world: Path, output: Path, *more: str) -> dict:
    init = []
    if experiment == "tiny_stage2":
        init = [f"model.checkpoint={output / 'tiny_stage1' / 'checkpoint'}"]
    if experiment == "tiny_stage1":
        init = [
            f"model.init.0.checkpoint={output / 'tiny_detector' / 'checkpoint'}",
            f"model.init.1.checkpoint={output / 'tiny_vlm' / 'checkpoint'}",
        ]
    return settings_of(
        "train",
        f"experiment={experiment}",
        f"data.root={world}",
        f"output_dir={output / experiment}",
        "threads=0",
        "trainer.max_steps=3",
        "trainer.per_device_batch_size=2",
        "trainer.checkpoint_every=0",
        "trainer.progress_bar=false",
        *init,
        *more,
    )


@pytest.fixture(scope="module")
def chain(world, tmp_path_factory) -> Path:
    """The runs that the tiny model is made by, three steps each."""
    output = tmp_path_factory.mktemp("chain")
    for experiment in RUNS:
        assert train(run_settings(experiment, world, output))["status"] == "complete"
    return output


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_losses_have_not_changed(chain):
    """A change that should not change numbers must not. To accept new ones: write them with the lines below."""
    found = {name: [row["loss"] for row in losses(chain / name)] for name in RUNS}
    if not GOLDEN_LOSSES.exists():
        GOLDEN_LOSSES.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN_LOSSES} was missing and has been written: look at it and commit it")
    expected = json.loads(GOLDEN_LOSSES.read_text())
    for name in RUNS:
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name


def test_the_chain_hands_its_parts_on(chain):
    weights = {name: Predictor.from_pretrained(chain / name / "checkpoint").model.state_dict() for name in RUNS}

    def moved(later: str, earlier: str) -> set[str]:
        """Modules that differ."""
        pairs = ((key, tensor, weights[earlier][key]) for key, tensor in weights[later].items())
        return {key.split(".")[0] for key, one, other in pairs if not torch.equal(one, other)}

    assert moved("tiny_stage1", "tiny_detector") == {"vlm", "query_bank", "query_projector"}
    assert moved("tiny_stage1", "tiny_vlm") == {"detector", "phrase_projector", "query_projector"}
    assert moved("tiny_stage2", "tiny_stage1") == {"detector", "query_projector"}
    embeddings = "vlm.language_model.embed_tokens.weight"
    assert torch.equal(weights["tiny_detector"][embeddings], weights["tiny_stage2"][embeddings])


def test_evaluate_writes_everything(chain, world, capsys):
    folder = chain / "evaluation"
    settings = settings_of(
        "eval",
        f"checkpoint={chain / 'tiny_stage2' / 'checkpoint'}",
        f"benchmark.root={world}",
        f"output_dir={folder}",
        "limit=20",
    )
    settings |= {"untrained": True, "max_new_tokens": 4, "threshold": 0.05, "threads": 0}
    metrics = evaluate(settings)["tiny_world_val"]
    for name in ("metrics.json", "report.md", "report.html", "gallery.png", "predictions.jsonl", "untrained.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    assert metrics["overall"]["num_samples"] == 20
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == 20
    assert "AP50" in capsys.readouterr().out
    assert json.loads((folder / "metrics.json").read_text())["overall"]["mAP"] == metrics["overall"]["mAP"]


def test_missing_and_foreign_tensors_are_errors(checkpoint, tmp_path):
    from safetensors.torch import load_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    state = load_file(broken / "model.safetensors")
    state.pop("query_bank.weight")
    state["stranger"] = torch.zeros(2)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="query_bank.weight") as caught:
        Predictor.from_pretrained(broken)
    assert "stranger" in str(caught.value)


def test_saved_and_loaded_model_is_the_same(checkpoint, world):
    samples = read_coco_instructions(world, "val")
    first, second = Predictor.from_pretrained(checkpoint), Predictor.from_pretrained(checkpoint)
    image, turn = samples[0].image, samples[0].turns[0]
    asked = [image], [turn.instruction], [[phrase.text for phrase in turn.phrases]]
    assert first.detect(first.understand(*asked), 0.0) == second.detect(second.understand(*asked), 0.0)


def test_partners_of_query_reliance():
    def record(name, image, instruction, rles, phrases=("shapes",)):
        return {"id": name, "image": image, "instruction": instruction, "gt_rles": rles, "pred_phrases": list(phrases),
                "height": 4, "width": 4}  # fmt: skip

    from instructsam.masks import encode

    left, right = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2], right[:, 2:] = True, True
    left_rle, right_rle = encode(left.numpy()), encode(right.numpy())
    records = [
        record("a", "1", "The left one", [left_rle]),
        record("b", "1", "the right one", [right_rle]),
        record("c", "2", "the left one", [left_rle]),
        record("d", "2", "all", [left_rle, right_rle]),
        record("e", "1", "nothing", []),
        record("f", "1", "the left one again", [left_rle]),
    ]
    assert same_instruction(records) == {0: 2, 2: 0}
    assert same_image(records) == {0: 1, 1: 5, 5: 1}


@pytest.mark.parametrize("more", [("trainer.precision=bf16",), ("debug=limit",), ("model.config.presence_token=true",)])
def test_training_from_scratch(more, world, tmp_path):
    settings = settings_of(
        "train",
        *more,
        f"data.root={world}",
        f"output_dir={tmp_path}",
        "data.turns_per_image=2",
        "trainer.max_steps=2",
        "trainer.per_device_batch_size=2",
        "trainer.eval_every=2",
        "evaluation.num_instructions=4",
        "evaluation.max_new_tokens=6",
        "evaluation.gallery_rows=2",
        "trainer.progress_bar=false",
    )
    summary = train(settings)
    assert summary["status"] == "complete"
    assert 0 < losses(tmp_path)[-1]["loss"] < 1000
    assert (tmp_path / "samples" / "step_000002.png").stat().st_size > 0
    assert "mAP" in summary["metrics"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.config.attention_variant=diagonal", "attention_variant='diagonal' is not one of causal, hybrid"),
        ("model.config.num_queries=0", "num_queries=0"),
        ("model.config.query_init=ones", "query_init='ones'"),
        ("objective.name=magic", "objective.name='magic'"),
        ("data.root=nowhere", "nowhere"),
        ("model.init=[{checkpoint: nowhere, modules: [vlm]}]", "no folder nowhere"),
        ("optim.freeze=[nothing_like_this]", "nothing_like_this"),
        ("trainer.max_steps=0", "max_steps"),
    ],
)
def test_settings_that_cannot_work(override, message, world, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(settings_of("train", f"data.root={world}", f"output_dir={tmp_path}", override))


# ---- bad data, kills and older runs ---------------------------------------------------------------------------------

SHORT = ["trainer.max_steps=2", "trainer.per_device_batch_size=2", "trainer.progress_bar=false"]


@pytest.mark.multiprocess
def test_broken_picture_in_a_data_worker_is_one_clear_line(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    for path in (tmp_path / "world/train/images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    command = ["-m", "instructsam.train", f"data.root={tmp_path / 'world'}", *SHORT]
    command += [f"output_dir={tmp_path / 'run'}", "trainer.num_workers=2"]
    failed = forked.run(command, ACCELERATE_USE_CPU="true")
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "broken or truncated?" in lines[0] and lines[0] == failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr


def test_evaluation_skips_bad_records_and_only_one_rank_paints(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "world")
    next((tmp_path / "world/val/images").iterdir()).unlink()
    options = [f"data.root={tmp_path / 'world'}", f"output_dir={tmp_path / 'run'}"]
    options += ["evaluation.num_instructions=2", "evaluation.max_new_tokens=6", "evaluation.gallery_rows=1"]
    settings = settings_of("train", *options)
    task = build_task(settings)
    with pytest.raises(ValueError, match="no file"):
        periodic_evaluation(task, settings)
    settings["data"]["on_bad"] = "skip"
    evaluate_task = periodic_evaluation(task, settings)
    limits = []
    monkeypatch.setattr(evaluating, "run", lambda one, *a, **k: limits.append(one.max_new_tokens) or run(one, *a, **k))
    monkeypatch.setenv("RANK", "1")
    other = evaluate_task(1, task.objective)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    assert evaluate_task(1, task.objective) == other and limits == [6, 6]
    assert (tmp_path / "run/samples/step_000001.png").stat().st_size > 0
    settings["evaluation"]["max_new_tokens"] = 0
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        periodic_evaluation(task, settings)
    settings["trainer"]["best_metric"] = "ap50"
    with pytest.raises(ValueError, match="best_metric=ap50 is none of mAP, AP50"):
        periodic_evaluation(task, settings)


def test_the_best_model_is_saved_beside_the_last(world, tmp_path, monkeypatch):
    """The second of four steps is made the best; a run that ends there has the same model."""
    scores = iter([0.5, 0.9, 0.2, 0.1])
    monkeypatch.setattr(
        "instructsam.training.evaluating.periodic_evaluation", lambda *_: lambda *_: {"AP50": next(scores)}
    )
    base = [f"data.root={world}", "trainer.per_device_batch_size=2", "optim.schedule=constant", "optim.warmup_ratio=0"]
    more = ["trainer.max_steps=4", "trainer.eval_every=1", "trainer.best_metric=AP50", "trainer.keep_checkpoints=1"]
    train(settings_of("train", *base, *more, f"output_dir={tmp_path / 'four'}"))
    train(settings_of("train", *base, "trainer.max_steps=2", f"output_dir={tmp_path / 'two'}"))
    best, last, two = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("four/checkpoint_best", "four/checkpoint", "two/checkpoint")
    )
    assert best.keys() == last.keys() == two.keys()
    assert all(torch.equal(best[name], two[name]) for name in best)
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert (tmp_path / "four/checkpoint_best/processor_config.json").exists()


def test_a_kill_while_the_model_is_saved_leaves_the_older_one(world, tmp_path, monkeypatch):
    settings = settings_of("train", f"data.root={world}", f"output_dir={tmp_path}", *SHORT)
    train(settings)
    folder = tmp_path / "checkpoint"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "adapter").mkdir()  # of an older run, in a complete checkpoint of its own
    with monkeypatch.context() as patched:

        def killed(*_):
            assert {path.name for path in folder.iterdir()} == {*before, "adapter"}
            raise SystemExit(9)

        patched.setattr("instructsam.processing.processor.InstructSAMProcessor.save_pretrained", killed)
        with pytest.raises(SystemExit):
            train(settings)
    assert {path.name for path in folder.iterdir()} == {*before, "adapter"}
    (tmp_path / ".checkpoint.tmp").mkdir()  # a kill that allows no cleaning up
    (tmp_path / ".checkpoint.tmp" / "stray").touch()
    train(settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_as_a_whole(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr("instructsam.models.checkpoints._exchange", lambda one, other: False)
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with replace_folder(folder) as unfinished:
            assert unfinished != folder and not list(unfinished.iterdir())
            (unfinished / "config.json").write_text(content)
            (unfinished / content).touch()
        assert {path.name for path in folder.iterdir()} == {"config.json", content}
        assert (folder / "config.json").read_text() == content
        assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(OSError, match="disk full"), replace_folder(folder) as unfinished:
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == [folder] and (folder / "config.json").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging two names is a call of Linux")
def test_there_is_never_no_folder(tmp_path, monkeypatch):
    """On Linux the older folder is never renamed away first."""
    folder, seen = tmp_path / "model", []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: seen.append(self.name) or rename(self, target))
    for _ in range(2):
        with replace_folder(folder) as unfinished:
            (unfinished / "config.json").touch()
    assert seen == [".model.tmp"]
