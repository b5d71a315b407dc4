"""What a user gets: the instances of one answer, and everything that can be made of them.

for instance in result:
    print(instance.phrase, instance.score, instance.box, instance.area)
result.masks                      # (K, H, W) bool
result.save("result.png")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from instructsam import masks
from instructsam.inference.coco import coco_dataset
from instructsam.inference.labelme import labelme_file
from instructsam.inference.selection import select
from instructsam.inference.supervision import as_detections
from instructsam.structures import Instance, Prediction
from instructsam.visualization import overlay

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("result", "coco", "labelme")


@dataclass(frozen=True)
class FoundInstance(Instance):
    """An `Instance` with its pixels at hand."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool, at the picture's size."""
        return masks.decode(self.rle)

    @cached_property
    def area(self) -> int:
        """Pixels of the mask."""
        return masks.area(self.rle)


@dataclass(frozen=True, repr=False)
class Result(Sequence[FoundInstance]):
    """One answer: a sequence of `FoundInstance`, by phrase, then by falling score.

    Attributes:
        prediction: answer, phrases, size, ``meta``.
        image: the picture in RGB, upright: masks and boxes are about it.
        name: of the picture, for exports.
        instruction: what was asked; of a call with phrases alone, the phrases.
        found: the instances.
    """

    prediction: Prediction
    image: Image.Image
    name: str
    instruction: str
    found: tuple[FoundInstance, ...]

    @classmethod
    def of(cls, prediction: Prediction, image: Image.Image, name: str, instruction: str) -> Result:
        found = tuple(FoundInstance(i.rle, i.score, i.box, i.phrase, i.phrase_index) for i in prediction.instances)
        return cls(prediction, image, name, instruction, found)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], image: Image.Image) -> Result:
        """A result from what `to_dict` made of it, and its picture (RGB, upright)."""
        instances = tuple(
            Instance(i["segmentation"], i["score"], tuple(i["box"]), i["phrase"], i["phrase_index"])
            for i in values["instances"]
        )
        size, meta = (values["height"], values["width"]), {"finished": values["finished"]}
        prediction = Prediction(values["answer"], tuple(values["phrases"]), instances, *size, meta)
        return cls.of(prediction, image, values["image"], values["instruction"])

    # ---- a sequence of instances ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.found)

    @overload
    def __getitem__(self, index: int) -> FoundInstance: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[FoundInstance, ...]: ...
    def __getitem__(self, index: int | slice) -> FoundInstance | tuple[FoundInstance, ...]:
        return self.found[index]

    def __repr__(self) -> str:
        listed = ", ".join(f"{i.phrase!r} {i.score:.2f}" for i in self.found[:5])
        more = ", …" if len(self.found) > 5 else ""
        return f"<Result {self.name}: {self.instruction!r} → {len(self.found)} instances [{listed}{more}]>"

    # ---- all of them at once --------------------------------------------------------------------------------------

    @property
    def answer(self) -> str:
        """What the model wrote."""
        return self.prediction.answer

    @property
    def phrases(self) -> tuple[str, ...]:
        """The answer's phrases, those without an instance too."""
        return self.prediction.phrases

    @property
    def finished(self) -> bool:
        """False if a limit cut the answer off; phrases may be missing then."""
        return self.prediction.meta.get("finished", True)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(K, H, W) bool."""
        height, width = self.prediction.height, self.prediction.width
        return masks.decode_batch([i.rle for i in self.found], height, width, checked=True)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(K, 4) float32: x1, y1, x2, y2 in pixels."""
        return np.array([i.box for i in self.found], np.float32).reshape(-1, 4)

    @property
    def scores(self) -> NDArray[np.float32]:
        """(K,) float32 in 0…1."""
        return np.array([i.score for i in self.found], np.float32)

    def where(
        self,
        threshold: float = 0.0,
        top_k: int | None = None,
        nms_iou: float | None = None,
        phrases: Sequence[str] | None = None,
    ) -> Result:
        """The same answer with fewer instances: see `selection.select`; of these phrases only, if given.

        Nothing is computed anew, so it cannot bring back what the call that made the result left out.

        Raises:
            ValueError: choices that cannot be, a phrase that is not in the answer.
        """
        unknown = sorted(set(phrases or ()) - set(self.phrases))
        if unknown:
            raise ValueError(f"the answer has no phrase {unknown[0]!r}, only {', '.join(map(repr, self.phrases))}")
        found = [i for i in self.found if phrases is None or i.phrase in phrases]
        return replace(self, found=select(found, threshold, top_k, nms_iou))

    # ---- formats --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: masks as COCO RLE at the picture's size, boxes xyxy in pixels."""
        return {
            "image": self.name,
            "instruction": self.instruction,
            "height": self.prediction.height,
            "width": self.prediction.width,
            "answer": self.answer,
            "finished": self.finished,
            "phrases": list(self.phrases),
            "instances": [
                {
                    "phrase": i.phrase,
                    "phrase_index": i.phrase_index,
                    "score": round(i.score, 6),
                    "box": [round(value, 2) for value in i.box],
                    "area": i.area,
                    "segmentation": dict(i.rle),
                }
                for i in self.found
            ],
        }

    def to_coco(self) -> dict[str, Any]:
        """A COCO data set of this picture; phrases are its categories. Of several: `coco.coco_dataset`."""
        return coco_dataset([self.to_dict()])

    def to_labelme(self, shape_type: str = "mask", image_path: str | None = None) -> dict[str, Any]:
        """A labelme file, see `labelme.labelme_file`."""
        return labelme_file(self.image, self.name, self.found, shape_type, image_path)

    def to_supervision(self) -> Any:
        """``supervision.Detections`` (needs the package of that name), see `supervision.as_detections`."""
        return as_detections(self.found, self.boxes, self.masks, self.scores)

    def plot(self) -> Image.Image:
        """The picture with coloured masks, boxes and labels."""
        return overlay(self.image, self.found)

    def save(self, path: str | Path, format: str = "result") -> Path:
        """Write to a file, whose folder is made if need be.

        Args:
            path: ``.png``, ``.jpg``, ``.webp``: the overlay; ``.json``: the data.
            format: of JSON: ``result`` (`to_dict`), ``coco`` or ``labelme``.

        Raises:
            ValueError: another suffix, another format.
        """
        path = Path(path)
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        if path.suffix.lower() not in (*PICTURES, ".json"):
            raise ValueError(f"{path}: the suffix must be .json or one of {', '.join(PICTURES)}")
        if format != "result" and path.suffix.lower() != ".json":
            raise ValueError(f"{path}: format={format!r} is JSON, the suffix must be .json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() != ".json":
            self.plot().save(path)
        else:
            make = {"result": self.to_dict, "coco": self.to_coco, "labelme": self.to_labelme}[format]
            path.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
        return path
