"""What the service takes and gives, for its OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instructsam.serving.limits import FORMATS, Limits
from instructsam.structures import DEFAULT_THRESHOLD

FIELDS = ("image", "instruction", "phrase", "threshold", "top_k", "nms_iou")


def form_schema(limits: Limits) -> dict[str, Any]:
    """The form of a question; its properties are `FIELDS`. Examples are those of the command at /docs."""
    image = f"{', '.join(FORMATS)}; up to {limits.upload_bytes:,} bytes and {limits.pixels:,} pixels"
    phrase = "in place of an instruction: segment these, nothing is written (may be repeated)"
    properties: dict[str, dict[str, Any]] = {
        "image": {"type": "string", "format": "binary", "description": image, "example": "@photo.jpg"},
        "instruction": {"type": "string", "description": "what to segment", "example": "the two dogs on the left"},
        "phrase": {"type": "array", "items": {"type": "string"}, "description": phrase},
        "threshold": {
            "type": "number",
            "minimum": limits.least_threshold,
            "maximum": 1,
            "default": DEFAULT_THRESHOLD,
            "description": "instances with a higher score are kept",
        },
        "top_k": {"type": "integer", "minimum": 1, "description": "of these, the so many highest scores"},
        "nms_iou": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "of two instances of a phrase that overlap with a higher IoU, the better one is kept",
        },
    }
    assert tuple(properties) == FIELDS
    return {"type": "object", "required": ["image"], "properties": properties}


def _object(properties: Mapping[str, dict[str, Any]], description: str = "") -> dict[str, Any]:
    about = {"description": description} if description else {}
    return {"type": "object", **about, "required": list(properties), "properties": dict(properties)}


def _value(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **more}


def _array(description: str, **items: Any) -> dict[str, Any]:
    return _value("array", description, items=items)


_INSTANCE = {
    "phrase": _value("string", "that it belongs to"),
    "phrase_index": _value("integer", "of that phrase in phrases"),
    "score": _value("number", "0 to 1"),
    "box": _array("x1, y1, x2, y2 in pixels", type="number"),
    "area": _value("integer", "of the mask in pixels"),
    "segmentation": _object(
        {"size": _array("height, width", type="integer"), "counts": _value("string", "compressed run lengths")},
        "mask as COCO RLE at the picture's size",
    ),
}
ANSWER = _object(
    {
        "image": _value("string", "name of the picture's file"),
        "instruction": _value("string", "what was asked; of phrases alone, these"),
        "height": _value("integer", "of the picture, upright, in pixels"),
        "width": _value("integer", "of the picture, upright, in pixels"),
        "answer": _value("string", "what the model wrote"),
        "finished": _value("boolean", "false if a limit cut the answer off"),
        "phrases": _array("of the answer, those without an instance too", type="string"),
        "instances": _array("by phrase, then by falling score", **_object(_INSTANCE)),
        "seconds": _value("object", "spent on the batch, by part", additionalProperties={"type": "number"}),
        "cached": _value("boolean", "whether the picture was known from before"),
        "batch_size": _value("integer", "questions that were answered together"),
    }
)
_ERROR = _object({"error": _value("string", "what is wrong, in words")})


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _response("the instances", ANSWER),
    401: _response("no token, or a wrong one", _ERROR),
    413: _response("too many bytes or pixels, or more than fits into memory", _ERROR),
    422: _response("no picture, nothing asked, a choice that cannot be; says which", _ERROR),
    500: _response("the model failed", _ERROR),
    503: _response("too many questions or pictures wait; Retry-After says when to come again", _ERROR),
    504: _response("it took too long", _ERROR),
}
