"""The segment command into a folder that already holds results."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import forked
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instructsam.inference.model import InstructSAM
from instructsam.segmenting.store import ResultStore

pytestmark = pytest.mark.slow

ALL_KINDS = "overlay,masks,coco,labelme"


@pytest.fixture
def no_model(monkeypatch):
    """A function after which no model can be loaded."""
    return lambda: monkeypatch.setattr(InstructSAM, "from_pretrained", None)


def contents(folder: Path) -> dict[str, bytes]:
    """All that was written there besides results.jsonl and run.json, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, folder / "coco.json"]}


def test_the_same_command_goes_on(run, lines, photos, usual, tmp_path, capsys, monkeypatch):
    order = ["-i", "stars", "-i", "circles", *usual, "--batch-size", 2]
    assert run(photos / "a.png", *order) == 0
    asked: list[int] = []
    answer = InstructSAM.answer
    monkeypatch.setattr(
        InstructSAM, "answer", lambda self, images, *rest: asked.append(len(images)) or answer(self, images, *rest)
    )
    path = tmp_path / "out/results.jsonl"
    with path.open("ab") as file:
        file.write(b'{"id": "b", "asked": {"image"')  # a kill cut it off
    assert run(photos / "a.png", photos / "b.PNG", *order) == 0
    assert asked == [2] and [line["id"] for line in lines(tmp_path / "out")] == ["a", "a.2", "b", "b.2"]
    assert "2 of 4 jobs are done already" in capsys.readouterr().err
    assert len(COCO(str(tmp_path / "out/coco.json")).getImgIds()) == 2
    assert run(photos / "a.png", photos / "b.PNG", *order) == 0 and asked == [2]
    assert run(photos / "a.png", photos / "b.PNG", *order, "--threshold", "0.5") == 2
    assert "its results are of threshold 0.0, not 0.5; choose another folder, or --restart" in capsys.readouterr().err
    assert run(photos / "a.png", *order, "--threshold", "0.5", "--restart") == 0 and asked == [2, 2]


def test_other_files_are_made_without_the_model(run, photos, usual, tmp_path, no_model):
    order = [photos, "-p", "red circles", "-p", "stars", "--top-k", 3, *usual]
    assert run(*order, "--write", ALL_KINDS, "--output", tmp_path / "at once") == 0
    assert run(*order, "--write", "coco") == 0
    assert not (tmp_path / "out/overlays").exists()
    no_model()
    assert run(*order, "--write", ALL_KINDS) == 0
    at_once = contents(tmp_path / "at once")
    there = contents(tmp_path / "out")
    assert len(at_once) == 3 * (1 + 3 + 1) + 1 and there.keys() == at_once.keys()
    for name, content in at_once.items():
        if name.startswith("labelme"):  # the way to the picture differs
            assert json.loads(there[name])["shapes"] == json.loads(content)["shapes"]
        else:
            assert there[name] == content, name
    removed, kept = sorted((tmp_path / "out").rglob("masks/*/01_*.png"))[:2]
    removed.unlink()
    before = next((tmp_path / "out/overlays").iterdir()).stat().st_mtime_ns
    assert run(*order, "--write", ALL_KINDS) == 0
    assert removed.exists() and next((tmp_path / "out/overlays").iterdir()).stat().st_mtime_ns == before


