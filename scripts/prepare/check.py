"""Is the data where the configurations look for it, and is it all there?

    python scripts/prepare/check.py                    everything
    python scripts/prepare/check.py refer reasonseg    what these scripts prepare
    python scripts/prepare/check.py leakage            pictures of validation and test splits in the training sets

Prints a line for each thing found, expected, and "ok", "WRONG" or "missing"; exit status 1 unless all are ok. Where
files are looked for and how many sentences a split has comes from configs/data and configs/benchmark; what a source or
a benchmark does not say is only counted ("–"). Nothing is changed: `python -m instructsam.prepare` leaves the pictures
out that "leakage" counts, `python -m instructsam.validate` looks into the records.
"""

from __future__ import annotations

import argparse
import functools
import glob
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from instructsam.configs_path import CONFIGS
from instructsam.data.json_stream import stream_json
from instructsam.data.leakage import TRAIN, coco_id, held_out_images, read_refs
from instructsam.data.sources import Source, parse_sources

MIXTURES = ("stage1", "stage2", "originals")
# Whose data a script prepares. A training set names its script itself.
BENCHMARKS = {
    "refer": ("refcoco", "refcoco_plus", "refcocog", "grefcoco"),
    "reasonseg": ("reasonseg",),
    "gseval": ("gseval", "saco"),
    "release": ("grefcoco_release", "reasonseg_release", "roborefit", "inst2seg"),
}
GROUPS = ("coco", "refer", "lvis", "objects365", "parts", "reasonseg", "lisa", "roborefit", "gseval", "release")
NAMES = (*GROUPS, "leakage")
PICTURES = {"data/coco/train2014": 82783, "data/coco/train2017": 118287}
FIRST_RECORDS = 20
OK, WRONG, MISSING = "ok", "WRONG", "missing"


class Row(NamedTuple):
    name: str
    found: str
    expected: str
    state: str


def counted(name: str, found: int, expected: int | None) -> Row:
    return Row(
        name, f"{found:,}", "–" if expected is None else f"{expected:,}", OK if expected in (None, found) else WRONG
    )


def missing(path: str | Path) -> Row:
    return Row(str(path), "–", "there", MISSING)


def there(path: str) -> Row:
    return Row(path, "there", "there", OK) if Path(path).exists() else missing(path)


def checked(name: str, path: str | Path, count: Callable[[], int], expected: int | None) -> Row:
    """What is counted in a file or folder; what keeps it from being read instead."""
    if not Path(path).exists():
        return missing(path)
    try:
        return counted(name, count(), expected)
    except ValueError as error:
        return Row(name, f"cannot be read: {error}", "–" if expected is None else f"{expected:,}", WRONG)


def settings_of(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        values = OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)
    return cast(dict[str, Any], values)


# ---- training sets ---------------------------------------------------------------------------------------------------


@functools.cache
def mixtures() -> dict[str, tuple[list[Source], list[str]]]:
    """Sources of each mixture, and the files of refs whose validation and test pictures it leaves out."""
    found = {}
    for name in MIXTURES:
        data = settings_of("prepare", f"data={name}")["data"]
        found[name] = (parse_sources(data["sources"]), list(data["held_out"]))
    return found


def training_rows(group: str) -> Iterator[Row]:
    seen: set[str] = set()
    for sources, _ in mixtures().values():
        for source in sources:
            if Path(source.get).name != f"{group}.sh":
                continue
            for need in source.needs:
                # COCO's files are needed by many and prepared by one.
                if need not in seen and (group == "coco") == need.startswith("data/coco/") and need not in PICTURES:
                    seen.add(need)
                    yield from _file_rows(source, need)
            if source.reader == "referring":
                yield _referring(source.name, source.options, "train", None)
            elif source.reader == "reasonseg":
                yield _reasonseg(source.name, source.options, "train", source.expected)


def _file_rows(source: Source, need: str) -> Iterator[Row]:
    """One file, or the parts of a pattern; and whether the pictures that it begins with are there."""
    parts = source.options.get("parts")
    if parts is None:
        yield there(need)
        files = [need]
    else:
        files = sorted(glob.glob(need))
        yield counted(f"{need} (files)", len(files), parts) if files else missing(need)
    if source.reader == "release_train":
        for file in filter(Path.is_file, map(Path, files[:1])):
            yield _first_pictures(file, Path(source.options["image_root"]))


def _first_pictures(file: Path, image_root: Path) -> Row:
    name = f"{file}: pictures of the first {FIRST_RECORDS} records"
    try:
        records = (record for _, _, record in islice(stream_json(file), FIRST_RECORDS))
        names = [image for record in records if (image := _image_of(record)) is not None]
    except ValueError as error:
        return Row(name, f"cannot be read: {error}", "–", WRONG)
    lacking = [image_root / image for image in names if not (image_root / image).is_file()]
    found = f"{len(names) - len(lacking)}" + (f" (none at {lacking[0]})" if lacking else "")
    return Row(name, found, str(len(names)), MISSING if lacking else OK)


