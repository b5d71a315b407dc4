"""Small sets in the published shape of every benchmark, written from tiny-world pictures.

``write_benchmark("refcoco", folder)`` writes one and returns the overrides of the command line that ask for it, such as
``["benchmark=refcoco", "benchmark.root=...", ...]``. What a set asks for stands in `scenes`, so that tests can compare.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from instructsam import masks
from instructsam.data.tiny_world import make_example

COUNT = 5
CUT = 16
"""Columns cut off on the right, so that height and width cannot be mixed up unnoticed."""


@dataclass(frozen=True)
class Asked:
    """An instruction with the indices of the masks it asks for."""

    text: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class SmallScene:
    """A picture (H, W, 3) uint8, the masks of its shapes (n, H, W) bool, and what is asked about it."""

    name: str
    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    asked: tuple[Asked, ...]

    @property
    def height(self) -> int:
        return self.image.shape[0]

    @property
    def width(self) -> int:
        return self.image.shape[1]

    def rles(self, indices: tuple[int, ...]) -> list[dict[str, Any]]:
        return [dict(masks.encode(self.masks[k])) for k in indices]

    @property
    def targeted(self) -> Asked:
        """The first instruction that asks for something."""
        return next(one for one in self.asked if one.indices)


@cache
def scenes() -> tuple[SmallScene, ...]:
    """`COUNT` pictures with at least one instruction that asks for something each; the set has no-target ones too."""
    found = []
    for index in range(COUNT):
        scene, instructions = make_example(0, "val", index)
        cut_NHW = scene.masks[:, :, :-CUT]
        kept = [k for k in range(len(cut_NHW)) if cut_NHW[k].any()]
        places = {old: new for new, old in enumerate(kept)}
        asked = []
        for instruction in instructions:
            (_, indices), *others = instruction.phrases
            if not others and all(k in places for k in indices):
                asked.append(Asked(instruction.text, tuple(places[k] for k in indices)))
        asked.append(Asked("a purple elephant.", ()))
        found.append(SmallScene(f"{index + 1:012d}", scene.image[:, :-CUT], cut_NHW[kept], tuple(asked)))
    assert all(scene.targeted for scene in found)
    return tuple(found)


def save_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _pictures(folder: Path, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes():
        Image.fromarray(scene.image).save(folder / f"{prefix}{scene.name}.jpg", quality=95)


def _polygon(mask: NDArray[np.bool_]) -> list[float]:
    """The tight box of a mask as a polygon of four points."""
    x1, y1, x2, y2 = masks.bbox(masks.encode(mask))
    return [x1, y1, x2, y1, x2, y2, x1, y2]


# ---- the RefCOCO family -----------------------------------------------------------------------------------------


def refer_set(lists: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Refs and instances as the sets have them; with ``lists`` in the way of gRefCOCO.

    Annotation 100 * i + k is shape k of picture i. The first shape of each picture has a polygon (its box), the others
    an uncompressed or compressed RLE. The last picture is of split "train".
    """
    images, annotations, refs = [], [], []
    sent_id = 1000
    for number, scene in enumerate(scenes(), start=1):
        size = {"height": scene.height, "width": scene.width}
        images.append({"id": number, "file_name": f"COCO_train2014_{scene.name}.jpg", **size})
        for k, mask in enumerate(scene.masks):
            segmentation: Any = [_polygon(mask)] if k == 0 else dict(masks.encode(mask))
            entry = {"id": 100 * number + k, "image_id": number, "category_id": 1, "segmentation": segmentation}
            annotations.append({**entry, "iscrowd": 0, "bbox": [0, 0, 1, 1]})
        for asked in scene.asked:
            ids = [100 * number + k for k in asked.indices]
            if not lists and len(ids) != 1:
                continue
            sentences = [
                {"raw": text.upper(), "sent": text, "sent_id": sent_id + place, "tokens": text.split()}
                for place, text in enumerate((asked.text, f"{asked.text} here"))
            ]
            sent_id += 2
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": (ids or [-1]) if lists else ids[0],
                    "category_id": [1] * len(ids) if lists else 1,
                    "image_id": number,
                    "file_name": f"COCO_train2014_{scene.name}_{ids[0] if ids else -1}.jpg",
                    "split": "train" if number == len(scenes()) else "val",
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    return refs, {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}


