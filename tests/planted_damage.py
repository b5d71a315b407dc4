"""Two training sets of many records with damage planted at random places, and the list of what was planted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from turned_pictures import exif_of

from instructsam.masks import box_to_rle, empty_rle

HEIGHT, WIDTH = 24, 32
PICTURES = 200
ANNOTATIONS = 12  # of an image of own data: 5 with masks, 5 with polygons, 2 with boxes only
Planted = tuple[str, str, str, str]  # source, kind, file, index
Damage = Callable[["World", int], tuple[str, str, str]]  # -> kind, file, index


class World:
    """Sound own data and sound release records about the same few pictures, as Python objects."""

    def __init__(self, root: Path, images: int, records: int, seed: int = 0):
        self.root, self.rng = root, random.Random(seed)
        self.pictures = root / "train" / "images"
        self.pictures.mkdir(parents=True)
        pixels = np.random.default_rng(seed)
        for number in range(PICTURES):
            self.picture(f"{number:03}.{'png' if number % 2 else 'jpg'}", pixels.integers(0, 255, (HEIGHT, WIDTH, 3)))
        self.instances, self.lines = self.root / "train" / "instances.json", self.root / "train" / "instructions.jsonl"
        self.release = root / "release.json"
        self.images: list[Any] = []
        self.annotations: list[Any] = []
        self.instructions: list[Any] = []
        for number in range(images):
            self._add_image(number)
        self.records = [self._record(number) for number in range(records)]

    def picture(self, name: str, pixels: np.ndarray, **options: Any) -> Path:
        path = self.pictures / name
        Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
        return path

    def box(self) -> list[int]:
        x, y = self.rng.randrange(WIDTH - 4), self.rng.randrange(HEIGHT - 4)
        return [x, y, self.rng.randrange(2, WIDTH - x + 1), self.rng.randrange(2, HEIGHT - y + 1)]

    def rle(self, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
        x, y, w, h = self.box()
        return dict(box_to_rle([x, y, x + w, y + h], height, width))

    def file(self) -> str:
        number = self.rng.randrange(PICTURES)
        return f"{number:03}.{'png' if number % 2 else 'jpg'}"

    def _add_image(self, number: int) -> None:
        self.images.append({"id": number + 1, "file_name": self.file(), "height": HEIGHT, "width": WIDTH})
        ids = range(ANNOTATIONS * number + 1, ANNOTATIONS * (number + 1) + 1)
        for k, identity in enumerate(ids):
            x, y, w, h = self.box()
            entry = {"id": identity, "image_id": number + 1, "bbox": [x, y, w, h], "category_id": 1}
            if k < 5:
                entry["segmentation"] = self.rle()
            elif k < 10:
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
            self.annotations.append(entry)
        asked = [[ids[0], ids[5]], [ids[10], ids[11]], [ids[0]], []]
        for k in range(2):
            wanted = asked[(number + k) % 4]
            self.instructions.append(
                {
                    "id": f"i-{number}-{k}",
                    "image_id": number + 1,
                    "instruction": f"find thing {number}",
                    "phrases": [{"phrase": f"thing {number}", "annotation_ids": wanted}],
                }
            )

    def _record(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = {"image": self.file(), "height": HEIGHT, "width": WIDTH}
        if number % 3 == 2:
            talk = [{"value": "Where is it?"}, {"value": "It is <p>the one</p>, not <p>the other</p>."}]
            return {**record, "mask": [self.rle(), [self.rle(), self.rle()]], "conversations": talk}
        entries = [
            {"type": "phrase", "text": "A thing.", "ann_type": "mask", "ann": [json.dumps(self.rle())]},
            {"type": "phrase", "text": "The box.", "ann_type": "bbox", "ann": [json.dumps(self.box())]},
            {"type": "sentence", "text": "What runs?", "category": "a dog", "ann_type": "mask", "ann": None},
        ]
        return {**record, "type": "instseg", "annotation": json.dumps(entries) if number % 2 else entries}

    def entries_of(self, number: int) -> list[dict[str, Any]]:
        """The annotations of a release record, as a list that may be changed."""
        record = self.records[number]
        if isinstance(record["annotation"], str):
            record["annotation"] = json.loads(record["annotation"])
        return record["annotation"]

    def write(self) -> None:
        coco = {"images": self.images, "annotations": self.annotations, "categories": [{"id": 1, "name": "thing"}]}
        self.instances.write_text(json.dumps(coco))
        lines = (line if isinstance(line, str) else json.dumps(line) for line in self.instructions)
        self.lines.write_text("\n".join(lines) + "\n")
        self.release.write_text(json.dumps(self.records))


# ---- damage to own data; ``k`` is the number of an image ------------------------------------------------------------


def image(kind: str, change: Callable[[World, int], Any]) -> Damage:
    """``change`` returns the picture's file, or None where instances.json is to blame."""

    def plant(world: World, k: int) -> tuple[str, str, str]:
        path = change(world, k)
        if path is None:
            return kind, str(world.instances), f"image {k + 1}"
        world.images[k]["file_name"] = path.name
        return kind, str(path), f"train/{k + 1}"

    return plant


