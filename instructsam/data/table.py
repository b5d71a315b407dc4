"""Samples on disk: a folder that is written once and from which any sample is read at any time.

Layout::

    FOLDER/00000.arrow, 00001.arrow ...   Arrow IPC files, one row a sample (`instructsam.data.table_rows`)
    FOLDER/sizes.npy                      (11, samples) int32, the fields of `SampleSizes`
    FOLDER/manifest.json                  {"version": 2, "recipe": {...}, "info": {...}, "counts": {...},
                                           "instances_per_phrase": {"0": 12, "1": 3456, ...}, "batch_rows": 64,
                                           "sizes": {"name", "rows", "bytes", "sha256"},
                                           "shards": [{"name", "rows", "bytes", "sha256"}, ...]}

The recipe is what the samples depend on besides their source files; a table of another recipe is not opened. Any Arrow
library reads the shards: ``pandas.read_feather("00000.arrow")``.

Files are mapped into memory and never read as a whole. A process that reads everything in the course of an epoch would
have every page it touched counted as its own memory, so pages are given back after every so many samples; the system's
file cache keeps them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from instructsam.data.checks import Place, Skips, read_json
from instructsam.data.samples import SIZES, SampleSizes, measure
from instructsam.data.table_rows import SCHEMA, from_row, to_row
from instructsam.structures import Sample

VERSION = 2
MANIFEST = "manifest.json"
_BATCH_ROWS = 64
_SHARD_BYTES = 2**28
_READS_KEPT = 32
"""Pages are given back after so many samples: a fault maps up to 16 pages around the one that is wanted. Doing so after
every sample would cost more time than reading it."""


# ---- writing --------------------------------------------------------------------------------------------------------


def write_table(
    folder: Path | str,
    samples: Iterable[Sample],
    recipe: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    skips: Skips | None = None,
    shard_bytes: int = _SHARD_BYTES,
    batch_rows: int = _BATCH_ROWS,
) -> dict[str, Any]:
    """Write samples as they come; the folder takes its name when it is complete, in place of an older one.

    For one process at a time: what one that was killed left behind is removed.

    Args:
        recipe: what the samples depend on; its values are those of JSON.
        info: whatever else is to be kept in the manifest, as it is when all samples are read.
        skips: what to do about samples that cannot be written; raises at the first by default.
        shard_bytes: a file is ended when it is that large.
        batch_rows: samples that are in memory at a time, and that are written together.

    Returns:
        The manifest.

    Raises:
        ValueError: no sample; one that cannot be written, by its id; and whatever reading them raises.
    """
    folder, tally = Path(folder), _Tally()
    with _replacing(folder) as unfinished:
        batches = _batches(samples, skips or Skips(), tally, batch_rows)
        batch, shards = next(batches, None), []
        for number in count():
            if batch is None:
                break
            path, rows = unfinished / f"{number:05}.arrow", 0
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                while batch is not None and file.tell() < shard_bytes:
                    writer.write_batch(batch)
                    rows += batch.num_rows
                    batch = next(batches, None)
            shards.append(_described(path, rows))
        if not shards:
            raise ValueError(f"{folder}: no sample to write")
        sizes = np.concatenate(tally.sizes).T
        np.save(unfinished / "sizes.npy", np.ascontiguousarray(sizes))
        manifest = {
            "version": VERSION,
            "recipe": recipe,
            "info": dict(info or {}),
            "counts": tally.counts(),
            "instances_per_phrase": {str(number): tally.instances[number] for number in sorted(tally.instances)},
            "batch_rows": batch_rows,
            "sizes": _described(unfinished / "sizes.npy", sizes.shape[1]),
            "shards": shards,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return read_json(folder / MANIFEST)


@dataclass
class _Tally:
    """What is counted while samples pass; sizes are those of `SampleSizes`, (samples, 11) a batch."""

    sizes: list[np.ndarray] = field(default_factory=list)
    instances: Counter[int] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        self.instances.update(len(phrase.rles) for turn in sample.turns for phrase in turn.phrases)
        self.by_kind.update({turn.kind for turn in sample.turns})

    def counts(self) -> dict[str, Any]:
        totals = sum(block.sum(axis=0, dtype=np.int64) for block in self.sizes)
        named = dict(zip(SIZES, np.asarray(totals).tolist(), strict=True))
        return {
            "samples": sum(map(len, self.sizes)),
            "turns": named["turns"],
            "phrases": named["phrases"],
            "masks": named["masks"],
            "no_target": self.instances[0],
            "samples_by_kind": dict(sorted(self.by_kind.items())),
        }


def _batches(samples: Iterable[Sample], skips: Skips, tally: _Tally, rows: int) -> Iterator[pa.RecordBatch]:
    """Rows in blocks of that many; only the last may be shorter."""
    block: list[dict[str, Any]] = []
    sizes: list[tuple[int, ...]] = []

    def finished() -> pa.RecordBatch:
        batch = pa.RecordBatch.from_pylist(block, schema=SCHEMA)
        tally.sizes.append(np.array(sizes, dtype=np.int32))
        block.clear()
        sizes.clear()
        return batch

    for sample in samples:
        with skips.entry("samples", Place(sample.id)):
            row, measured = to_row(sample), measure(sample)
            block.append(row)
            sizes.append(measured)
            tally.add(sample)
        if len(block) == rows:
            yield finished()
    if block:
        yield finished()


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of ``folder`` at the end, and is removed if anything fails."""
    unfinished, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(unfinished, ignore_errors=True)
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _described(path: Path, rows: int) -> dict[str, Any]:
    return {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


class SampleTable:
    """Samples of a folder that `write_table` made, read one by one. Goes to other processes as its path alone.

    Args:
        folder: of the table.
        recipe: what the caller wants; None takes any.

    Attributes:
        manifest: see the head of this file.

    Raises:
        ValueError: there is no table, it has another recipe (names what differs), it was written by another version, a
            file is missing or has another length.
    """

    def __init__(self, folder: Path | str, recipe: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if recipe is not None and (differing := recipe_differences(self.manifest["recipe"], recipe)):
            raise ValueError(f"{self.folder}: was prepared with other settings: {'; '.join(differing)}")
        for entry in self._files():
            path = self.folder / entry["name"]
            found = path.stat().st_size if path.is_file() else None
            if found != entry["bytes"]:
                reason = "is missing" if found is None else f"has {found} bytes instead of {entry['bytes']}"
                raise ValueError(f"{path}: {reason}; prepare the table anew (force=true)")
        self._ends = np.cumsum([shard["rows"] for shard in self.manifest["shards"]])
        self._open: dict[int, tuple[mmap.mmap, pa.RecordBatchFileReader]] = {}
        self._reads = 0

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def sizes(self) -> SampleSizes:
        return SampleSizes(*np.load(self.folder / self.manifest["sizes"]["name"]))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = int(index) - (int(self._ends[shard - 1]) if shard else 0)
        number, row = divmod(row, self.manifest["batch_rows"])
        found = self._reader(shard).get_batch(number).slice(row, 1).to_pylist()[0]
        self._reads += 1
        if self._reads % _READS_KEPT == 0:
            for mapped, _ in self._open.values():
                mapped.madvise(mmap.MADV_DONTNEED)
        return from_row(found)

    def verify(self) -> None:
        """Read all files once and compare their checksums. Raises ValueError naming those that differ."""
        wrong = [entry["name"] for entry in self._files() if _sha256(self.folder / entry["name"]) != entry["sha256"]]
        if wrong:
            raise ValueError(f"{self.folder}: {', '.join(wrong)} changed since the table was prepared (force=true)")

    def _files(self) -> list[dict[str, Any]]:
        return [self.manifest["sizes"], *self.manifest["shards"]]

    def _reader(self, shard: int) -> pa.RecordBatchFileReader:
        """The open shard; each process maps it when it first needs it."""
        if shard not in self._open:
            with (self.folder / self.manifest["shards"][shard]["name"]).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)  # neighbours in the file are not wanted next
            options = pa.ipc.IpcReadOptions(use_threads=False)  # threads do not survive a fork
            self._open[shard] = mapped, pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)), options=options)
        return self._open[shard][1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "sizes"} | {"_open": {}}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a table. Raises ValueError where there is none that this version reads."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: is not prepared")
    manifest = read_json(path)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise ValueError(f"{folder}: was prepared by another version (format {version}, here {VERSION})")
    return manifest


def recipe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between the recipe of a table and another, as ``name: old, now new``."""
    before, now = _flat(json.loads(json.dumps(found))), _flat(json.loads(json.dumps(wanted)))
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {json.dumps(before.get(name))}, now {json.dumps(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