def _image_of(record: Any) -> str | None:
    """What picture an item of any of the formats is about."""
    for key in ("file_name", "coco_url", "image", "img_path") if isinstance(record, Mapping) else ():
        if isinstance(record.get(key), str):
            return record[key]
    return None


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def benchmark_rows(group: str) -> Iterator[Row]:
    for name in BENCHMARKS.get(group, ()):
        benchmark = settings_of("eval", f"benchmark={name}")["benchmark"]
        count = {"referring": _referring, "reasonseg": _reasonseg}.get(benchmark["reader"], _records)
        for split in benchmark["splits"]:
            yield count(name, benchmark, split, (benchmark["expected"] or {}).get(split))


def _referring(name: str, options: Mapping[str, Any], split: str, expected: int | None) -> Row:
    path = Path(options["root"], options["folder"], options["refs"])

    def sentences() -> int:
        return sum(len(ref.get("sentences") or ()) for ref in read_refs(path) if ref["split"] == split)

    return checked(f"{name} {split} (sentences)", path, sentences, expected)


def _reasonseg(name: str, options: Mapping[str, Any], split: str, expected: int | None) -> Row:
    folder = Path(options["root"], split)

    def pictures() -> int:
        return sum(path.with_suffix(".jpg").is_file() for path in folder.glob("*.json"))

    return checked(f"{name} {split} (pictures with questions)", folder, pictures, expected)


def _records(name: str, options: Mapping[str, Any], split: str, expected: int | None) -> Row:
    path = Path(options["root"], options["file"].replace("{split}", split))

    def records() -> int:
        if path.suffix == ".jsonl":
            with open(path, "rb") as lines:
                return sum(bool(line.strip()) for line in lines)
        return sum(key in ("", "images") and index >= 0 for key, index, _ in stream_json(path))

    return checked(f"{name} {split} (records)", path, records, expected)


# ---- pictures that must not be trained on ----------------------------------------------------------------------------


def leakage_rows() -> Iterator[Row]:
    every: set[int] = set()
    seen: set[str] = set()
    for mixture, (sources, refs) in mixtures().items():
        for file in refs:
            if file in seen:
                continue
            seen.add(file)
            yield checked(f"{file}: pictures held out", file, functools.partial(_num_held_out, file, every), None)
        held_out = frozenset(every)
        for source in sources:
            if not source.held_out:
                continue
            files = glob.glob(source.needs[0]) or [source.needs[0]]
            if seen.isdisjoint(files) or source.reader == "referring":
                yield _dropped(f"{mixture}: {source.name}: pictures to be left out", files, source.reader, held_out)
            seen.update(files)
    yield counted("pictures held out, all sets together", len(every), None)


def _num_held_out(file: str, every: set[int]) -> int:
    """Of one file; they are added to ``every``."""
    found = held_out_images([file])
    every |= found
    return len(found)


def _dropped(name: str, files: list[str], reader: str, held_out: frozenset[int]) -> Row:
    if lacking := [file for file in files if not Path(file).exists()]:
        return missing(lacking[0])
    pictures: set[str] = set()
    try:
        for file in map(Path, files):
            if reader == "referring":
                # A ref's file_name ends in an annotation's number; the id is the picture's.
                images = (f"{int(ref['image_id']):012}.jpg" for ref in read_refs(file) if ref["split"] == TRAIN)
                pictures.update(images)
            else:
                items = (item for key, index, item in stream_json(file) if key in ("", "images") and index >= 0)
                pictures.update(image for item in items if (image := _image_of(item)) is not None)
    except (ValueError, KeyError, TypeError) as error:
        return Row(name, f"cannot be read: {error}", "–", WRONG)
    dropped = sum(coco_id(picture) in held_out for picture in pictures)
    return Row(name, f"{dropped:,} of {len(pictures):,}", "–", OK)


# ---- what is printed -------------------------------------------------------------------------------------------------


def rows_of(group: str) -> Iterator[Row]:
    if group == "leakage":
        yield from leakage_rows()
        return
    if group == "coco":
        for folder, expected in PICTURES.items():
            yield checked(f"{folder} (pictures)", folder, functools.partial(_num_pictures, folder), expected)
    if group == "refer":
        for name in BENCHMARKS[group]:
            options = settings_of("eval", f"benchmark={name}")["benchmark"]
            yield there(str(Path(options["root"], options["folder"], "instances.json")))
    yield from training_rows(group)
    yield from benchmark_rows(group)


def _num_pictures(folder: str) -> int:
    return sum(path.suffix.lower() in (".jpg", ".jpeg", ".png") for path in Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what data there is; see the head of this file.")
    parser.add_argument("groups", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all")
    groups = parser.parse_args().groups or NAMES
    if unknown := sorted(set(groups).difference(NAMES)):
        parser.error(f"nothing is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    states: Counter[str] = Counter()
    for group in groups:
        rows = [Row(group, "found", "expected", ""), *dict.fromkeys(rows_of(group))]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            print(
                "  ".join(
                    [row.name.ljust(widths[0]), row.found.rjust(widths[1]), row.expected.rjust(widths[2]), row.state]
                )
            )
        print(flush=True)
        states.update(row.state for row in rows[1:])
    print(", ".join(f"{states[state]} {state}" for state in (OK, WRONG, MISSING)))
    sys.exit(1 if states[WRONG] + states[MISSING] else 0)


if __name__ == "__main__":
    main()
