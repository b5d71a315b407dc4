"""data/README.md is true: its examples are read as it says, its commands run as they stand."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_fixtures import settings_of

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.release_train import read_release_train
from instructsam.data.sources import parse_sources, read_source
from instructsam.evaluation.benchmarks import expand, load_benchmark

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^`(data/[^`\n]+)`\n```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEIGHT, WIDTH = 120, 160
SMALL, TALL = 30 * 40, 20 * 120  # pixels of the cup on the left, and of the one over the whole height

STEPS, FEWER = "trainer.max_steps=150", "trainer.max_steps=30"
"""What the guide trains takes minutes; that the loss falls is seen earlier."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """A checkout with the guide's examples as files, and the pictures that they name."""
    root = tmp_path_factory.mktemp("examples")
    found = EXAMPLE.findall(GUIDE)
    assert len(found) == GUIDE.count("```json")  # each has its place
    for name, text in found:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".p":
            path.write_bytes(pickle.dumps(json.loads(text), protocol=2))
        else:
            path.write_text(text, encoding="utf-8")
    pictures = ["mine/train/images/table.jpg", "images/a.jpg", "reasonseg/train/tea.jpg", "reasonseg/val/tea.jpg"]
    pictures += ["roborefit/a.jpg", "roborefit/image/1.png", "inst2seg/a.jpg", "gseval/a.jpg", "saco/images/a.jpg"]
    for name in [*pictures, "coco/train2014/COCO_train2014_000000000042.jpg"]:
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(path)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[20:60, 10:40] = 200
    (root / "data/roborefit/mask").mkdir()
    Image.fromarray(mask).save(root / "data/roborefit/mask/1.png")
    return root


def asked(samples) -> dict[str, dict[str, list[int]]]:
    """Instruction → phrase → areas of its instances in pixels."""
    return {
        turn.instruction: {phrase.text: [masks.area(rle) for rle in phrase.rles] for phrase in turn.phrases}
        for sample in samples
        for turn in sample.turns
    }


def test_own_data_is_read_as_described(examples):
    (sample,) = read_coco_instructions(examples / "data/mine", "train")
    assert asked([sample]) == {
        "the red cups": {"red cups": [SMALL, TALL]},
        "Which cup stands closest to the window on the right?": {"cup": [40 * 50]},
        "the forks": {"forks": []},
    }
    boxes = {turn.id: turn.phrases[0].box_only for turn in sample.turns}
    assert boxes == {"table-1": False, "table-2": True, "table-3": False}


TRIANGLE = masks.area(masks.polygons_to_rle([[10, 20, 40, 20, 40, 60]], HEIGHT, WIDTH))
SLIVER = masks.area(masks.polygons_to_rle([[10, 20, 15, 20, 15, 60]], HEIGHT, WIDTH))
SOURCES = {
    "coco": {"cup": {"cup": [SMALL]}, "fork": {"fork": []}},  # the dogs are a crowd: neither asked nor absent
    "lvis": {"cup": {"cup": [TRIANGLE]}, "fork": {"fork": []}},
    "objects365": {"chair or stool": {"chair or stool": [SMALL]}},
    "paco_lvis": {"mug": {"mug": [SMALL]}, "handle of the mug": {"handle of the mug": [SLIVER]}},
    "refcoco": {"left cup": {"left cup": [SMALL]}},
    "reasonseg": {"What holds tea?": {"object": [31 * 41]}},  # borders belong to a shape
    "lisa_plus": {"What could hold tea?": {"cup": [SMALL]}},
    "roborefit": {"the red cup": {"the red cup": [SMALL]}},
}


@pytest.mark.parametrize("name", SOURCES)
def test_examples_of_training_sets_are_read_where_the_configuration_looks(examples, monkeypatch, name):
    monkeypatch.chdir(examples)
    (source,) = parse_sources({name: settings_of("prepare", "data=originals")["data"]["sources"][name]})
    samples = list(read_source(source, Skips()))
    assert asked(samples) == SOURCES[name]
    assert {(sample.height, sample.width) for sample in samples} == {(HEIGHT, WIDTH)}
    folders = {"objects365": "data/objects365/train/patch0", "lvis": "data/coco/train2017"}
    assert all(str(sample.image.parent) == folders.get(name, str(sample.image.parent)) for sample in samples)


