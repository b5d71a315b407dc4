"""The files that a source is read from, and whether they changed since a table was made of them.

A file's stamp is its size and the time it was changed. Stamped are the annotation files that a reader reads (`FILES`),
files among ``needs``, and for sources with ``held_out`` the files of refs. Pictures, and masks that are PNG files, are
not: looking at each of them would take as long as reading the source.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

Stamps = dict[str, list[int]]
"""Path -> [size in bytes, time of change in ns]."""

_NAMED = 3


def _in_root(options: Mapping[str, Any]) -> list[str]:
    """A file below ``root``, as the readers of benchmarks have it."""
    return [f"{options['root']}/{str(options['file']).replace('{split}', str(options['split']))}"]


def _at_file(options: Mapping[str, Any]) -> list[str]:
    return [options["file"]]


FILES: dict[str, Callable[[Mapping[str, Any]], Sequence[str | Path]]] = {
    "coco_instructions": lambda options: [
        f"{options['root']}/{options['split']}/{name}" for name in ("instances.json", "instructions.jsonl")
    ],
    "referring": lambda options: [
        f"{options['root']}/{options['folder']}/{name}" for name in (options["refs"], "instances.json")
    ],
    "release_eval": _in_root,
    "gseval": _in_root,
    "reasonseg": lambda options: [f"{options['root']}/{options['split']}/*.json"],
    "release_train": _at_file,
    "coco_categories": _at_file,
    "coco_parts": _at_file,
    "png_masks": _at_file,
    "lisa_plus": lambda options: [options["file"], options["instances"]],
}
"""Reader -> files or patterns of them, from the reader's arguments."""


def stamps(reader: str, options: Mapping[str, Any], *others: Iterable[str]) -> Stamps:
    """Those of the files that are there: the reader's, and those among ``others``, files or patterns too."""
    named = FILES[reader](options) if reader in FILES else ()
    paths: set[Path] = set()
    for name in map(str, chain(named, *others)):
        paths.update(map(Path, [name, *glob.glob(name)]))
    found = {str(path): path.stat() for path in sorted(paths) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def check_stamps(before: Mapping[str, Sequence[int]], now: Stamps) -> None:
    """Raises ValueError, naming files that are there now and are not as they were; a file that is gone is no fault."""
    changed = [name for name, stamp in now.items() if list(before.get(name, ())) != stamp]
    if changed:
        names = ", ".join(changed[:_NAMED]) + (", ..." if len(changed) > _NAMED else "")
        raise ValueError(f"{names}: new or changed since the table was prepared")
