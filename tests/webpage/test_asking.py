"""What the page does with questions, without the page; and the command that shows it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instructsam import InstructSAM, demo
from instructsam.webpage import downloads as downloads_module
from instructsam.webpage.asking import Asker, Conversation, picture_of, rows_of, timings_of, visible
from instructsam.webpage.downloads import FORMATS, Downloads

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def talk(asker, examples) -> Conversation:
    return asker.ask(Conversation(), examples[-1][0], "", "squares, circles")


def test_examples_are_of_different_kinds(examples):
    assert len(examples) == 6 and len({text for _, text in examples}) == 6
    assert all(Image.open(path).size == (96, 96) for path, _ in examples)


def test_what_is_shown(talk):
    result = talk.result
    assert len(result) >= 3
    scores = [instance.score for instance in result]
    middle = float(np.median(scores))
    chosen = visible(result, middle)
    assert chosen == [k for k, score in enumerate(scores) if score > middle]
    rows = rows_of(result, chosen)
    assert [row[0] for row in rows] == [k + 1 for k in chosen]
    assert [row[3] for row in rows] == [result[k].area for k in chosen]
    assert "language" in timings_of(result)


def test_an_instance_at_the_threshold_is_not_shown(talk):
    scores = sorted({instance.score for instance in talk.result})
    assert len(visible(talk.result, scores[0])) == sum(instance.score > scores[0] for instance in talk.result)


def test_the_oldest_answers_are_forgotten(asker, examples):
    path, _ = examples[0]
    few, conversation = Asker(asker.model, asker.limits, history=2), Conversation()
    for text in ("circle", "square", "star"):
        conversation = few.ask(conversation, path, "", text)
    assert [result.phrases for result in conversation.results] == [("square",), ("star",)]
    assert conversation.result.phrases == ("star",)


def test_an_instance_keeps_its_colour(talk):
    result = talk.result
    everything, some = (np.asarray(picture_of(result, chosen)) for chosen in ([0, 1, 2], [1]))
    inside = np.asarray(Image.fromarray(result[1].mask).resize((480, 480), Image.Resampling.NEAREST))
    assert (everything[inside] == some[inside]).all(-1).mean() > 0.8  # but for labels and outlines of others


def test_files_of_what_is_chosen(talk):
    downloads = Downloads(seconds=300)
    overlay, coco, labelme = (downloads.write(talk.result, [0, 2], format) for format in FORMATS)
    assert [Path(path).name.split("_")[-1] for path in (overlay, coco, labelme)] == [*FORMATS.values()]
    assert Image.open(overlay).size == (480, 480)
    assert len(COCO(coco).getAnnIds()) == 2
    assert len(json.loads(Path(labelme).read_text())["shapes"]) == 2
    again = downloads.write(talk.result, [0], "PNG")
    assert Path(overlay).name == Path(again).name and Path(overlay).exists()
    for path in (overlay, again):
        os.utime(Path(path).parent, (0, 0))
    downloads.write(talk.result, [], "PNG")
    assert not Path(overlay).exists() and not Path(again).exists() and Path(coco).exists()


def test_old_files_are_removed_by_two_at_once(talk, monkeypatch):
    """What one has listed, the other has removed before its age is asked for."""
    downloads = Downloads(seconds=-1)
    for folder in ("a", "b"):
        (Path(downloads._root.name) / folder).mkdir()

    def remove_all(folder: Path, **options: Any) -> None:
        for each in folder.parent.iterdir():
            shutil.rmtree(each, **options)

    monkeypatch.setattr(downloads_module, "shutil", SimpleNamespace(rmtree=remove_all))
    assert Path(downloads.write(talk.result, [0], "COCO")).exists()


def test_a_conversation_is_about_one_picture(asker, examples):
    first = asker.ask(Conversation(), examples[0][0], "every square", "")
    second = asker.ask(first, examples[0][0], "every circle", "")
    assert [one.instruction for one in second.results] == ["every square", "every circle"] and second.shown == 1
    assert second.result.prediction.meta["cached"] and len(first.results) == 1
    other = asker.ask(second, examples[1][0], "every star", "")
    assert [one.instruction for one in other.results] == ["every star"]
    assert np.array_equal(other.result.image, Image.open(examples[1][0]).convert("RGB"))


def test_a_conversation_holds_its_picture_once(asker, examples, tmp_path):
    """Further questions are answered even when the upload has been removed meanwhile."""
    path = shutil.copy(examples[0][0], tmp_path)
    first = asker.ask(Conversation(), path, "every square", "")
    Path(path).unlink()
    second = asker.ask(first, path, "every circle", "")
    assert second.results[0].image is second.results[1].image


@pytest.mark.parametrize(
    ("path", "instruction", "phrases", "message"),
    [
        (None, "a", "", "Choose a picture first."),
        ("example", " ", " , ", "nothing is asked"),
        ("gone.png", "a", "", "The picture is no longer kept: choose it again."),
        ("text.png", "a", "", "are no picture"),
        ("huge.png", "a", "", "the picture has 10000 x 10000 pixels, more than 4,000,000"),
        ("long.png", "a", "", "the file has 2,000,001 bytes"),
        ("example", "a" * 1001, "", "a text has 1001 characters"),
    ],
)
def test_what_a_visitor_is_told(asker, examples, tmp_path, path, instruction, phrases, message):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "long.png").write_bytes(bytes(2_000_001))
    Image.new("L", (10_000, 10_000)).save(tmp_path / "huge.png")
    path = examples[0][0] if path == "example" else path and str(tmp_path / path)
    with pytest.raises(ValueError, match=message):
        asker.ask(Conversation(), path, instruction, phrases)


def test_a_picture_beyond_the_memory(asker, examples, monkeypatch):
    def answer(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(InstructSAM, "answer", answer)
    with pytest.raises(ValueError, match="a picture of 96x96 pixels: not enough memory"):
        asker.ask(Conversation(), examples[0][0], "every square", "")


def test_many_visitors(asker, examples):
    """The model is asked one question at a time, whoever asks."""
    expected = [asker.ask(Conversation(), path, text, "").result for path, text in examples]

    def one(k: int) -> bool:
        path, text = examples[k % len(examples)]
        found, wanted = asker.ask(Conversation(), path, text, "").result, expected[k % len(examples)]
        return found.answer == wanted.answer and np.allclose(found.scores, wanted.scores, atol=1e-4)

    with ThreadPoolExecutor(20) as visitors:
        assert all(visitors.map(one, range(40)))


def test_bytes_of_a_picture_in_memory(asker):
    """A picture that Pillow writes without a file is as good as any."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "WEBP")
    assert asker.limits.picture(buffer.getvalue()).size == (64, 64)


# ---- the command


@pytest.mark.parametrize("threshold", ["0", "0.01", "0.97", "nan"])
def test_a_threshold_that_the_slider_cannot_show(threshold, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo, "launch", lambda page, args: None)
    with pytest.raises(SystemExit) as end:
        demo.main(["--threshold", threshold])
    assert end.value.code == f"error: --threshold {float(threshold)}: the slider goes from 0.05 to 0.95"


@pytest.mark.parametrize("threshold", ["0.05", "0.95"])
def test_the_pictures_of_the_examples_live_as_long_as_the_server(threshold, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    while_shown = []
    monkeypatch.setattr(demo, "launch", lambda page, args: while_shown.extend(tmp_path.glob("*_examples_*/*.png")))
    demo.main(["--device", "cpu", "--threshold", threshold])
    assert len(while_shown) == 6
    assert not list(tmp_path.glob("*_examples_*"))
