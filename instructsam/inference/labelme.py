"""A result as a labelme file, to be mended by hand."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from instructsam.inference.contours import outlines
from instructsam.masks import bbox, decode
from instructsam.structures import Instance

VERSION = "5.5.0"
SHAPE_TYPES = ("mask", "polygon")


def labelme_file(
    image: Image.Image,
    name: str,
    instances: Sequence[Instance],
    shape_type: str = "mask",
    image_path: str | None = None,
) -> dict[str, Any]:
    """The content of a labelme JSON file.

    Args:
        image: the picture, called ``name``; instances: what was found in it.
        shape_type: ``mask`` (pixel by pixel, labelme 5.2 and later) or ``polygon`` (any version: one polygon for each
            piece of a mask, in a group; holes are filled, as labelme's polygons have none).
        image_path: where the picture lies, seen from the file; None = the picture is put into the file.

    Raises:
        ValueError: another shape type.
    """
    if shape_type not in SHAPE_TYPES:
        raise ValueError(f"shape_type={shape_type!r} is not one of {', '.join(SHAPE_TYPES)}")
    make = _mask_shapes if shape_type == "mask" else _polygon_shapes
    return {
        "version": VERSION,
        "flags": {},
        "shapes": [shape for number, instance in enumerate(instances) for shape in make(instance, number)],
        "imagePath": image_path or name,
        "imageData": _png(image) if image_path is None else None,
        "imageHeight": image.height,
        "imageWidth": image.width,
    }


def _shape(instance: Instance, number: int, shape_type: str, points: Any, mask: str | None) -> dict[str, Any]:
    return {
        "label": instance.phrase,
        "points": points,
        "group_id": number,
        "description": f"score {instance.score:.3f}",
        "shape_type": shape_type,
        "flags": {},
        "mask": mask,
    }


def _mask_shapes(instance: Instance, number: int) -> list[dict[str, Any]]:
    x1, y1, x2, y2 = map(int, bbox(instance.rle))
    if x1 == x2:  # an empty mask
        return []
    cut = Image.fromarray(decode(instance.rle)[y1:y2, x1:x2])
    return [_shape(instance, number, "mask", [[x1, y1], [x2 - 1, y2 - 1]], _png(cut))]


def _polygon_shapes(instance: Instance, number: int) -> list[dict[str, Any]]:
    return [_shape(instance, number, "polygon", points, None) for points in outlines(decode(instance.rle))]


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