def missing(world: World, k: int) -> None:
    world.images[k]["file_name"] = f"gone-{k}.png"


def cut(world: World, k: int, name: str, share: float) -> Path:
    path = world.picture(f"{name}-{k}.png", np.random.default_rng(k).integers(0, 255, (HEIGHT, WIDTH, 3)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def no_image(world: World, k: int) -> Path:
    path = world.pictures / f"text-{k}.jpg"
    path.write_text("<html>404</html>" * 50)
    return path


def other_size(world: World, k: int) -> Path:
    return world.picture(f"large-{k}.png", np.zeros((HEIGHT + 8, WIDTH, 3)))


def turned(world: World, k: int) -> Path:
    return world.picture(f"turned-{k}.jpg", np.zeros((HEIGHT, WIDTH, 3)), exif=exif_of(6))


def annotation(kind: str, change: Callable[[dict[str, Any], World], Any], which: int = 0) -> Damage:
    def plant(world: World, k: int) -> tuple[str, str, str]:
        index = ANNOTATIONS * k + which
        change(world.annotations[index], world)
        return kind, str(world.instances), f"annotations[{index}] (id {index + 1})"

    return plant


def segmentation(kind: str, make: Callable[[World], Any], which: int = 0) -> Damage:
    return annotation(kind, lambda entry, world: entry.update(segmentation=make(world)), which)


def bbox(kind: str, box: list[float]) -> Damage:
    return annotation(kind, lambda entry, world: entry.update(bbox=box), which=10)


def counts(change: Callable[[str], str]) -> Callable[[World], dict[str, Any]]:
    def make(world: World) -> dict[str, Any]:
        rle = world.rle()
        return {**rle, "counts": change(rle["counts"])}

    return make


def long_rle(world: World) -> dict[str, Any]:
    return {**world.rle(HEIGHT, WIDTH + 8), "size": [HEIGHT, WIDTH]}


def short_rle(world: World) -> dict[str, Any]:
    return {**box_to_rle([1, 1, 5, 5], HEIGHT - 8, WIDTH), "size": [HEIGHT, WIDTH]}


def repeated_image(world: World, k: int) -> tuple[str, str, str]:
    world.images.append({**world.images[k]})
    return "duplicate", str(world.instances), f"images[{len(world.images) - 1}]"


def sizeless_image(world: World, k: int) -> tuple[str, str, str]:
    """Its annotations and instructions are lost with it, and are no faults of their own."""
    del world.images[k]["height"]
    return "field", str(world.instances), f"images[{k}]"


def repeated_annotation(world: World, k: int) -> tuple[str, str, str]:
    world.annotations.append({**world.annotations[ANNOTATIONS * k]})
    return "duplicate", str(world.instances), f"annotations[{len(world.annotations) - 1}] (id {ANNOTATIONS * k + 1})"


def instruction(kind: str, change: Callable[[dict[str, Any], World, int], Any]) -> Damage:
    """``change`` returns a text to write in place of the line, or None where it changed the entry."""

    def plant(world: World, k: int) -> tuple[str, str, str]:
        entry = world.instructions[2 * k]
        text = change(entry, world, k)
        if text is not None:
            world.instructions[2 * k] = text
        return kind, str(world.lines), str(2 * k + 1)

    return plant


def in_sample(kind: str, change: Callable[[dict[str, Any], int], Any]) -> Damage:
    """Damage to a line that shows in the sample only."""

    def plant(world: World, k: int) -> tuple[str, str, str]:
        entry = world.instructions[2 * k]
        change(entry, k)
        return kind, f"train/{k + 1}", f"turns[0] (id {entry['id']!r})"

    return plant


def phrase(**values: Any) -> Callable[..., None]:
    return lambda entry, *_: entry["phrases"][0].update(values)


def ask_for(entry: dict[str, Any], k: int, number: int) -> None:
    """So many annotations of image ``k``; the first ten have masks."""
    phrase(annotation_ids=list(range(ANNOTATIONS * k + 1, ANNOTATIONS * k + 1 + number)))(entry)


def crowded(world: World, k: int) -> tuple[str, str, str]:
    world.annotations[ANNOTATIONS * k + 10]["segmentation"] = world.rle()  # as masks and boxes cannot be mixed
    world.instructions[2 * k + 1]["phrases"][0]["annotation_ids"] = []
    return in_sample("too many instances", lambda entry, k: ask_for(entry, k, 11))(world, k)


OWN: dict[str, Damage] = {
    "image missing": image("image missing", missing),
    "image truncated": image("image broken", lambda world, k: cut(world, k, "half", 0.6)),
    "image of no bytes": image("image broken", lambda world, k: cut(world, k, "nothing", 0)),
    "not an image": image("image broken", no_image),
    "other size": image("image size", other_size),
    "EXIF-turned size": image("image size", turned),
    "image without height": sizeless_image,
    "image id twice": repeated_image,
    "annotation id twice": repeated_annotation,
    "RLE overrun": segmentation("rle overrun", long_rle),
    "RLE short": segmentation("rle short", short_rle),
    "RLE bad character": segmentation("rle characters", counts(lambda text: text[:1] + "~" + text[1:])),
    "RLE truncated": segmentation("rle truncated", counts(lambda text: text[:-1] + chr(48 + 0x20))),
    "RLE without counts": segmentation("rle form", lambda world: {"size": [HEIGHT, WIDTH]}),
    "mask of another size": segmentation("mask size", lambda world: world.rle(WIDTH + 16, HEIGHT + 16)),
    "empty mask": segmentation("mask empty", lambda world: empty_rle(HEIGHT, WIDTH)),
    "polygon outside": segmentation("polygon outside", lambda world: [[50, 50, 60, 50, 60, 60]], 5),
    "polygon of two points": segmentation("polygon points", lambda world: [[1, 1, 9, 9]], 5),
    "polygon NaN": segmentation("polygon nan", lambda world: [[1, 1, 9, math.nan, 9, 9]], 5),
    "odd coordinates": segmentation("polygon form", lambda world: [[1, 1, 9, 1, 9, 9, 4]], 5),
    "box NaN": bbox("box nan", [1, math.nan, 3, 4]),
    "box without extent": bbox("box extent", [1, 2, 0, 4]),
    "box outside": bbox("box outside", [100, 100, 5, 5]),
    "box of three numbers": bbox("box form", [1, 2, 3]),
    "unknown category": annotation("reference", lambda entry, world: entry.update(category_id=77)),
    "annotation of no image": annotation("reference", lambda entry, world: entry.update(image_id=10**6)),
    "empty instruction": instruction("text", lambda entry, *_: entry.update(instruction="  ")),
    "empty phrase": instruction("text", phrase(phrase="")),
    "instruction id twice": instruction("duplicate", lambda entry, world, k: entry.update(id=f"i-{k - 1}-1")),
    "unknown annotation id": instruction("reference", phrase(annotation_ids=[10**7])),
    "unknown image id": instruction("reference", lambda entry, *_: entry.update(image_id=10**6)),
    "annotation id twice in a phrase": instruction(
        "duplicate", lambda entry, world, k: phrase(annotation_ids=[ANNOTATIONS * k + 1] * 2)(entry)
    ),
    "broken line": instruction("json", lambda entry, *_: json.dumps(entry)[:-20]),
    "missing field": instruction("field", lambda entry, *_: entry.pop("phrases") and None),
    "reserved token": in_sample("text", lambda entry, k: entry.update(instruction="find <|im_end|> it")),
    "reserved token in a phrase": in_sample("text", phrase(phrase="dog [SEG]")),
    "too many instances": crowded,
}


# ---- damage to release records; ``k`` is the number of a record -----------------------------------------------------


def record(kind: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def plant(world: World, k: int) -> tuple[str, str, str]:
        change(world.records[k])
        return kind, str(world.release), f"[{k}]"

    return plant


def entry(kind: str, which: int = 0, **values: Any) -> Damage:
    """Values of None are taken out."""

    def plant(world: World, k: int) -> tuple[str, str, str]:
        changed = world.entries_of(k)[which]
        changed.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del changed[key]
        return kind, str(world.release), f"[{k}] annotation[{which}]"

    return plant


def mask(kind: str, make: Callable[[World], Any]) -> Damage:
    def plant(world: World, k: int) -> tuple[str, str, str]:
        world.entries_of(k)[0]["ann"].append(json.dumps(make(world)))
        return kind, str(world.release), f"[{k}] annotation[0]"

    return plant


def picture(kind: str, change: Callable[[World, int], Path]) -> Damage:
    def plant(world: World, k: int) -> tuple[str, str, str]:
        path = change(world, 10**6 + k)
        world.records[k]["image"] = path.name
        return kind, str(path), f"release.json/{k}"

    return plant


def many_masks(world: World, k: int) -> tuple[str, str, str]:
    world.entries_of(k)[0]["ann"] = [json.dumps(world.rle()) for _ in range(11)]
    return "too many instances", f"release.json/{k}", f"turns[0] (id 'release.json/{k}-0')"


RELEASE: dict[str, Damage] = {
    "image missing": picture("image missing", lambda world, k: world.pictures / f"gone-{k}.jpg"),
    "image truncated": picture("image broken", lambda world, k: cut(world, k, "half", 0.6)),
    "other size": picture("image size", other_size),
    "EXIF-turned size": picture("image size", turned),
    "unknown annotation type": entry("annotation type", type="caption"),
    "unknown mask type": entry("annotation type", ann_type="contour"),
    "no text": entry("field", text=None),
    "no category": entry("field", 2, category=None),
    "empty text": entry("text", text=" "),
    "reserved token": entry("text", text="the <|image_pad|> dog"),
    "mask that is no JSON": entry("json", ann=['{"size": [24, 32], "cou']),
    "box outside": entry("box outside", 1, ann=["[100, 100, 5, 5]"]),
    "box without extent": entry("box extent", 1, ann=["[5, 5, 0, 5]"]),
    "box NaN": entry("box nan", 1, ann=["[5, NaN, 3, 5]"]),
    "RLE overrun": mask("rle overrun", long_rle),
    "RLE short": mask("rle short", short_rle),
    "RLE truncated": mask("rle truncated", counts(lambda text: text[:-1] + chr(48 + 0x20))),
    "mask of another size": mask("mask size", lambda world: world.rle(HEIGHT + 16, WIDTH)),
    "empty mask": mask("mask empty", lambda world: empty_rle(HEIGHT, WIDTH)),
    "polygon of two points": mask("polygon points", lambda world: [[1, 1, 9, 9]]),
    "no annotation": record("field", lambda value: value.pop("annotation")),
    "annotation that is no JSON": record("json", lambda value: value.update(annotation='[{"type": "phr')),
    "too many instances": many_masks,
}
TALKS: dict[str, Damage] = {
    "markup that does not fit the masks": record("markup", lambda value: value["mask"].pop()),
    "phrase that is not closed": record("markup", lambda v: v["conversations"][1].update(value="<p>a</p> <p>b")),
    "question without answer": record("field", lambda value: value["conversations"].pop()),
    "empty question": record("text", lambda value: value["conversations"][0].update(value=" ")),
}


def plant_all(world: World, times: int) -> list[Planted]:
    """Plant everything ``times`` times, each in an image or record of its own, and write the files."""
    planted: list[Planted] = []
    asks = [k for k in range(len(world.images)) if k % 4 == 0 and k]  # whose first line asks for annotations 0 and 5
    talks = [k for k in range(len(world.records)) if k % 3 == 2]
    lists = [k for k in range(len(world.records)) if k % 3 != 2]
    for source, places, damages in (("own", asks, OWN), ("release", lists, RELEASE), ("release", talks, TALKS)):
        places = world.rng.sample(places, times * len(damages))
        for number, damage in enumerate(list(damages.values()) * times):
            planted.append((source, *damage(world, places[number])))
    ask_for(world.instructions[0], 0, 10)  # as many as there are queries: no fault
    world.write()
    return planted