def write_refs(folder: Path, file: str, refs: list[Any], instances: dict[str, Any]) -> None:
    """A referring set: instances.json, and the refs as a pickle or, by the file's name, as JSON."""
    save_json(folder / "instances.json", instances)
    if file.endswith(".json"):
        save_json(folder / file, refs)
    else:
        (folder / file).write_bytes(pickle.dumps(refs, protocol=2))  # the protocol of the published files


def _write_refer(name: str, folder: str, file: str) -> Callable[[Path], list[str]]:
    def write(root: Path) -> list[str]:
        refs, instances = refer_set(lists=file.endswith(".json"))
        write_refs(root / folder, file, refs, instances)
        _pictures(root / "train2014", "COCO_train2014_")
        return [f"benchmark={name}", f"benchmark.root={root}", f"benchmark.image_root={root / 'train2014'}"]

    return write


# ---- the release's evaluation JSON --------------------------------------------------------------------------------


def release_records(form: str) -> list[dict[str, Any]]:
    """Records of one of the four forms; the forms of masks take turns."""
    records: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes()):
        head = {"image": f"{scene.name}.jpg", "height": scene.height, "width": scene.width}
        one = scene.targeted
        rles = scene.rles(one.indices)
        boxes = [[_polygon(scene.masks[k])] for k in one.indices]
        if form == "inst2seg":
            annotation: list[dict[str, Any]] = []
            for asked in scene.asked:
                found = scene.rles(asked.indices)
                mask = found[0] if len(found) == 1 else found
                annotation.append({"text": asked.text, **({"mask": mask} if found else {})})
            annotation.append({"text": "in polygons", "mask": [polygon for box in boxes for polygon in box]})
            annotation.append({"text": "in lists of polygons", "mask": boxes})
            records.append({**head, "annotation": annotation})
        elif form == "grefcoco":
            masks_of = [scene.rles(asked.indices) or None for asked in scene.asked]
            records.append({**head, "cat": [asked.text for asked in scene.asked], "masks": masks_of})
        elif form == "reasonseg":
            ignored = np.zeros(scene.masks.shape[1:], dtype=bool)
            ignored[:3] = True
            record = {"image": head["image"], "question": one.text, "is_sentence": number % 2 == 0, "mask": rles}
            records.append({**record, **({"ignore_mask": dict(masks.encode(ignored))} if number == 0 else {})})
        else:
            records.append(
                {"image": head["image"], "question" if number % 2 else "expression": one.text, "masks": rles}
            )
    return records


def _write_release(name: str, form: str, file: str) -> Callable[[Path], list[str]]:
    def write(root: Path) -> list[str]:
        save_json(root / file, release_records(form))
        _pictures(root / "images")
        return [f"benchmark={name}", f"benchmark.root={root}", f"benchmark.image_root={root / 'images'}"]

    return write


# ---- the others ---------------------------------------------------------------------------------------------------


def reasonseg_entry(scene: SmallScene, is_sentence: bool) -> dict[str, Any]:
    """A JSON of drawn shapes: the targets' boxes, a small ignored one in the first target's corner, a flag."""
    shapes = []
    for k in scene.targeted.indices:
        polygon = _polygon(scene.masks[k])
        points = [[x - (x > 0), y - (y > 0)] for x, y in np.reshape(polygon, (4, 2)).tolist()]
        shapes.append({"label": "target", "points": points, "shape_type": "polygon"})
    x, y = shapes[0]["points"][0]
    shapes.insert(0, {"label": "ignore", "points": [[x, y], [x + 2, y], [x + 2, y + 2], [x, y + 2]]})
    shapes.append({"label": "flag", "points": [[0, 0]]})
    texts = [scene.targeted.text, f"{scene.targeted.text}, in other words"]
    return {"text": texts, "is_sentence": is_sentence, "shapes": shapes}


def _write_reasonseg(root: Path) -> list[str]:
    _pictures(root / "val")
    for number, scene in enumerate(scenes()):
        save_json(root / "val" / f"{scene.name}.json", reasonseg_entry(scene, number % 2 == 0))
    return ["benchmark=reasonseg", f"benchmark.root={root}"]


