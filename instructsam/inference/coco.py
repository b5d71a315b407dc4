"""Results as a COCO data set: `pycocotools.coco.COCO` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from instructsam import masks


def coco_dataset(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images, annotations and categories of results as plain data (`Result.to_dict`).

    Categories are the phrases that have an instance, in alphabetical order. Pictures are told apart by their name:
    several instructions about one go to the same image. Every annotation says its ``score`` and ``instruction``.

    Raises:
        ValueError: two pictures of one name and different sizes.
    """
    names = sorted({instance["phrase"] for result in results for instance in result["instances"]})
    categories = {name: k for k, name in enumerate(names, 1)}
    images: dict[str, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for result in results:
        size = {"height": result["height"], "width": result["width"]}
        image = images.setdefault(result["image"], {"id": len(images) + 1, "file_name": result["image"], **size})
        if (image["height"], image["width"]) != (result["height"], result["width"]):
            raise ValueError(f"two pictures are called {result['image']}, of different sizes: name them differently")
        for instance in result["instances"]:
            x1, y1, x2, y2 = masks.bbox(instance["segmentation"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories[instance["phrase"]],
                    "segmentation": instance["segmentation"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": instance["area"],
                    "iscrowd": 0,
                    "score": instance["score"],
                    "instruction": result["instruction"],
                }
            )
    return {
        "info": {"description": "Instances segmented by InstructSAM"},
        "licenses": [],
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": k, "name": name, "supercategory": ""} for name, k in categories.items()],
    }
