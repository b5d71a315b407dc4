"""Pictures to segment, and the command as it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from instructsam import segment as command


@pytest.fixture
def photos(world, tmp_path) -> Path:
    """Three pictures, two of them called alike, and a file that is none."""
    folder = tmp_path / "photos"
    for name, source in (("a.png", 0), ("b.PNG", 1), ("more/a.png", 2)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((world / f"val/images/{source:06d}.png").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def usual(checkpoint, tmp_path) -> list[object]:
    """Arguments with which the untrained model finds something, and ``out`` is the output folder."""
    return ["--checkpoint", checkpoint, "--device", "cpu", "--threshold", "0", "--output", tmp_path / "out"]


@pytest.fixture
def run() -> Callable[..., int]:
    """Runs the command; gives its exit status."""

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            command.main([str(argument) for argument in arguments])
        return ended.value.code

    return call


@pytest.fixture
def lines() -> Callable[[Path], list[dict]]:
    """Reads the results in an output folder."""
    return lambda folder: [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
