"""The output folder of the segment command: results as they come, so that an interrupted run goes on.

run.json        what all results depend on
results.jsonl   a line for each job: its id, what was asked, the picture's state, and the result or the error; of those
                with one id the last one counts
overlays/ID.png, masks/ID/01_PHRASE.png, labelme/ID.json, coco.json: as wanted
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from instructsam.errors import DataError
from instructsam.files import json_object, replace_text, replacing
from instructsam.inference.coco import coco_dataset
from instructsam.inference.inputs import read_picture
from instructsam.inference.results import Result
from instructsam.lock import exclusive
from instructsam.segmenting.jobs import OUTPUTS, RUN, FileJob, free_id, slug, state_of

RESULTS, COCO = "results.jsonl", "coco.json"
WAY_OUT = "choose another folder, or --restart"


def line_of(job: FileJob, outcome: Result | Exception) -> dict[str, Any]:
    """A job and what came of it as plain data."""
    said = {"error": str(outcome)} if isinstance(outcome, Exception) else {"result": outcome.to_dict()}
    return {"id": job.id, "asked": job.asked, "picture": job.picture, **said}


def _is_about(line: Mapping[str, Any], job: FileJob) -> bool:
    """Whether the same was asked about the same file, however the file was called then and whatever it held."""
    texts = ("instruction", "phrases")
    return line["picture"]["path"] == job.picture["path"] and all(line["asked"][t] == job.asked[t] for t in texts)


class ResultStore:
    """Writes results, from `start` on; knows which jobs are done.

    Args:
        folder: is made if need be; held for this process as long as the store is open.
        settings: what all results depend on, as plain JSON.
        kinds: what to write besides results.jsonl.
        restart: throw away what earlier commands wrote there, instead of going on with it.

    Raises:
        ValueError: a folder that cannot be written to, results of other settings are there, a line that is no result,
            another process is at work.
    """

    _file: TextIO

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], kinds: Sequence[str], restart: bool = False):
        self.folder, self.settings, self.kinds, self.restart = Path(folder), dict(settings), tuple(kinds), restart
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(self.folder))
                if not os.access(self.folder, os.W_OK):  # the lock may be there from better times
                    raise PermissionError("permission denied")
            except OSError as error:
                raise ValueError(f"{self.folder}: no folder that can be written to ({error})") from error
            if not restart:
                self._check_settings()
            self.lines = {} if restart else {line["id"]: line for line in self._read()}
            self._held = held.pop_all()

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _check_settings(self) -> None:
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / RESULTS).exists():
                raise ValueError(f"{self.folder}: holds {RESULTS} without {RUN}; {WAY_OUT}")
            return
        try:
            there = json_object(path.read_bytes(), path)
        except ValueError as error:
            raise ValueError(f"{error}; {WAY_OUT}") from None
        for key in dict.fromkeys([*there, *self.settings]):
            if there.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.folder}: its results are of {key} {there.get(key)!r}, not {self.settings.get(key)!r}; "
                    f"{WAY_OUT} to throw them away"
                )

    def _read(self) -> Iterator[dict[str, Any]]:
        path = self.folder / RESULTS
        if not path.exists():
            return
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):  # the line that a kill cut off
            with path.open("rb+") as file:
                file.truncate(end)
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                values = json_object(line, f"{path}:{number}")
                values["id"], values["asked"]["phrases"], values["picture"]["path"]
            except ValueError as error:
                raise ValueError(f"{error}; {WAY_OUT}") from None
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: is no result ({error}); {WAY_OUT}") from None
            yield values

    def claim(self, jobs: Sequence[FileJob]) -> list[FileJob]:
        """The jobs; those whose id another question has taken get a free one."""
        taken = {job.id for job in jobs}
        claimed = []
        for job in jobs:

            def is_taken(name: str, job: FileJob = job) -> bool:
                line = self.lines.get(name)
                return (name != job.id and name in taken) or (line is not None and not _is_about(line, job))

            claimed.append(replace(job, id=free_id(job.id, is_taken)))
            taken.add(claimed[-1].id)
        return claimed

    def is_done(self, job: FileJob) -> bool:
        """Whether there is a result of this question about this state of its picture; what failed is tried again."""
        line = self.lines.get(job.id, {})
        return "result" in line and _is_about(line, job) and line["picture"] == job.picture

    def start(self) -> None:
        """Begin to write; throws away what is there, if that is wanted.

        Raises:
            OSError: it cannot be written or thrown away.
        """
        if self.restart and ((self.folder / RUN).exists() or (self.folder / RESULTS).exists()):
            for name in OUTPUTS:
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            for name in (COCO, RESULTS, RUN):
                (self.folder / name).unlink(missing_ok=True)
        replace_text(self.folder / RUN, json.dumps(self.settings, indent=1) + "\n")
        self._file = self._held.enter_context((self.folder / RESULTS).open("a", encoding="utf-8"))

    def add(self, job: FileJob, outcome: Result | Exception) -> dict[str, Any]:
        """Write a job's result with its files, or why it failed; returns its line."""
        if isinstance(outcome, Result) and state_of(job.image) != job.picture:
            outcome = DataError(f"{job.image}: was changed while it was asked about; the same command asks anew")
        line = line_of(job, outcome)
        self._remove_files(job.id)
        if isinstance(outcome, Result):
            self._write_files(line, outcome, self.kinds)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.lines[job.id] = line
        return line

    def complete(self, job: FileJob) -> dict[str, Any]:
        """Write what is wanted and missing of a job that is done; returns its line, or one that says why it failed."""
        line = self.lines[job.id]
        missing = [kind for kind in self.kinds if not all(path.exists() for path in self._files(line, kind))]
        if missing:
            try:
                image = read_picture(job.image)
            except DataError as error:
                return line_of(job, error)
            self._write_files(line, Result.from_dict(line["result"], image), missing)
        return line

    def _files(self, line: Mapping[str, Any], kind: str) -> list[Path]:
        """The files of one kind that belong to a result."""
        name = line["id"]
        if kind == "masks":
            phrases = [slug(instance["phrase"])[:60] for instance in line["result"]["instances"]]
            return [self.folder / f"masks/{name}/{number:02d}_{phrase}.png" for number, phrase in enumerate(phrases, 1)]
        files = {"overlay": [f"overlays/{name}.png"], "labelme": [f"labelme/{name}.json"], "coco": []}[kind]
        return [self.folder / file for file in files]

    def _remove_files(self, name: str) -> None:
        for file in (f"overlays/{name}.png", f"labelme/{name}.json"):
            (self.folder / file).unlink(missing_ok=True)
        if (self.folder / "masks" / name).exists():
            shutil.rmtree(self.folder / "masks" / name)

    def _write_files(self, line: Mapping[str, Any], result: Result, kinds: Sequence[str]) -> None:
        for kind in kinds:
            paths = self._files(line, kind)
            if kind == "overlay":
                _write_image(paths[0], result.plot())
            elif kind == "masks":
                for path, instance in zip(paths, result, strict=True):
                    _write_image(path, Image.fromarray(instance.mask))
            elif kind == "labelme":
                image_path = os.path.relpath(line["picture"]["path"], os.path.realpath(paths[0].parent))
                replace_text(paths[0], json.dumps(result.to_labelme(image_path=image_path)))

    def finish(self, jobs: Sequence[FileJob]) -> None:
        """Write coco.json of these jobs' results, if it is wanted."""
        if "coco" in self.kinds:
            done = [job for job in jobs if self.is_done(job)]
            results = [{**self.lines[job.id]["result"], "image": str(job.image)} for job in done]
            replace_text(self.folder / COCO, json.dumps(coco_dataset(results)))


def _write_image(path: Path, image: Image.Image) -> None:
    with replacing(path) as part:
        image.save(part, "PNG")
