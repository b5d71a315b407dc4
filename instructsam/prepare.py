"""Write a training set's sources to tables, once: training then starts at once.

    python -m instructsam.prepare data=stage1                       # all sources, into data.prepared
    python -m instructsam.prepare data=stage1 only=[refcoco,lvis]   # some of them
    python -m instructsam.prepare data=stage1 workers=4             # four sources at a time
    python -m instructsam.prepare data=stage1 force=true            # also those that are up to date

A table is left alone if its settings are those of the source and the annotation files it was made from have not changed
(`instructsam.data.source_files`; pictures are not looked at). Pictures of validation and test splits are left out here,
and counted (`instructsam.data.leakage`). Settings: `configs/prepare.yaml`. A table holds a source as a whole:
`data.limit` is for those who read it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from instructsam.configs_path import CONFIGS, complete_settings
from instructsam.data.checks import Skips
from instructsam.data.leakage import Leakage
from instructsam.data.picture_checks import number_of_workers
from instructsam.data.sources import (
    Source,
    check_files,
    choose,
    held_out_files,
    held_out_of,
    parse_sources,
    read_source,
    source_stamps,
    table_recipe,
)
from instructsam.data.table import SampleTable, write_table
from instructsam.lock import exclusive
from instructsam.structures import Sample

COLUMNS = ("samples", "turns", "masks", "no-target", "skipped", "held out", "seconds", "MB")


def prepare(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Bring the tables of all sources up to date.

    Args:
        settings: ``data`` as for `open_sources`, with ``on_bad`` and ``max_bad``; ``only``, names of sources;
            ``force``; ``workers``, null for one a core.

    Returns:
        The manifest of every table by source, those included that were left alone.

    Raises:
        ValueError: unknown settings or names, no folder to write to, missing files (all are named) before anything is
            read; sources that failed (all are named), when the others are done.
    """
    data = settings["data"]
    sources = choose(parse_sources(data.get("sources") or {}), settings.get("only"))
    workers = number_of_workers(settings["workers"], least=1)
    if not data.get("prepared"):
        raise ValueError(
            "data.prepared is null: training reads the files, and would not look at tables. To have tables, give "
            "data.prepared=FOLDER here, and to train and inspect too"
        )
    check_files(sources)
    files = held_out_files(sources, data)
    done: dict[str, dict[str, Any]] = {}
    for source in () if settings["force"] else sources:
        if (manifest := _up_to_date(source, data)) is not None:
            done[source.name] = manifest
            print(f"{source.name}: up to date ({manifest['counts']['samples']} samples)", flush=True)
    waiting = [source for source in sources if source.name not in done]
    held_out = held_out_of(waiting, data)
    if any(source.held_out for source in waiting):
        print(f"{len(held_out)} pictures of validation and test splits, from {len(files)} files", flush=True)
    failed: list[str] = []
    for source, result in _run(waiting, data, held_out, workers):
        if isinstance(result, Exception):
            failed.append(f"\n  {source.name}: {result}")
            print(f"{source.name}: failed: {result}", file=sys.stderr, flush=True)
        else:
            done[source.name] = result
            print(f"{source.name}: {_line(result)}", flush=True)
    in_order = {source.name: done[source.name] for source in sources if source.name in done}
    print(summary(in_order))
    for source in sources:
        found = in_order[source.name]["counts"]["samples"] if source.name in done else None
        if found is not None and source.expected not in (None, found):
            print(f"warning: {source.name}: {found} samples, expected {source.expected}", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} of {len(sources)} sources could not be prepared:{''.join(failed)}")
    return in_order


