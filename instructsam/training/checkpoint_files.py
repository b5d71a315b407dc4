"""Where checkpoints lie: whole or invisible, the newest ones and the best one kept.

OUTPUT_DIR/checkpoints/step_000500/      whole, unless the disk is damaged, which its checksums tell
OUTPUT_DIR/checkpoints/step_000600.tmp/  being written, or being removed
OUTPUT_DIR/checkpoints/best.json         {"step", "metric", "value"} of the best evaluation so far
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructsam.files import replace_text

logger = logging.getLogger(__name__)

FORMAT = 2
FOLDER = "checkpoints"
STATE_FILE, BEST_FILE = "state.json", "best.json"
_NAME = re.compile(r"^step_(\d+)$")


def path_of(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return Path(output_dir) / FOLDER / f"step_{step:06d}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint directories of a run from oldest to newest step, whole or damaged, without unfinished (.tmp) ones."""
    return [path for _, path in _numbered(output_dir)]


def find_damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be used (missing, truncated or altered files), or None for a sound one."""
    checkpoint = Path(checkpoint)
    try:
        state = read_state(checkpoint)
    except ValueError as error:
        return str(error)
    for name, expected in state["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _checksum(path) != expected["crc32"]:
            return f"the checksum of {name} is wrong"
    return None


def latest(output_dir: str | Path) -> Path | None:
    """Newest sound checkpoint of a run, or None; damaged ones are passed over with a warning."""
    for path in reversed(list_checkpoints(output_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("skipping damaged checkpoint %s: %s", path, damage)
    return None


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state.json of a checkpoint: format, step, fingerprint, files. ValueError if missing or not one of ours."""
    path = Path(checkpoint) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(state, dict) or not {"format", "step", "fingerprint", "files"} <= set(state):
        raise ValueError(f"{path} is not the state of a checkpoint")
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {state['format']}, this version continues format {FORMAT}: finish the run with the "
            "version that it was started with"
        )
    if state.pop("crc32", None) != _checksum_of(state):
        raise ValueError(f"the checksum of {path} is wrong")
    return state


def fingerprint_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two nested configurations, one text each: 'optim.lr is 0.1 there and 0.2 here'."""
    old, new = _flatten(there), _flatten(here)
    missing = "absent"
    differences = []
    for key in sorted({*old, *new}):
        first, second = old.get(key, missing), new.get(key, missing)
        if first != second:
            differences.append(f"{key} is {first!r} there and {second!r} here")
    return differences


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Complete a checkpoint that is being written: its state, with size and checksum of the other files and its own."""
    files = {path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path)} for path in sorted(folder.iterdir())}
    whole = json.loads(json.dumps({"format": FORMAT, **state, "files": files}))  # as it will be read
    text = json.dumps({**whole, "crc32": _checksum_of(whole)}, indent=1)
    (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def publish(temporary: Path, final: Path) -> None:
    """Make the data durable first and visible second."""
    for path in [*temporary.iterdir(), temporary]:
        _flush_to_disk(path)
    replaced = final.with_name(final.name + ".old.tmp")
    remove(replaced)
    if final.exists():  # a damaged one that the run has come past again
        final.rename(replaced)
    temporary.rename(final)
    _flush_to_disk(final.parent)
    remove(replaced)


def prune(output_dir: str | Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: none is removed) and the best one of a run that is at `step`.

    Later ones, damaged and passed over when the run resumed, do not count: the run will come past them again.
    """
    if not keep:
        return
    best = read_best(output_dir)
    done = [path for number, path in _numbered(output_dir) if number <= step]
    for path in done[:-keep]:
        if best is None or path != path_of(output_dir, best["step"]):
            # Renamed first: a kill in the middle must not leave half a checkpoint under a good name.
            doomed = path.with_name(path.name + ".tmp")
            remove(doomed)
            path.rename(doomed)
            remove(doomed)


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """The best evaluation so far that has a checkpoint: {"step", "metric", "value"}."""
    path = Path(output_dir) / FOLDER / BEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def note_best(output_dir: str | Path, metric: str, record: Mapping[str, Any]) -> None:
    """Note an evaluation, atomically, if it is better than the best so far: higher, or with "-NAME" lower.

    Args:
        record: {"step", "metrics"}.

    A figure that this evaluation lacks (nothing to average over, say) is no better one.
    """
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    value, best = record["metrics"].get(name), read_best(output_dir)
    if value is None or (best is not None and best["metric"] == metric and sign * value <= sign * best["value"]):
        return
    text = json.dumps({"step": record["step"], "metric": metric, "value": value}) + "\n"
    replace_text(Path(output_dir) / FOLDER / BEST_FILE, text)


def forget_best_after(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Drop the note of a best evaluation that comes after the checkpoint a run goes on from (None: from the start)."""
    best = read_best(output_dir)
    if best is not None and (checkpoint is None or best["step"] > read_state(checkpoint)["step"]):
        remove(Path(output_dir) / FOLDER / BEST_FILE)


def clean(output_dir: str | Path) -> None:
    """Remove what killed runs left behind unfinished."""
    for path in (Path(output_dir) / FOLDER).glob("*.tmp"):
        remove(path)


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    folder = Path(output_dir) / FOLDER
    if not folder.is_dir():
        return []
    paths = [(match, path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in paths)


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: values}


def _checksum_of(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
