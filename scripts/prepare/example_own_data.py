"""A small data set in the format of own data (data/README.md), to copy from: discs and squares on a plain ground.

    python scripts/prepare/example_own_data.py [FOLDER]        default: data/mine

Writes FOLDER/train (48 pictures) and FOLDER/val (16): images/, instances.json with the squares as polygons and the
discs as run lengths, and instructions.jsonl. The words are among those that the quickstart's model knows; the pictures
look different from the tiny world's.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from instructsam import masks

HEIGHT, WIDTH = 96, 128  # pixels
SPLITS = {"train": 48, "val": 16}
COLORS = {"red": (190, 30, 45), "green": (0, 135, 90), "blue": (35, 80, 200), "yellow": (235, 200, 50)}
WORDS = {"disc": "circles", "square": "squares"}


def draw_picture(rng: random.Random) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A picture and its three to five shapes, none of which touches another: shape, color, box [x, y, w, h]."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), tuple(rng.randint(205, 250) for _ in range(3)))
    shapes: list[dict[str, Any]] = []
    wanted = rng.randint(3, 5)
    while len(shapes) < wanted:
        side = rng.randint(18, 32)
        x, y = rng.randint(2, WIDTH - side - 2), rng.randint(2, HEIGHT - side - 2)
        others = [one["box"] for one in shapes]
        if any(
            x < ox + ow + 3 and ox < x + side + 3 and y < oy + oh + 3 and oy < y + side + 3 for ox, oy, ow, oh in others
        ):
            continue
        shapes.append({"shape": rng.choice(list(WORDS)), "color": rng.choice(list(COLORS)), "box": [x, y, side, side]})
        draw_shape(ImageDraw.Draw(picture), shapes[-1], COLORS[shapes[-1]["color"]])
    return picture, shapes


def draw_shape(canvas: ImageDraw.ImageDraw, shape: dict[str, Any], fill: Any) -> None:
    x, y, width, height = shape["box"]
    draw = canvas.ellipse if shape["shape"] == "disc" else canvas.rectangle
    draw([x, y, x + width - 1, y + height - 1], fill=fill)  # Pillow paints the last pixel too


def segmentation_of(shape: dict[str, Any]) -> Any:
    """Polygons [[x1, y1, x2, y2, ...]] of a square; the run lengths of a disc, from its mask."""
    x, y, width, height = shape["box"]
    if shape["shape"] == "square":
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]
    mask = Image.new("1", (WIDTH, HEIGHT))
    draw_shape(ImageDraw.Draw(mask), shape, 1)
    return masks.encode(np.asarray(mask))


def questions_about(shapes: dict[int, dict[str, Any]], rng: random.Random) -> list[tuple[str, str, str, list[int]]]:
    """(kind, instruction, phrase, annotation ids) about shapes by id: by shape, by colour, by both, and one in vain."""
    asked = []
    kind = rng.choice(sorted({shape["shape"] for shape in shapes.values()}))
    color = rng.choice(sorted({shape["color"] for shape in shapes.values()}))
    both = rng.choice(sorted({(shape["color"], shape["shape"]) for shape in shapes.values()}))
    gone = rng.choice([(c, k) for c in COLORS for k in WORDS if not find(shapes, c, k)])
    asked.append(("category", f"segment all {WORDS[kind]}", WORDS[kind], find(shapes, None, kind)))
    asked.append(("attribute", f"show me everything that is {color}", f"{color} shapes", find(shapes, color, None)))
    phrase = f"{both[0]} {WORDS[both[1]]}"
    asked.append(("attribute", f"the {phrase}", phrase, find(shapes, *both)))
    phrase = f"{gone[0]} {WORDS[gone[1]]}"
    asked.append(("no_target", f"can you find the {phrase}?", phrase, []))
    return asked


def find(shapes: dict[int, dict[str, Any]], color: str | None, kind: str | None) -> list[int]:
    """Ids of all shapes of a color and a kind; None is any."""
    return [i for i, shape in shapes.items() if color in (None, shape["color"]) and kind in (None, shape["shape"])]


def write_split(folder: Path, count: int, seed: str) -> None:
    """Write images/, instances.json and instructions.jsonl."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(WORDS, start=1)]
    category_ids = {entry["name"]: entry["id"] for entry in categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    instructions: list[dict[str, Any]] = []
    for image_id in range(count):
        picture, shapes = draw_picture(rng)
        name = f"{image_id:03}.png"
        picture.save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        by_id = dict(enumerate(shapes, start=len(annotations) + 1))
        for annotation_id, shape in by_id.items():
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": category_ids[shape["shape"]],
                    "bbox": shape["box"],
                    "segmentation": segmentation_of(shape),
                    "attributes": {"color": shape["color"]},
                }
            )
        for number, (kind, instruction, phrase, ids) in enumerate(questions_about(by_id, rng)):
            instructions.append(
                {
                    "id": f"{image_id}-{number}",
                    "image_id": image_id,
                    "instruction": instruction,
                    "kind": kind,
                    "phrases": [{"phrase": phrase, "annotation_ids": ids}],
                }
            )
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(coco), encoding="utf-8")
    lines = "".join(json.dumps(instruction) + "\n" for instruction in instructions)
    (folder / "instructions.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "data/mine")
    for split, number in SPLITS.items():
        write_split(root / split, number, split)
        print(f"{root / split}: {number} pictures")
