"""Files that visitors take home."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from instructsam.inference.results import Result
from instructsam.segmenting.jobs import slug
from instructsam.webpage.asking import picture_of

FORMATS = {"PNG": "overlay.png", "COCO": "coco.json", "labelme": "labelme.json"}
"""What can be had, and how the names of the files end."""


class Downloads:
    """Writes them into a temporary folder, each into one of its own, and removes the old ones.

    Args:
        seconds: files are kept at least so long; Gradio takes a copy of each at once.
    """

    def __init__(self, seconds: float = 300):
        self.seconds = seconds
        self._root = tempfile.TemporaryDirectory(prefix="instructsam_")

    def write(self, result: Result, chosen: Sequence[int], format: str) -> str:
        """The path of a file, in one of `FORMATS`, of the instances with these indices."""
        self._remove_old()
        stem = slug(Path(result.name).stem)[:60] or "picture"
        path = Path(tempfile.mkdtemp(dir=self._root.name)) / f"{stem}_{FORMATS[format]}"
        if format == "PNG":
            picture_of(result, chosen).save(path)
        else:
            replace(result, found=tuple(result[k] for k in chosen)).save(path, format=format.lower())
        return str(path)

    def _remove_old(self) -> None:
        oldest = time.time() - self.seconds
        for folder in Path(self._root.name).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another visitor's click has just removed it
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
