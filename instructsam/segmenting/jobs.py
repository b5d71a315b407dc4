"""What the segment command is to do: pictures from files, folders and patterns, or a JSONL of jobs."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instructsam.files import json_object
from instructsam.words import are_phrases, asked_by, fault_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FIELDS = ("image", "instruction", "phrases", "id")
RUN = "run.json"
OUTPUTS = ("overlays", "masks", "labelme")
"""Folders that the command writes beside `RUN`: later walks leave them out."""
MAX_ID = 150
"""Bytes of an id: a file name may have 255, and an id is not all of it."""


@dataclass(frozen=True)
class FileJob:
    """One question about one picture file.

    Attributes:
        id: names its results and is theirs alone.
        where: the line of a file of jobs that it stands in, for messages.
        picture: `state_of` the picture when the job was made, before anything is read.
    """

    id: str
    image: Path
    instruction: str | None
    phrases: tuple[str, ...] | None
    where: str = field(default="", compare=False)
    picture: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.picture:  # `replace` hands it on
            object.__setattr__(self, "picture", state_of(self.image))

    @property
    def text(self) -> str:
        """The instruction; with phrases alone, the phrases."""
        return asked_by(self.instruction, self.phrases)

    @property
    def asked(self) -> dict[str, Any]:
        """The question as it was given."""
        phrases = None if self.phrases is None else list(self.phrases)
        return {"image": str(self.image), "instruction": self.instruction, "phrases": phrases}


def state_of(path: Path) -> dict[str, Any]:
    """What tells a file from others and from itself before a change: resolved path, bytes, time of the last change."""
    state: dict[str, Any] = {"path": str(path), "bytes": None, "mtime_ns": None}
    with suppress(OSError, ValueError):  # not there, or no path at all: reading it says which
        state["path"] = os.path.realpath(path)
        status = os.stat(path)
        state |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return state


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """The picture files that are named: as they are, all in a folder (and in those inside it), or all of a pattern.

    Of a folder, hidden files and folders are left out, and what this command wrote there.

    Raises:
        ValueError: an input that is not there, or in which there is no picture.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            inside = sorted(_walk(path))
            if not inside:
                raise ValueError(f"{path}: no picture in this folder (looked for {', '.join(PICTURES)})")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
            if not matches:
                raise ValueError(f"{name}: no file fits this pattern")
            found += matches
        else:
            raise ValueError(f"{name}: no such file or folder")
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        written = OUTPUTS if RUN in files else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in written]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        yield from (path for path in paths if path.suffix.lower() in PICTURES and path.is_file())


def jobs_of(pictures: Sequence[Path], instructions: Sequence[str], phrases: Sequence[str]) -> list[FileJob]:
    """Every instruction about every picture; with phrases alone, one answer of all of them about each.

    Raises:
        ValueError: nothing asked, an empty text, phrases for several instructions.
    """
    if not instructions and not phrases:
        raise ValueError("nothing is asked: give --instruction, --phrase or --jobs")
    for name, texts in (("instruction", instructions), ("phrase", phrases)):
        if not all(text.strip() for text in texts):
            raise ValueError(f"an empty --{name}")
    if phrases and len(instructions) > 1:
        raise ValueError("--phrase is the answer to one instruction, and several are given")
    said = tuple(phrases) or None
    asked: list[tuple[str | None, tuple[str, ...] | None]] = [(text, said) for text in instructions] or [(None, said)]
    return named([FileJob("", picture, text, words) for picture in pictures for text, words in asked])


def read_jobs(path: str | Path) -> list[FileJob]:
    """Jobs of a JSONL file: ``image`` (seen from the file's folder), ``instruction`` or ``phrases``, perhaps ``id``.

    Raises:
        ValueError: no such file, a line that is no job (its number and the reason), an id that occurs twice.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # splitlines also cuts at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    jobs = [_read_job(line, f"{path}:{number}", path.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise ValueError(f"{path}: holds no job")
    for name, count in Counter(job.id for job in jobs if job.id).items():
        if count > 1:
            raise ValueError(f"{path}: {count} jobs have the id {name!r}")
    return named(jobs)


def _read_job(line: str, where: str, folder: Path) -> FileJob:
    values = json_object(line, where, f"an object with {', '.join(FIELDS)}")
    if unknown := sorted(set(values) - set(FIELDS)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}, expected {', '.join(FIELDS)}")
    image, instruction, phrases = values.get("image"), values.get("instruction"), values.get("phrases")
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where}: image must be the path of a picture, got {image!r}")
    if instruction is not None and (fault := fault_of(instruction)):
        raise ValueError(f"{where}: the instruction {fault}")
    if phrases is not None and not are_phrases(phrases):
        raise ValueError(f"{where}: phrases must be a list of words, got {phrases!r}")
    if instruction is None and phrases is None:
        raise ValueError(f"{where}: neither an instruction nor phrases")
    name = values.get("id", "")
    if not isinstance(name, str) or name != identifier(name):
        form = f"letters, digits, '.', '_' and '-', at most {MAX_ID} bytes"
        raise ValueError(f"{where}: id must be of {form} (it names files), got {name!r}")
    return FileJob(name, folder / image, instruction, None if phrases is None else tuple(phrases), where)


def slug(text: str) -> str:
    """A text with everything replaced that a file name should not have."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._")


def identifier(text: str) -> str:
    """The `slug` of a text; one of more than `MAX_ID` bytes is cut, and ends in a hash of the whole."""
    name = slug(text)
    if len(name.encode()) <= MAX_ID:
        return name
    return f"{name.encode()[: MAX_ID - 10].decode(errors='ignore')}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def free_id(base: str, is_taken: Callable[[str], bool]) -> str:
    """The first of ``base``, ``base.2``, ``base.3`` … that is not taken."""
    names = itertools.chain([base], (f"{base}.{number}" for number in itertools.count(2)))
    return next(name for name in names if not is_taken(name))


def named(jobs: Sequence[FileJob]) -> list[FileJob]:
    """Jobs without an id get one: the picture's name, with its folders where two are called alike, and a number where
    there are several about one picture. It depends on the jobs before it only where names clash."""
    taken = {job.id for job in jobs if job.id}
    stems = Counter(job.image.stem for job in {job.image: job for job in jobs if not job.id}.values())
    result = []
    for job in jobs:
        if not job.id:
            unique = stems[job.image.stem] == 1
            base = identifier(job.image.stem if unique else str(job.image.with_suffix(""))) or "picture"
            job = replace(job, id=free_id(base, taken.__contains__))
            taken.add(job.id)
        result.append(job)
    return result