def _run(
    sources: Sequence[Source], data: Mapping[str, Any], held_out: Collection[int], workers: int
) -> Iterator[tuple[Source, dict[str, Any] | Exception]]:
    """Sources with their new manifests, or with what went wrong, in order."""
    tasks = [(source, data, held_out if source.held_out else ()) for source in sources]
    if workers == 1 or len(sources) < 2:
        yield from ((source, _prepare_one(task)) for source, task in zip(sources, tasks, strict=True))
        return
    # An interrupt ends the workers at once; what they leave behind is hidden, and removed by the next run.
    ended = (signal.SIGINT, signal.SIG_DFL)
    pool = ProcessPoolExecutor(min(workers, len(sources)), get_context("spawn"), signal.signal, ended)
    try:
        yield from zip(sources, pool.map(_prepare_one, tasks), strict=True)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that read a source was killed, for want of memory perhaps: fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_one(task: tuple[Source, Mapping[str, Any], Collection[int]]) -> dict[str, Any] | Exception:
    """Make one table; an error comes back as a value, so that the other sources go on."""
    source, data, held_out = task
    folder = table_folder(source, data)
    start = time.monotonic()
    skips = Skips(data.get("on_bad") or "raise", data.get("max_bad"))
    leakage = Leakage()
    info: dict[str, Any] = {"files": source_stamps(source, data), "skipped": skips.counts, "aside": skips.aside}

    def samples() -> Iterator[Sample]:
        read = read_source(source, skips, held_out, leakage)
        yield from tqdm(read, desc=source.name, unit=" samples", disable=None, leave=False)
        info.update(held_out=leakage.counts(), seconds=round(time.monotonic() - start, 1))

    try:
        with exclusive(folder.parent / ".locks" / source.name):
            return write_table(folder, samples(), table_recipe(source, data), info, skips)
    except (ValueError, OSError) as error:
        return error


def table_folder(source: Source, data: Mapping[str, Any]) -> Path:
    """Where the table of a source lies."""
    return Path(data["prepared"]) / source.name


def _up_to_date(source: Source, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a table that need not be made anew."""
    try:
        table = SampleTable(table_folder(source, data), table_recipe(source, data))
    except ValueError:
        return None
    return table.manifest if table.manifest["info"].get("files") == source_stamps(source, data) else None


# ---- what is printed ------------------------------------------------------------------------------------------------


def _figures(manifest: Mapping[str, Any]) -> tuple[float, ...]:
    """In the order of `COLUMNS`."""
    counts, info = manifest["counts"], manifest["info"]
    size = sum(entry["bytes"] for entry in (manifest["sizes"], *manifest["shards"]))
    own = (counts["samples"], counts["turns"], counts["masks"], counts["no_target"])
    return (*own, sum(info["skipped"].values()), info["held_out"]["pictures"], info["seconds"], round(size / 1e6, 1))


def _line(manifest: Mapping[str, Any]) -> str:
    """One source in words."""
    samples, turns, masks, no_target, *_, seconds, size = _figures(manifest)
    parts = [f"{samples} samples, {turns} turns, {masks} masks, {no_target} no-target"]
    if skipped := manifest["info"]["skipped"]:
        parts.append("skipped " + ", ".join(f"{number} {what}" for what, number in sorted(skipped.items())))
    if aside := manifest["info"]["aside"]:
        parts.append("cannot be used: " + ", ".join(f"{number} {what}" for what, number in sorted(aside.items())))
    if (dropped := manifest["info"]["held_out"])["samples"]:
        parts.append(
            f"left out {dropped['samples']} samples about {dropped['pictures']} pictures of validation and test splits"
        )
    if dropped["unknown"]:
        parts.append(
            f"warning: kept {dropped['unknown']} samples though their pictures' names give no COCO id to tell by"
        )
    return "; ".join([*parts, f"{seconds} s, {size} MB"])


def summary(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """All sources as a table. A picture held out of several sources counts in each."""
    rows = {name: _figures(manifest) for name, manifest in manifests.items()}
    rows["total"] = tuple(round(sum(column), 1) for column in zip(*rows.values(), strict=True))
    width = max(map(len, rows))
    lines = [f"{'source':{width}}" + "".join(f"{name:>11}" for name in COLUMNS)]
    lines += [f"{name:{width}}" + "".join(f"{value:>11}" for value in values) for name, values in rows.items()]
    return "\n".join(lines)


@hydra.main(config_path=CONFIGS, config_name="prepare", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = complete_settings(config)
    try:
        prepare(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