def test_the_release_s_records_are_read_as_described(examples):
    phrases, question, conversation, plain = read_release_train(
        examples / "data/instructsam_train/NAME.json", examples / "data/images"
    )
    assert asked([phrases]) == {"red cups": {"red cups": [TALL]}, "a fork": {"a fork": []}} and phrases.joint
    assert asked([question]) == {"What could hold tea?": {"cup": [SMALL]}} and question.turns[0].phrases[0].box_only
    assert asked([conversation]) == {"What is on the left?": {"a red cup": [SMALL]}}
    assert conversation.turns[0].answer == ("It is ", ".")
    assert plain.image is None and plain.turns[0].answer == ("For drinking.",)


BENCHMARKS = {
    "inst2seg": ("test", {"all cups": [TRIANGLE], "all forks": []}),
    "grefcoco_release": ("val", {"left cup": [TRIANGLE]}),
    "reasonseg_release": ("val", {"What holds tea?": [TALL]}),
    "roborefit": ("testA", {"the red cup": [TRIANGLE]}),
    "gseval": ("test", {"the grass": [TALL]}),
    "saco": ("test", {"cup": [TALL]}),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_examples_of_benchmarks_are_read_where_the_configuration_looks(examples, monkeypatch, name):
    monkeypatch.chdir(examples)
    split, expected = BENCHMARKS[name]
    (settings,) = expand(settings_of("eval", f"benchmark={name}", f"benchmark.split={split}")["benchmark"])
    _, items = load_benchmark(settings)
    found = {item.text: [masks.area(rle) for phrase in item.turn.phrases for rle in phrase.rles] for item in items}
    assert found == expected


# ---- commands --------------------------------------------------------------------------------------------------------


def commands_of(heading: str) -> list[str]:
    """The commands of a section, each on one line."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


SETTINGS = {"train": "train", "evaluate": "eval", "validate": "validate", "inspect": "inspect", "prepare": "prepare"}


@pytest.mark.slow
def test_settings_in_all_commands_are_known():
    seen = set()
    for heading in re.findall(r"^## (.*)$", GUIDE, re.MULTILINE):
        for command in commands_of(heading):
            words = [word for word in shlex.split(command, comments=True) if word != "…"]
            if words[:2] == ["python", "-m"] and (name := words[2].removeprefix("instructsam.")) in SETTINGS:
                settings_of(SETTINGS[name], *words[3:])
                seen.add(name)
    assert seen == set(SETTINGS)


@pytest.fixture
def checkout(tmp_path, checkpoint) -> Path:
    """What the reader has after the quickstart, with an untrained model."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    shutil.copytree(checkpoint, tmp_path / "outputs" / "quickstart" / "checkpoint")
    return tmp_path


def run(command: str, cwd: Path) -> str:
    """Its output; ``python`` is the interpreter of the tests, as in an activated environment."""
    (cwd / "bin").mkdir(exist_ok=True)
    if not (python := cwd / "bin" / "python").exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    variables = {**os.environ, "PATH": f"{cwd / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_own_data_in_ten_minutes(checkout):
    commands = commands_of("Your own data in ten minutes")
    told = {}
    for command in commands:
        if "instructsam.train" in command:
            assert STEPS in command
            command = command.replace(STEPS, FEWER)
        told[command.split()[2 if " -m " in command else 1]] = run(command, checkout)
    assert list(told) == [
        "scripts/prepare/example_own_data.py",
        *(f"instructsam.{name}" for name in ("validate", "inspect", "train", "evaluate", "compare", "segment")),
    ]
    assert "nothing found" in told["instructsam.validate"]
    outputs = checkout / "outputs"
    for name in (
        "validate/validation.md",
        "inspect/index.html",
        "mine/checkpoint/model.safetensors",
        "segment/results.jsonl",
    ):
        assert (outputs / name).stat().st_size, name
    for name in ("before", "after"):
        figures = json.loads((outputs / "mine" / name / "metrics.json").read_text())
        assert figures["overall"]["num_samples"] == 64  # 16 pictures, four instructions each

    losses = [json.loads(line)["loss"] for line in (outputs / "mine" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.multiprocess
def test_own_data_joins_a_mixture(checkout):
    run("python scripts/prepare/example_own_data.py", checkout)
    (command,) = commands_of("A new data set")
    assert "mine: 48 samples" in run(command, checkout)
