"""Pretraining items: an ordinary training item plus what every pixel shows (object map, attributes, boxes).

Shape suffixes: B batch, H W pixels, O objects (row 0 = background), A attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructsam.data.augmentation import PictureChange
from instructsam.data.dataset import InstructionDataset
from instructsam.data.samples import Samples
from instructsam.errors import DataError
from instructsam.masks import decode_batch
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import PhraseTarget, Sample, Turn

CATEGORY = "category"
MAX_PLACE = 6
"""Objects of a group are counted, and counted off, up to so many."""


def attribute_values(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Every attribute of the samples' objects (category name included) with its sorted values.

    Raises:
        ValueError: objects without category name or attributes (names the sample).
    """
    values: dict[str, set[str]] = {}
    for sample in samples:
        for number, item in enumerate(sample.objects):
            if "category" not in item or "attributes" not in item:
                raise ValueError(f"sample {sample.id}: object {number} has no category or no attributes to learn from")
            for name, value in {CATEGORY: item["category"], **item["attributes"]}.items():
                values.setdefault(name, set()).add(value)
    return {name: sorted(found) for name, found in sorted(values.items())}


class GroundedDataset(InstructionDataset):
    """`InstructionDataset` whose items also carry the image's objects; see `collate_grounded` for the batch.

    With `generic_phrase`, `num_generic` turns are added that ask for a random subset of the objects by a phrase that
    gives nothing away (the detector's queries alone must say which); they come last.

    All samples are read once, for the attributes of their objects (`SampleList` keeps these, a table does not). A
    sample that cannot be encoded is an error whatever ``on_bad`` says, as a batch needs the objects of every item.
    """

    def __init__(
        self,
        samples: Samples,
        processor: InstructSAMProcessor,
        generic_phrase: str | None = None,
        num_generic: int = 0,
        **kwargs: Any,
    ):
        super().__init__(samples, processor, **kwargs)
        self.values = attribute_values(self.samples[row] for row in self.rows.tolist())
        self.generic_phrase = generic_phrase
        self.num_generic = num_generic if generic_phrase else 0

    def num_phrases(self, epoch: int = 0) -> NDArray[np.float64]:
        return super().num_phrases(epoch) + self.num_generic

    def num_tokens(self, epoch: int = 0) -> NDArray[np.float64]:
        markup = 16  # of a turn and its phrase
        return super().num_tokens(epoch) + self.num_generic * (self.processor.num_queries + markup)

    def _subset(self, sample: Sample, rng: np.random.Generator) -> Turn:
        most = min(len(sample.objects), self.processor.num_queries)
        chosen = rng.permutation(len(sample.objects))[: rng.integers(1, most + 1)]
        rles = tuple(sample.objects[k]["rle"] for k in chosen)
        phrase = PhraseTarget(self.generic_phrase or "", rles)
        return Turn(instruction=phrase.text, phrases=(phrase,))

    def _ask(self, sample: Sample, number: int, key: tuple[int, int]) -> tuple[Sample, PictureChange]:
        asked, change = super()._ask(sample, number, key)
        rng = np.random.default_rng((self.seed, 1, *key))
        extra = tuple(self._subset(asked, rng) for _ in range(self.num_generic))
        return dataclasses.replace(asked, turns=asked.turns + extra), change

    def _neutral(self, sample_id: str, error: DataError) -> dict[str, Any]:
        raise error

    def _encode(self, asked: Sample, picture: Image.Image | None) -> dict[str, Any]:
        item = super()._encode(asked, picture)
        rles = [thing["rle"] for thing in asked.objects]
        masks_OHW = decode_batch(rles, asked.height, asked.width, checked=True)
        numbers = np.arange(1, len(rles) + 1)[:, None, None]
        item["object_map"] = torch.from_numpy((masks_OHW * numbers).max(0, initial=0))
        rows = [
            [
                values.index({CATEGORY: thing["category"], **thing["attributes"]}[name]) + 1
                for name, values in self.values.items()
            ]
            for thing in asked.objects
        ]
        attributes_OA = torch.tensor([[0] * len(self.values), *rows])
        item["object_attributes"] = attributes_OA
        boxes = torch.tensor([[0.0] * 4, *(thing["bbox"] for thing in asked.objects)])
        boxes = boxes / torch.tensor([asked.width, asked.height] * 2)
        boxes[:, :2] += boxes[:, 2:] / 2
        item["object_boxes"] = boxes
        item["object_places"] = places_of(attributes_OA[1:], boxes[1:, :2])
        generic = [False] * (len(item["targets"]) - self.num_generic) + [True] * self.num_generic
        item["generic"] = generic
        return item


def num_places(num_attributes: int) -> int:
    """Labels of an object in `places_of`."""
    return 3 * (2 * num_attributes)


def places_of(attributes_OA: Tensor, centres_O2: Tensor) -> Tensor:
    """How each object stands among those like it: (1 + O, num_places(A)) int64, row 0 (background) zeros.

    Groups are all objects, those that share an attribute, and those that share the first attribute and another. Three
    labels a group, from 1 to MAX_PLACE: how many objects are in it, and the object's place in it from the left and from
    the top, by the centres of their boxes.
    """
    same_OOA = attributes_OA[:, None] == attributes_OA
    everything_OO1 = torch.ones_like(same_OOA[..., :1])
    groups_OOK = torch.cat([everything_OO1, same_OOA, same_OOA[..., :1] & same_OOA[..., 1:]], -1)
    before_OO2 = centres_O2 < centres_O2[:, None]
    labels = [groups_OOK, *(groups_OOK & before_OO2[..., axis, None] for axis in range(2))]
    size_OK, left_OK, top_OK = (found.sum(1) for found in labels)
    places = torch.cat([size_OK, left_OK + 1, top_OK + 1], -1).clamp(max=MAX_PLACE)
    return torch.cat([places.new_zeros(1, places.shape[1]), places])


def collate_grounded(processor: InstructSAMProcessor, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The processor's batch plus object_map (B, H, W), object_attributes (B, O, A), object_boxes (B, O, 4), generic P,
    and object_places (B, O, …), see `places_of`.

    Raises:
        ValueError: images of different sizes (pretraining is for a world of one size).
    """
    batch = processor.collate(items)
    maps = [item["object_map"] for item in items]
    if len({tuple(m.shape) for m in maps}) > 1:
        raise ValueError("pretraining needs images of one size")

    def stack(name: str) -> Tensor:
        return pad_sequence([item[name] for item in items], batch_first=True)

    batch["object_map"] = torch.stack(maps)
    batch["object_attributes"] = stack("object_attributes")
    batch["object_places"] = stack("object_places")
    batch["object_boxes"] = stack("object_boxes")
    batch["generic"] = torch.tensor([flag for item in items for flag in item["generic"]], dtype=torch.bool)
    return batch
