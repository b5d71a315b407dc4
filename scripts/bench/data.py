"""The data pipeline from the release's training JSON to batches: time, memory, samples a second.

Run from the repository root:

    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/bench/data.py                        # 1 GB of JSON, some ten minutes
    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/bench/data.py --gb 0.02 --batches 10 # a small one

Options: ``--folder`` (kept and used again; default a temporary one), ``--workers 2``, ``--batch 1``, ``--batches 200``.

A JSON like the published ones is made: records about 640x480 photographs with 3 to 6 annotations each, which are masks
(RLE of about 300 characters), boxes or sentences; a few pictures are used by all. Then, each in a process of its own:
`instructsam.prepare` writes the table; training's loader reads batches at full size (detector 1008 pixels, Qwen3-VL's
patches, targets of 288x288), without a model; loaders read a hundred thousand bare samples from the table, and records
from the same JSON as a list in memory, which is how it is read without preparation.

Memory in MiB: "peak" is the most that a process had resident at a time. Of that, "files" are mapped (mostly
libraries, which all processes share), "batches" is shared memory, in which workers hand over their tensors, and
"private" is what no other process has a part in; these three are the largest of the figures read after each batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH, PICTURES, BARE = 480, 640, 16, 100_000
SHOWN = ("detector_pixel_values", "pixel_values", "input_ids", "target_masks")
THINGS = ("dog", "cat", "chair", "table", "lamp", "person", "bottle", "car", "tree", "window", "bird", "boat")
PLACES = ("on the left", "on the right", "in front", "at the back", "next to the wall", "near the door")


# ---- the data -------------------------------------------------------------------------------------------------------


def make_pictures(folder: Path, rng: np.random.Generator) -> list[str]:
    """JPEG files about as large as COCO's."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:012d}.jpg" for number in range(PICTURES)]
    for name in names:
        layers = [rng.integers(0, 256, (HEIGHT // step, WIDTH // step, 3), dtype=np.uint8) for step in (80, 16, 4)]
        scaled = [
            np.asarray(Image.fromarray(layer).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for layer in layers
        ]
        mixed = sum(share * layer.astype(np.float32) for share, layer in zip((0.6, 0.3, 0.1), scaled, strict=True))
        Image.fromarray(mixed.astype(np.uint8)).save(folder / name, quality=90)
    return names


def make_shapes(rng: np.random.Generator, number: int = 400) -> list[str]:
    """JSON texts of RLEs: outlines around a centre, with a radius that varies smoothly."""
    from instructsam import masks

    shapes = []
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for _ in range(number):
        waves = sum(rng.normal(0, 0.25 / k) * np.cos(k * angles + rng.uniform(0, 7)) for k in range(1, 9))
        radius = rng.uniform(30, 110) * np.clip(1 + waves, 0.2, 2)
        centre = rng.uniform([130, 130], [WIDTH - 130, HEIGHT - 130])
        points = centre + np.stack([np.cos(angles) * radius * rng.uniform(0.6, 1.4), np.sin(angles) * radius], axis=1)
        shapes.append(json.dumps(masks.polygons_to_rle([points.ravel().tolist()], HEIGHT, WIDTH)))
    return shapes


def write_json(file: Path, size: float, names: Sequence[str], shapes: Sequence[str]) -> int:
    """Records until the file has so many bytes; returns how many."""
    draw, count = random.Random(0), 0

    def annotation() -> dict[str, Any]:
        thing, kind = draw.choice(THINGS), draw.choices(("phrase", "sentence", "none"), (8, 2, 1))[0]
        text = f"the {thing} {draw.choice(PLACES)}"
        if kind == "sentence":
            text = f"Which {thing} {draw.choice(PLACES)} would you take, and why?"
        entry = {"type": kind, "text": text, "category": thing, "ann_type": "mask", "ann": None}
        if kind == "none":
            return {**entry, "type": "phrase"}
        instances = draw.choices((1, 2, 3), (7, 2, 1))[0]
        if draw.random() < 0.15:
            corners = [(draw.randint(0, 400), draw.randint(0, 300)) for _ in range(instances)]
            boxes = [[x, y, draw.randint(20, 200), draw.randint(20, 150)] for x, y in corners]
            return {**entry, "ann_type": "bbox", "ann": [json.dumps(box) for box in boxes]}
        return {**entry, "ann": draw.choices(shapes, k=instances)}

    unfinished = file.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as out:
        out.write("[")
        while out.tell() < size:
            annotations = [annotation() for _ in range(draw.randint(3, 6))]
            record = {"image": draw.choice(names), "height": HEIGHT, "width": WIDTH, "type": "instseg"}
            out.write(",\n" * (count > 0) + json.dumps({**record, "annotation": annotations}))
            count += 1
        out.write("]\n")
    unfinished.rename(file)
    return count


def settings_of(folder: Path) -> dict[str, Any]:
    source = {"reader": "release_train", "file": str(folder / "train.json"), "image_root": str(folder / "images")}
    data = {"prepared": str(folder / "prepared"), "sources": {"generated": source}}
    return {"data": data, "only": None, "force": True, "workers": 1}


# ---- what runs in processes of its own ------------------------------------------------------------------------------


def memory(process: int | str = "self") -> dict[str, float]:
    """Memory of a process in MiB (Linux)."""

    def read(file: str) -> dict[str, float]:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}

    status, rollup = read("status"), read("smaps_rollup")
    private = rollup["Private_Clean"] + rollup["Private_Dirty"]
    return {"peak": status["VmHWM"], "files": status["RssFile"], "batches": status["RssShmem"], "private": private}


def most(before: Sequence[dict[str, float]], now: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The largest figures of each process."""
    return [{key: max(old[key], new[key]) for key in new} for old, new in zip(before, now, strict=True)]


def stage_prepare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from instructsam.prepare import prepare

    start = time.perf_counter()
    (manifest,) = prepare(settings_of(folder)).values()
    return {"seconds": time.perf_counter() - start, "counts": manifest["counts"], "memory": memory()}


def full_size_processor() -> Any:
    """Pictures and targets of the released model's size; a stand-in for Qwen's words."""
    from instructsam.models.factory import make_processor
    from instructsam.models.full_size import full_size_config
    from instructsam.processing.special_tokens import add_special_tokens
    from instructsam.processing.tokenizer import build_word_tokenizer, split_words

    words = set(split_words(" ".join([*THINGS, *PLACES, "Which would you take, and why? the"])))
    config, tokenizer = full_size_config(), build_word_tokenizer(words)
    add_special_tokens(tokenizer, config.vlm_config.text_config.vocab_size)
    return make_processor(config, tokenizer, {})


def stage_train(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Batches as training gets them, and what the workers that make them need."""
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader

    from instructsam.configs_path import CONFIGS
    from instructsam.data.dataset import InstructionDataset
    from instructsam.data.sources import open_sources
    from instructsam.training.workers import start_worker

    processor = full_size_processor()
    imported = time.time()
    samples = open_sources(settings_of(folder)["data"])
    opened = time.time()
    options: Any = OmegaConf.to_container(OmegaConf.load(f"{CONFIGS}/data/_options.yaml"))
    names = ("turns_per_image", "independent_turns", "composition", "augmentation")
    dataset = InstructionDataset(samples, processor, **{name: options[name] for name in names})
    built = time.time()
    keys = [(0, index) for index in np.random.default_rng(0).permutation(len(dataset)).tolist()]
    how: Any = {"num_workers": args.workers, "collate_fn": processor.collate, "worker_init_fn": start_worker}
    loader = DataLoader(dataset, args.batch, sampler=keys, **how)
    batches = iter(loader)
    first = next(batches)
    started = time.time()
    warm_up = 2 * args.workers + 2  # batches that are made ahead
    for _ in range(warm_up):
        next(batches)
    workers = [memory(worker.pid) for worker in batches._workers]
    begin = time.time()
    for _ in range(args.batches):
        next(batches)
        workers = most(workers, [memory(worker.pid) for worker in batches._workers])
    rate = args.batches * args.batch / (time.time() - begin) / args.workers
    return {
        "imports": imported - args.start,
        "opening": opened - imported,
        "dataset": built - opened,
        "first batch": started - built,
        "all": started - args.start,
        "rate": rate,
        "shapes": {name: list(value.shape) for name, value in first.items() if name in SHOWN},
        "memory": memory(),
        "workers": workers,
    }


class Records:
    """A list of something, read without making tensors of it."""

    def __init__(self, records: Any, look: Callable[[Any], int]):
        self.records, self.look = records, look

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> int:
        return self.look(self.records[index])


def read_bare(records: Any, look: Callable[[Any], int], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a record, and memory of the workers, after very many records."""
    from torch.utils.data import DataLoader

    order = np.random.default_rng(0).permutation(len(records))[:BARE].tolist()
    loader = DataLoader(Records(records, look), 64, sampler=order, num_workers=args.workers)
    batches = iter(loader)
    next(batches)
    fresh = [memory(worker.pid) for worker in batches._workers]
    start, found = time.perf_counter(), fresh
    for number in range(len(loader) - 1):
        if number % 100 == 0 or number == len(loader) - 2 * args.workers - 4:  # they end with the last batch
            found = most(found, [memory(worker.pid) for worker in batches._workers])
        next(batches)
    seconds = (time.perf_counter() - start) / ((len(loader) - 1) * 64) * args.workers
    return {"read": len(order), "microseconds": seconds * 1e6, "fresh": fresh, "workers": found, "memory": memory()}


def look_at_sample(sample: Any) -> int:
    return sum(len(phrase.rles) for turn in sample.turns for phrase in turn.phrases)


def look_at_record(record: dict[str, Any]) -> int:
    return sum(len([json.loads(text) for text in entry["ann"] or ()]) for entry in record["annotation"])


def stage_table(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from instructsam.data.sources import open_sources

    return read_bare(open_sources(settings_of(folder)["data"]), look_at_sample, args)


def stage_list(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    records = json.loads((folder / "train.json").read_bytes())
    return {"loading": time.perf_counter() - start, **read_bare(records, look_at_record, args)}


STAGES = {"prepare": stage_prepare, "train": stage_train, "table": stage_table, "list": stage_list}


def run_stage(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a stage reports; it runs in a new process, so that its memory is its own."""
    given = [f"--{key}={getattr(args, key)}" for key in ("workers", "batch", "batches")]
    call = [sys.executable, __file__, f"--folder={folder}", f"--stage={name}", f"--start={time.time()}", *given]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: stage {name} failed:\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- the report -----------------------------------------------------------------------------------------------------


def in_words(processes: Sequence[dict[str, float]]) -> str:
    return "; ".join(", ".join(f"{key} {value:.0f}" for key, value in process.items()) for process in processes)


def report(folder: Path, args: argparse.Namespace) -> None:
    import pyarrow
    import torch

    file = folder / "train.json"
    if not file.exists():
        rng, start = np.random.default_rng(0), time.perf_counter()
        shapes = make_shapes(rng)
        write_json(file, args.gb * 1e9, make_pictures(folder / "images", rng), shapes)
        length = np.mean([len(json.loads(shape)["counts"]) for shape in shapes])
        print(f"written in {time.perf_counter() - start:.0f} s, RLEs of {length:.0f} characters")
    threads = os.environ.get("OMP_NUM_THREADS")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, pyarrow {pyarrow.__version__}"
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}; {versions}"
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())  # what else the machine does
    print(f"load {load}; {args.workers} workers, batches of {args.batch}, {args.batches} timed; memory in MiB")

    made = run_stage("prepare", folder, args)
    counts, seconds, size = made["counts"], made["seconds"], file.stat().st_size
    table = sum(path.stat().st_size for path in (folder / "prepared" / "generated").iterdir())
    print(f"\nprepare: {size / 1e9:.2f} GB of JSON, {counts['samples']} records, {counts['masks']} masks")
    print(f"  {seconds:.0f} s ({counts['samples'] / seconds:.0f} records/s, {size / 1e6 / seconds:.1f} MB/s)")
    print(f"  table {table / 1e9:.2f} GB; {in_words([made['memory']])}", flush=True)

    train = run_stage("train", folder, args)
    shapes = ", ".join(f"{name} {shape}" for name, shape in train["shapes"].items())
    parts = ", ".join(f"{name} {train[name]:.2f}" for name in ("imports", "opening", "dataset", "first batch"))
    print(f"\ntrain: {shapes}")
    print(f"  {train['all']:.1f} s from the start of the process to the first batch: {parts}")
    print(f"  {train['rate']:.1f} samples/s per worker")
    print(f"  workers: {in_words(train['workers'])}\n  main: {in_words([train['memory']])}", flush=True)

    for name, title in (("table", "bare samples of the table"), ("list", "records of a list that json.loads made")):
        bare = run_stage(name, folder, args)
        loading = f"loaded in {bare['loading']:.1f} s, " if "loading" in bare else ""
        print(f"\n{title}: {loading}{bare['read']} read, {bare['microseconds']:.0f} us each in a worker")
        print(f"  workers at first: {in_words(bare['fresh'])}")
        print(f"  workers at most: {in_words(bare['workers'])}\n  main: {in_words([bare['memory']])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the JSON in GB (10^9 bytes)")
    parser.add_argument("--folder", type=Path, help="where the data is made, or was made before")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="of the release's first stage: 1")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.folder, args)))
    elif args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        report(args.folder, args)
    else:
        with tempfile.TemporaryDirectory(prefix="instructsam_bench_") as folder:
            report(Path(folder), args)


if __name__ == "__main__":
    main()
