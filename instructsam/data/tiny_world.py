"""Write the tiny world to disk in the format of own data: COCO instances, instructions as JSON lines, PNG pictures.

Scene i of a split depends only on (seed, split, i) and the picture size. The tokenizer that knows every word of the
world is written beside the splits (DESIGN section 12).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from instructsam import masks
from instructsam.data.shape_instructions import INSTRUCTION_KINDS, Instruction, make_instructions
from instructsam.data.shape_wordings import vocabulary
from instructsam.data.shapes import KINDS, REFERENCE_SIZE, Scene, sample_scene
from instructsam.processing.tokenizer import save_word_tokenizer

FORMAT = 1
"""Raised whenever the same settings would give another world."""
WORLD_FILE = "world.json"
TRAIN_INSTRUCTIONS = 12
VAL_INSTRUCTIONS = 5
ODD_SHARE = 0.35
CONTRASTED = {"ordinal": 4, "counting": 2}
"""How many of a kind in a scene of the contrast split, and as many that nothing fulfils."""


def make_example(
    seed: int, split: str, index: int, image_size: int = REFERENCE_SIZE
) -> tuple[Scene, list[Instruction]]:
    """Scene ``index`` of a split with its instructions: about 12 for "train", up to 12 for "contrast", 5 for any other.

    Contrast is for training too: orders and counts that something fulfils, and as many that nothing does, which among
    the instructions of train are one in sixty. The other splits are balanced: two scenes in a row share the ten
    kinds between them.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    if split == "contrast":
        scene, made = sample_scene(rng, image_size), []
        for kind, number in CONTRASTED.items():
            made += make_instructions(rng, scene.shapes, image_size, [kind] * number)
            made += make_instructions(rng, scene.shapes, image_size, ["no_target"] * number, unmet=kind)
        return scene, made
    if split == "train":
        scene = sample_scene(rng, image_size, odd=rng.random() < ODD_SHARE)
        kinds = list(INSTRUCTION_KINDS)
        made = make_instructions(rng, scene.shapes, image_size, kinds)
        possible = [instruction.kind for instruction in made]
        extra = rng.choices(possible, k=TRAIN_INSTRUCTIONS + 1 - len(made))
        texts = {instruction.text for instruction in made}
        for instruction in make_instructions(rng, scene.shapes, image_size, extra):
            if instruction.text not in texts and len(made) < TRAIN_INSTRUCTIONS:
                made.append(instruction)
        return scene, made
    kinds = list(INSTRUCTION_KINDS)
    random.Random(f"{seed}/{split}/kinds/{index // 2}").shuffle(kinds)
    kinds = kinds[:VAL_INSTRUCTIONS] if index % 2 == 0 else kinds[VAL_INSTRUCTIONS:]
    for _ in range(40):
        scene = sample_scene(rng, image_size, odd="reasoning" in kinds)
        made = make_instructions(rng, scene.shapes, image_size, kinds)
        if len(made) == len(kinds):
            break
    return scene, made


def make_tiny_world(
    root: Path | str,
    train: int = 6000,
    val: int = 250,
    seed: int = 0,
    image_size: int = REFERENCE_SIZE,
    overwrite: bool = False,
    contrast: int = 0,
) -> dict[str, Any]:
    """Write the world to ``root``: train, val, tokenizer and world.json, whose contents are returned.

    With ``contrast`` scenes there is a third split, for training too (see `make_example`).

    Does nothing if the same world is there already. A world with other settings is replaced with ``overwrite`` only; a
    folder that holds anything else never is (ValueError). Everything is written beside the root first and renamed at
    the end, so that an interrupted run leaves nothing that could be taken for a world.
    """
    root = Path(root)
    if train < 1 or val < 1:
        raise ValueError(f"train={train}, val={val}: both splits need at least one scene")
    if contrast < 0:
        raise ValueError(f"contrast={contrast}: must be a number of scenes, 0 for none")
    settings = {"format": FORMAT, "seed": seed, "image_size": image_size, "train": train, "val": val}
    if contrast:
        settings["contrast"] = contrast
    present = _present(root)
    if present is not None:
        if present.get("settings") == settings:
            print(f"{root} holds this world already, nothing to do")
            return present
        if not overwrite:
            raise ValueError(
                f"{root} holds a world with settings {present.get('settings')}, not {settings}: --overwrite?"
            )
    part = root.with_name(f".{root.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        kinds = {
            split: _write_split(part / split, split, count, seed, image_size)
            for split, count in (("train", train), ("val", val), ("contrast", contrast))
            if count
        }
        save_word_tokenizer(vocabulary(), part / "tokenizer")
        world = {"settings": settings, "instructions": kinds}
        (part / WORLD_FILE).write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")
        _install(part, root, settings)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return world