def test_what_is_done_is_said_again(run, photos, usual, capsys, no_model):
    order = [photos, "-i", "stars", *usual]
    assert run(*order, "--json") == 0
    first = capsys.readouterr().out
    no_model()
    assert run(*order, "--json") == 0
    assert capsys.readouterr().out == first and len(first.splitlines()) == 3
    assert run(*order) == 0
    assert "b: stars → " in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_any_more(run, lines, photos, usual, tmp_path, capsys):
    """Its files cannot be made; its result stays."""
    assert run(photos / "a.png", "-i", "stars", *usual, "--write", "coco") == 0
    before = (photos / "a.png").stat()
    (photos / "a.png").write_bytes(bytes(before.st_size))
    os.utime(photos / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(photos / "a.png", "-i", "stars", *usual, "--write", "overlay") == 1
    assert "a: FAILED: " in capsys.readouterr().err and ["result" in line for line in lines(tmp_path / "out")] == [True]


def test_a_changed_picture_is_asked_about_anew(run, lines, photos, usual, tmp_path):
    out, picture = tmp_path / "out", photos / "a.png"
    order = [picture, "-p", "red circles", "-p", "stars", *usual]
    assert run(*order, "--write", ALL_KINDS, "--top-k", 9) == 0
    assert len(list((out / "masks/a").iterdir())) == 9
    Image.open(picture).resize((300, 200)).save(picture)
    (out / "masks/a/99_stale.png").write_bytes(b"")
    assert run(*order, "--write", "masks,coco", "--top-k", 9) == 0
    found = lines(out)
    assert [(line["id"], line["result"]["width"]) for line in found] == [("a", 96), ("a", 300)]
    assert {Image.open(path).size for path in (out / "masks/a").iterdir()} == {(300, 200)}
    assert not (out / "overlays/a.png").exists() and not (out / "labelme/a.json").exists()
    images = COCO(str(out / "coco.json")).dataset["images"]
    assert [(image["file_name"], image["width"]) for image in images] == [(str(picture), 300)]


def test_questions_about_two_states_of_a_picture(run, photos, usual, tmp_path):
    """The one that was asked about the former state is asked again, or coco.json could not be written."""
    assert run(photos / "a.png", "-i", "stars", *usual) == 0
    Image.open(photos / "a.png").resize((300, 200)).save(photos / "a.png")
    assert run(photos / "a.png", "-i", "stars", "-i", "circles", *usual) == 0
    assert [image["width"] for image in COCO(str(tmp_path / "out/coco.json")).dataset["images"]] == [300]


def test_a_picture_that_changes_meanwhile(run, lines, photos, usual, tmp_path, monkeypatch, capsys):
    answer, picture = InstructSAM.answer, photos / "a.png"

    def change(self, images, *rest):
        predictions = answer(self, images, *rest)
        Image.open(picture).resize((300, 200)).save(picture)
        return predictions

    order = [picture, photos / "b.PNG", "-i", "stars", *usual]
    with monkeypatch.context() as patched:
        patched.setattr(InstructSAM, "answer", change)
        assert run(*order) == 1
    assert "a.png: was changed while it was asked about" in capsys.readouterr().err
    assert ["error" in line for line in lines(tmp_path / "out")] == [True, False]
    assert run(*order) == 0
    assert lines(tmp_path / "out")[-1]["result"]["width"] == 300


def test_another_question_gets_an_id_of_its_own(run, lines, photos, usual, tmp_path, no_model):
    orders = [
        [photos / "a.png", "-i", "stars"],
        [photos / "a.png", "-i", "circles"],
        [photos / "more/a.png", "-i", "stars", "-i", "circles"],
    ]
    for order in orders:
        assert run(*order, *usual) == 0
    found = lines(tmp_path / "out")
    assert [line["id"] for line in found] == ["a", "a.2", "a.3", "a.2.2"]
    assert {path.stem for path in (tmp_path / "out/overlays").iterdir()} == {line["id"] for line in found}
    no_model()
    for order in orders:
        assert run(*order, *usual) == 0


def test_a_picture_is_known_by_its_place(run, photos, usual, tmp_path, monkeypatch, no_model):
    """However it is called; and one of the same name elsewhere is another."""
    monkeypatch.chdir(photos)
    assert run("a.png", "-i", "stars", *usual) == 0
    monkeypatch.chdir(photos / "more")
    assert run("../a.png", "a.png", "-i", "stars", *usual) == 0
    images = COCO(str(tmp_path / "out/coco.json")).dataset["images"]
    assert [image["file_name"] for image in images] == ["../a.png", "a.png"]
    no_model()
    assert run("../a.png", "a.png", "-i", "stars", *usual) == 0
    assert run(photos / "a.png", "-i", "stars", *usual) == 0


def test_results_inside_the_folder_of_pictures(run, photos, usual, capsys, no_model):
    order = [photos, "-i", "stars", *usual]
    for output in (photos / "out", photos):
        assert run(*order, "--write", ALL_KINDS, "--output", output) == 0
    no_model()
    for output in (photos / "out", photos):
        capsys.readouterr()
        assert run(*order, "--output", output) == 0
        assert "3 of 3 jobs are done already" in capsys.readouterr().err


def test_a_restart_removes_what_was_written(run, photos, usual, tmp_path, capsys):
    out = tmp_path / "out"
    order = [photos / "a.png", "-i", "stars", *usual, "--restart"]
    (out / "masks").mkdir(parents=True)
    (out / "masks/own.png").write_text("here before the command")
    assert run(photos / "b.PNG", *order[1:], "--write", ALL_KINDS) == 0
    assert (out / "masks/own.png").exists()
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert run(*order, "--device", "gpu") == 2 and run(*order, "-i", "the [SEG]") == 2
    assert contents(out) == before, "a command that cannot start has thrown results away"
    assert run(*order, "--write", "overlay") == 0
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert left == {"run.json", "results.jsonl", "overlays/a.png", "notes.txt"}


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no space left")])
def test_an_error_after_the_work(run, lines, photos, usual, tmp_path, error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(ResultStore, "finish", fail)
    assert run(photos / "a.png", "-i", "stars", *usual) == 1
    assert f"error: {error}; the same command goes on" in capsys.readouterr().err and len(lines(tmp_path / "out")) == 1


def test_an_interrupted_command_goes_on(lines, world, checkpoint, tmp_path):
    """A real process, ended by Ctrl+C in the middle."""
    pictures = sorted((world / "train/images").glob("*.png")) + sorted((world / "val/images").glob("*.png"))
    words = ["-i", *" -i ".join(f"shape {k}" for k in range(20)).split(" -i ")]
    arguments = [item for pair in zip(["-i"] * 20, words[1:], strict=True) for item in pair]
    line = ["-m", "instructsam.segment", *pictures, *arguments, "--batch-size", "2"]
    line += ["--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(tmp_path / "out"), "--write", "coco"]
    line += ["--max-new-tokens", "4"]
    process = forked.Running(line)
    results = tmp_path / "out/results.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not results.exists() or results.read_bytes().count(b"\n") < 5):
        time.sleep(0.05)
    os.kill(process.ranks[0].pid, signal.SIGINT)
    ended = process.finish(60)
    assert ended.returncode == 130 and "interrupted; the same command goes on" in ended.stderr, ended.stderr[-2000:]
    before = results.read_bytes().count(b"\n")
    assert 5 <= before < 360
    done = forked.run(line)
    assert f"{before} of 360 jobs are done already" in done.stderr
    assert len({entry["id"] for entry in lines(tmp_path / "out")}) == 360 == len(lines(tmp_path / "out"))
