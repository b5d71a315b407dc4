"""Predictions on disk while they are made, so that a killed evaluation goes on where it was.

Beside PREDICTIONS.jsonl, until it is complete, stands the folder PREDICTIONS.parts with one file a rank: a header line
with the run's fingerprint, then one line a finished record. At the end the lines are put in the items' order and moved
to PREDICTIONS.jsonl in one step; PREDICTIONS.run.json beside it keeps the fingerprint. The folder has to be on a disk
that all ranks see.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instructsam.evaluation.fingerprint import differences
from instructsam.files import json_object

Record = dict[str, Any]

RESUMED = "resumed.jsonl"  # what earlier runs left, taken together
WAY_OUT = "take another output_dir, or restart=true to throw away what is there"


def parts_of(path: Path) -> Path:
    """The folder of unfinished parts of a file of predictions."""
    return path.with_suffix(".parts")


def run_file_of(path: Path) -> Path:
    """The fingerprint of the run that made a file of predictions."""
    return path.with_suffix(".run.json")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One run at a time may write these predictions; the lock ends with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is evaluating there; wait for it or stop it") from None
        yield


def begin(path: Path, ids: Sequence[str], fingerprint: Mapping[str, Any], restart: bool) -> set[str]:
    """Take up what an earlier run of the same fingerprint left; one rank does it, before any opens a `Part`.

    Args:
        path: the file that the predictions will be in.
        ids: of all items of the run.
        restart: throw away what is there.

    Returns:
        The ids that are finished.

    Raises:
        ValueError: what is there comes from another run (the message says what differs), or is damaged.
    """
    parts = parts_of(path)
    if restart:
        for file in (path, run_file_of(path)):
            file.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    if path.exists():
        _check_complete(path, ids, fingerprint)
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed after its last step but one
        return set(ids)
    parts.mkdir(parents=True, exist_ok=True)
    files = sorted(parts.glob("*.jsonl"))
    lines = _finished(files, fingerprint)
    if strangers := sorted(lines.keys() - set(ids)):
        raise ValueError(f"{parts}: holds {strangers[0]!r}, which is no instruction of this run; {WAY_OUT}")
    _write(parts / RESUMED, [_line({"fingerprint": fingerprint}), *lines.values()])
    for file in files:
        if file.name != RESUMED:
            file.unlink()
    return set(lines)


class Part:
    """One rank's own file of finished records; every `append` is on disk before it returns."""

    def __init__(self, path: Path, rank: int, fingerprint: Mapping[str, Any]):
        self._file = (parts_of(path) / f"rank-{rank:05d}.jsonl").open("wb")
        self._write([_line({"fingerprint": fingerprint})])

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add finished records."""
        self._write([_line(record) for record in records])

    def close(self) -> None:
        """No more records come."""
        self._file.close()

    def _write(self, lines: list[bytes]) -> None:
        self._file.writelines(lines)
        self._file.flush()


def merge(path: Path, ids: Sequence[str], fingerprint: Mapping[str, Any]) -> None:
    """All parts in the order of `ids` to `path`, in one step; one rank does it, after all have closed their parts.

    Raises:
        ValueError: records are missing.
    """
    if path.exists():
        return
    parts = parts_of(path)
    lines = _finished(sorted(parts.glob("*.jsonl")), fingerprint)
    if missing := [name for name in ids if name not in lines]:
        raise ValueError(
            f"{parts}: {len(missing)} of {len(ids)} records are missing (first: {missing[0]!r}); do all processes "
            "write to the same disk?"
        )
    _write(run_file_of(path), [json.dumps(fingerprint, indent=2).encode() + b"\n"])
    _write(path, [lines[name] for name in ids])
    shutil.rmtree(parts)


def read_records(path: str | Path) -> list[Record]:
    """The records of a file of predictions.

    Raises:
        ValueError: naming file and line, if it cannot be read or is none.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = json_object(line, f"{path}:{number}")
            if "id" not in record:
                raise ValueError(f"{path}:{number}: is no record, it has no id")
            records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no records")
    return records


# ---- files and lines --------------------------------------------------------------------------------------------


def _check_complete(path: Path, ids: Sequence[str], fingerprint: Mapping[str, Any]) -> None:
    """ValueError unless `path` holds the predictions of this very run."""
    try:
        there = json.loads(run_file_of(path).read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path}: is there already, of a run that nothing is known about; {WAY_OUT}") from None
    _check_same(path, there, fingerprint)
    if [record["id"] for record in read_records(path)] != list(ids):
        raise ValueError(f"{path}: does not hold the instructions of its own run, has it been edited? {WAY_OUT}")


def _check_same(path: Path, there: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    if found := differences(there, json.loads(json.dumps(fingerprint))):
        raise ValueError(f"{path}: holds predictions of another run ({'; '.join(found)}); {WAY_OUT}")


def _finished(files: Sequence[Path], fingerprint: Mapping[str, Any]) -> dict[str, bytes]:
    """The lines of all finished records by id; of one that several files hold, the first."""
    lines: dict[str, bytes] = {}
    for file in files:
        whole = file.read_bytes().splitlines(keepends=True)
        if whole and not whole[-1].endswith(b"\n"):
            whole.pop()  # torn: the process was killed while it wrote this line
        if not whole:
            continue
        _check_same(file, json_object(whole[0], f"{file}:1").get("fingerprint", {}), fingerprint)
        for number, line in enumerate(whole[1:], 2):
            record = json_object(line, f"{file}:{number}")
            if "id" not in record:
                raise ValueError(f"{file}:{number}: is no record, it has no id; {WAY_OUT}")
            lines.setdefault(record["id"], line)
    return lines


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _write(path: Path, lines: Sequence[bytes]) -> None:
    """Under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