def _present(root: Path) -> dict[str, Any] | None:
    """What world.json in the folder holds; None if there is no folder or an empty one. Raises ValueError for others."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        world = json.loads((root / WORLD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{root} exists and is no tiny world ({error}): choose another folder") from error
    if not isinstance(world, dict):
        raise ValueError(f"{root / WORLD_FILE} is not of a tiny world: choose another folder")
    return world


def _install(part: Path, root: Path, settings: dict[str, Any]) -> None:
    """Rename the finished folder into place; a world that it replaces is removed only after that."""
    present = _present(root)
    if present is not None and present.get("settings") == settings:
        return  # another process was faster, with the same world
    old = root.with_name(f".{root.name}.old-{os.getpid()}")
    if root.exists():
        root.rename(old)
    part.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def _write_split(folder: Path, split: str, count: int, seed: int, image_size: int) -> dict[str, int]:
    """Write one split, return its number of instructions by kind."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for index in tqdm(range(count), desc=split, unit="scene"):
        scene, instructions = make_example(seed, split, index, image_size)
        name = f"{index:06d}.png"
        Image.fromarray(scene.image).save(folder / "images" / name, compress_level=1)
        image_id = index + 1
        images.append({"id": image_id, "file_name": name, "height": image_size, "width": image_size})
        first = len(annotations) + 1
        annotations.extend(_annotations(scene, image_id, first))
        for number, instruction in enumerate(instructions):
            counts[instruction.kind] += 1
            lines.append(
                {
                    "id": f"{split}-{index:06d}-{number:02d}",
                    "image_id": image_id,
                    "instruction": instruction.text,
                    "kind": instruction.kind,
                    "phrases": [
                        {"phrase": phrase, "annotation_ids": [first + i for i in indices]}
                        for phrase, indices in instruction.phrases
                    ],
                }
            )
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(coco), encoding="utf-8")
    with (folder / "instructions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return {kind: counts[kind] for kind in INSTRUCTION_KINDS}


def _annotations(scene: Scene, image_id: int, first: int) -> list[dict[str, Any]]:
    rles = masks.encode_batch(scene.masks)
    boxes = masks.bboxes(rles, checked=True).tolist()
    return [
        {
            "id": first + i,
            "image_id": image_id,
            "category_id": KINDS.index(shape.kind) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": shape.area,
            "iscrowd": 0,
            "segmentation": rle,
            "attributes": {"color": shape.color, "size": shape.size, "texture": shape.texture},
        }
        for i, (shape, rle, (x1, y1, x2, y2)) in enumerate(zip(scene.shapes, rles, boxes, strict=True))
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line of ``python -m instructsam.make_tiny_world``."""
    parser = argparse.ArgumentParser(description="Write the tiny world of shapes to disk.")
    parser.add_argument("--root", type=Path, default=Path("data/tiny_world"))
    parser.add_argument("--train", type=int, default=6000, help="number of training scenes")
    parser.add_argument("--val", type=int, default=250, help="number of validation scenes")
    parser.add_argument("--contrast", type=int, default=0, help="number of scenes of the third split, for training too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=REFERENCE_SIZE, help="pixels a side")
    parser.add_argument("--overwrite", action="store_true", help="replace a world that has other settings")
    options = parser.parse_args(arguments)
    try:
        world = make_tiny_world(**vars(options))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for split, kinds in world["instructions"].items():
        print(
            f"{options.root / split}: {sum(kinds.values())} instructions:",
            ", ".join(f"{k} {n}" for k, n in kinds.items()),
        )
