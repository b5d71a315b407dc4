"""One sample as a row of a prepared table, and back.

A row says where the picture is, how large it is, and what is asked about it; it holds no pixels but those of masks::

    id, image, height, width, joint
    turns      [{instruction, form, kind, id, answer, phrases: [{text, box_only, boxes, masks}]}]
    objects    JSON, null for none

``masks`` are compressed counts (RLE) at the picture's size. The boxes of a box-only phrase are kept as four whole
numbers each, [x1, y1, x2, y2, x1, ...] with exclusive ends, where that says the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from instructsam import masks
from instructsam.data.checks import check_size
from instructsam.errors import DataError
from instructsam.structures import RLE, PhraseTarget, Sample, Turn

_PHRASE = pa.struct(
    {"text": pa.string(), "box_only": pa.bool_(), "boxes": pa.list_(pa.int32()), "masks": pa.list_(pa.string())}
)
_TURN = pa.struct(
    {
        "instruction": pa.string(),
        "form": pa.string(),
        "kind": pa.string(),
        "id": pa.string(),
        "answer": pa.list_(pa.string()),
        "phrases": pa.list_(_PHRASE),
    }
)
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "joint": pa.bool_(),
        "turns": pa.list_(_TURN),
        "objects": pa.string(),
    }
)


def to_row(sample: Sample) -> dict[str, Any]:
    """The row of a sample.

    Raises:
        DataError: for what a row cannot hold: too large a size, masks of another size, text not in Unicode, objects
            that JSON does not keep.
    """
    objects = _objects_json(sample) if sample.objects else None
    _check_text(sample, objects or "")
    if sample.image is not None:
        check_size(sample.height, sample.width)
    return {
        "id": sample.id,
        "image": None if sample.image is None else str(sample.image),
        "height": sample.height,
        "width": sample.width,
        "joint": sample.joint,
        "turns": [_turn_row(turn, sample) for turn in sample.turns],
        "objects": objects,
    }


def from_row(row: dict[str, Any]) -> Sample:
    """The sample of a row."""
    height, width = row["height"], row["width"]
    return Sample(
        row["id"],
        None if row["image"] is None else Path(row["image"]),
        height,
        width,
        tuple(
            Turn(
                turn["instruction"],
                tuple(_phrase(phrase, height, width) for phrase in turn["phrases"]),
                turn["kind"],
                turn["id"],
                turn["form"],
                tuple(turn["answer"]),
            )
            for turn in row["turns"]
        ),
        () if row["objects"] is None else tuple(json.loads(row["objects"])),
        row["joint"],
    )


def _check_text(sample: Sample, objects: str) -> None:
    """JSON may hold halves of surrogate pairs, which no UTF-8 can, and no tokenizer either."""
    texts = [sample.id, str(sample.image), objects]
    for turn in sample.turns:
        texts += [*turn.texts, turn.form, turn.kind, turn.id]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        text = error.object[max(0, error.start - 20) : error.end + 20]
        raise DataError(f"text that is not valid Unicode, near {text!r}", "text") from error


def _turn_row(turn: Turn, sample: Sample) -> dict[str, Any]:
    return {
        "instruction": turn.instruction,
        "form": turn.form,
        "kind": turn.kind,
        "id": turn.id,
        "answer": list(turn.answer),
        "phrases": [_phrase_row(phrase, sample) for phrase in turn.phrases],
    }


def _phrase_row(phrase: PhraseTarget, sample: Sample) -> dict[str, Any]:
    for rle in phrase.rles:
        if rle["size"] != [sample.height, sample.width] or not isinstance(rle["counts"], str):
            raise DataError(
                f"a mask of {phrase.text!r} has size {rle['size']}, the picture {[sample.height, sample.width]}",
                "mask size",
            )
    boxes = _boxes(phrase.rles) if phrase.box_only else None
    return {
        "text": phrase.text,
        "box_only": phrase.box_only,
        "boxes": boxes or [],
        "masks": [rle["counts"] for rle in phrase.rles] if boxes is None else [],
    }


def _boxes(rles: tuple[RLE, ...]) -> list[int] | None:
    """Boxes of filled boxes, one after another; None if one of the masks is no filled box."""
    boxes: list[int] = []
    for rle, box in zip(rles, masks.bboxes(rles).tolist(), strict=True):
        height, width = rle["size"]
        if box[2] <= box[0] or masks.box_to_rle(box, height, width) != rle:
            return None
        boxes.extend(map(int, box))
    return boxes


def _phrase(row: dict[str, Any], height: int, width: int) -> PhraseTarget:
    rles: list[RLE] = [{"size": [height, width], "counts": counts} for counts in row["masks"]]
    boxes = row["boxes"]
    rles += [masks.box_to_rle(boxes[k : k + 4], height, width) for k in range(0, len(boxes), 4)]
    return PhraseTarget(row["text"], tuple(rles), row["box_only"])


def _objects_json(sample: Sample) -> str:
    try:
        text = json.dumps(sample.objects, ensure_ascii=False)
        same = json.loads(text) == list(sample.objects)
    except (TypeError, ValueError) as error:
        raise DataError(f"objects cannot be written as JSON ({error})", "field") from error
    if not same:
        raise DataError("objects hold what JSON does not keep, such as tuples or keys that are no text", "field")
    return text
