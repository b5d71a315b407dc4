"""Reader of ReasonSeg's own folders: a picture and a JSON of drawn shapes for each question (DESIGN section 9).

    ROOT/SPLIT/NAME.jpg
    ROOT/SPLIT/NAME.json    {"text": [question, ...], "is_sentence": true,
                             "shapes": [{"label": "target" | "ignore" | "flag", "points": [[x, y], ...]}]}

Shapes are drawn one over another by descending area, so that a small one lies on top of a large one: what ends up as
target is the mask, what ends up as ignore counts nowhere, and flags are not drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from instructsam import masks
from instructsam.data.checks import Place, Skips, parse_json, read_bytes
from instructsam.data.eval_split import Collector, EvalSplit, turn_of
from instructsam.errors import DataError

TARGET, IGNORE = 1, 255
_VALUES = {"target": TARGET, "ignore": IGNORE}


def read_reasonseg(
    root: Path | str,
    split: str,
    name: str = "reasonseg",
    questions: str = "first",
    skips: Skips | None = None,
) -> EvalSplit:
    """Read ROOT/SPLIT; ids are NAME/SPLIT/STEM of the file. Instructions are of kind "short" or "long" (is_sentence).

    Args:
        questions: "first" asks the first text of each picture, as the published evaluation does; "all" asks every one
            (ids end in -0, -1, ...).
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file and reason: no files, broken JSON, unknown labels, shapes that are none or lie outside
            the picture, no target left, empty questions, missing pictures.
    """
    if questions not in ("first", "all"):
        raise ValueError(f"questions must be 'first' or 'all', got {questions!r}")
    folder = Path(root) / split
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: holds no JSON files")
    collector = Collector(name, split, folder, folder, skips or Skips())
    for path in files:
        with collector.entry(Place(path)):
            entry = _load(path)
            texts = entry["text"] if questions == "all" else entry["text"][:1]
            image = path.with_suffix(".jpg").name
            height, width = collector.size_of(image, {})
            labels_HW = draw_shapes(entry.get("shapes"), height, width)
            if not (labels_HW == TARGET).any():
                raise DataError("no pixel of a target is left after drawing its shapes", "mask empty")
            target, ignored = masks.encode_batch(np.stack([labels_HW == TARGET, labels_HW == IGNORE]))
            kind = "long" if entry["is_sentence"] else "short"
            for number, text in enumerate(texts):
                identity = path.stem if questions == "first" else f"{path.stem}-{number}"
                with collector.entry(Place(path, f"text[{number}]")):
                    turn = turn_of(identity, text, [target], kind=kind)
                    ignore_rle = ignored if (labels_HW == IGNORE).any() else None
                    collector.add(Place(path), image, (height, width), turn, ignore_rle)
    return collector.finish()


def draw_shapes(shapes: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Labels (height, width) of drawn shapes: 0 background, 1 target, 255 ignore. Borders belong to a shape.

    Raises:
        ValueError: ``shapes[index]: reason`` for an unknown label, or points that are no polygon in the picture.
    """
    if not isinstance(shapes, list):
        raise DataError("has no list 'shapes'", "field")
    drawn: list[tuple[int, int, list[tuple[int, int]]]] = []
    for index, shape in enumerate(shapes):
        label = str(shape.get("label")).lower() if isinstance(shape, dict) else None
        if label == "flag":
            continue
        if label not in _VALUES:
            raise DataError(
                f"shapes[{index}]: the label must be target, ignore or flag, got {label!r}", "annotation type"
            )
        what = f"shapes[{index}].points"
        masks.polygons_to_rle([shape.get("points")], height, width, what)  # only to refuse what is no polygon here
        # Whole numbers, cut and not rounded, as the published evaluation has them.
        points = [(int(x), int(y)) for x, y in np.asarray(shape["points"], dtype=np.float64).reshape(-1, 2)]
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        drawn.append((int(np.asarray(canvas).sum()), _VALUES[label], points))
    labels = Image.new("L", (width, height))
    for _, value, points in sorted(drawn, key=lambda one: -one[0]):
        ImageDraw.Draw(labels).polygon(points, fill=value, outline=value)
    return np.asarray(labels)


def _load(path: Path) -> dict[str, Any]:
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")  # some of the published files are in it
        except UnicodeDecodeError as error:
            raise DataError(f"is neither utf-8 nor cp1252 ({error})", "json") from error
    entry = parse_json(text)
    if not isinstance(entry, dict):
        raise DataError(f"expected an object, got {type(entry).__name__}", "field")
    if not isinstance(entry.get("text"), list) or not entry["text"]:
        raise DataError("has no list 'text' with a question", "field")
    if not isinstance(entry.get("is_sentence"), bool):
        raise DataError(f"is_sentence must be true or false, got {entry.get('is_sentence')!r}", "field")
    return entry