def gseval_lines() -> list[dict[str, Any]]:
    """One caption a picture; the four classes take turns."""
    lines = []
    for number, scene in enumerate(scenes()):
        one = scene.targeted
        union = masks.encode(scene.masks[list(one.indices)].any(axis=0))
        line = {"idx": number, "image_path": f"{scene.name}.jpg", "class_id": number % 4, "label": "shape"}
        lines.append({**line, "caption": one.text, "box": list(masks.bbox(union)), "segmentation": dict(union)})
    return lines


def _write_gseval(root: Path) -> list[str]:
    _pictures(root / "images")
    lines = [json.dumps(line) for line in gseval_lines()]
    (root / "GroundingSuite-Eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["benchmark=gseval", f"benchmark.root={root}", f"benchmark.image_root={root / 'images'}"]


def saco_set() -> dict[str, Any]:
    """Every pair of a picture and an instruction's text."""
    pairs, annotations = [], []
    for scene in scenes():
        for asked in scene.asked:
            pair = {"id": 10_000 + len(pairs), "file_name": f"{scene.name}.jpg", "text_input": asked.text}
            pairs.append({**pair, "height": scene.height, "width": scene.width, "is_instance_exhaustive": 1})
            for rle in scene.rles(asked.indices):
                entry = {"id": len(annotations), "image_id": pair["id"], "segmentation": rle, "iscrowd": 0}
                annotations.append({**entry, "bbox": [0.1, 0.1, 0.2, 0.2], "area": 0.1, "noun_phrase": asked.text})
    return {"images": pairs, "annotations": annotations}


def _write_saco(root: Path) -> list[str]:
    _pictures(root / "images")
    save_json(root / "test.json", saco_set())
    return ["benchmark=saco", f"benchmark.root={root}", f"benchmark.image_root={root / 'images'}"]


def _write_own(name: str) -> Callable[[Path], list[str]]:
    def write(root: Path) -> list[str]:
        _pictures(root / "val" / "images")
        images, annotations, lines = [], [], []
        for number, scene in enumerate(scenes(), start=1):
            size = {"height": scene.height, "width": scene.width}
            images.append({"id": number, "file_name": f"{scene.name}.jpg", **size})
            for k, rle in enumerate(scene.rles(tuple(range(len(scene.masks))))):
                annotations.append({"id": 100 * number + k, "image_id": number, "segmentation": rle})
            for place, asked in enumerate(scene.asked):
                phrases = [{"phrase": asked.text, "annotation_ids": [100 * number + k for k in asked.indices]}]
                line = {"id": f"{number}-{place}", "image_id": number, "instruction": asked.text, "kind": "category"}
                lines.append(json.dumps({**line, "phrases": phrases}))
        save_json(root / "val" / "instances.json", {"images": images, "annotations": annotations})
        (root / "val" / "instructions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [f"benchmark={name}", f"benchmark.root={root}"]

    return write


WRITERS: dict[str, Callable[[Path], list[str]]] = {
    "refcoco": _write_refer("refcoco", "refcoco", "refs(unc).p"),
    "refcoco_plus": _write_refer("refcoco_plus", "refcoco+", "refs(unc).p"),
    "refcocog": _write_refer("refcocog", "refcocog", "refs(umd).p"),
    "grefcoco": _write_refer("grefcoco", "grefcoco", "grefs(unc).json"),
    "grefcoco_release": _write_release("grefcoco_release", "grefcoco", "grefcoco_val.json"),
    "reasonseg": _write_reasonseg,
    "reasonseg_release": _write_release("reasonseg_release", "reasonseg", "reasonseg_val.json"),
    "inst2seg": _write_release("inst2seg", "inst2seg", "test.json"),
    "roborefit": _write_release("roborefit", "roborefit", "roborefit_testA.json"),
    "gseval": _write_gseval,
    "saco": _write_saco,
    "tiny_world": _write_own("tiny_world"),
    "coco_instructions": _write_own("coco_instructions"),
}


def write_benchmark(name: str, folder: Path) -> list[str]:
    """Write the small set of a benchmark (its default split) below a folder; returns what asks for it."""
    return WRITERS[name](folder)
