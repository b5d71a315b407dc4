"""What one stage of a prediction hands to the next (see `predictor.Predictor`), one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instructsam.models.detector import DetectorOutput, ImageFeatures
from instructsam.models.modeling import BridgeOutput, VisionFeatures


@dataclass
class Prepared:
    """A batch as the model reads it, still in main memory.

    Attributes:
        batch: what the processor's `collate` gives.
        phrases: the phrases of each answer, None where they are to be written; sizes: (height, width) of each image.
        answer_start: of each row, the position of the last answer's first token: earlier turns lie before it.
    """

    batch: dict[str, Any]
    phrases: Sequence[Sequence[str] | None]
    sizes: list[tuple[int, int]]
    answer_start: list[int]


@dataclass
class EncodedImages:
    """What both vision encoders made of some pictures, on the model's device.

    Attributes:
        vision: of the VLM; grid_thw: (images, 3), its patches; detector: the detector's maps.
        sizes: (height, width) of each picture.
    """

    vision: VisionFeatures
    grid_thw: Tensor
    detector: ImageFeatures
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.sizes)

    def one(self, index: int) -> EncodedImages:
        """One of them, in memory of its own: it keeps no other alive."""
        tokens, layers = self.vision.tokens[index], self.vision.deepstack[index]
        row = torch.tensor([index], device=self.grid_thw.device)
        return EncodedImages(
            VisionFeatures([tokens.clone()], [[layer.clone() for layer in layers]]),
            self.grid_thw[row],
            self.detector.select(row),
            [self.sizes[index]],
        )

    @staticmethod
    def join(parts: Sequence[EncodedImages]) -> EncodedImages:
        """The pictures of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        maps = zip(*(part.detector.maps for part in parts), strict=True)
        return EncodedImages(
            VisionFeatures(
                [tokens for part in parts for tokens in part.vision.tokens],
                [layers for part in parts for layers in part.vision.deepstack],
            ),
            torch.cat([part.grid_thw for part in parts]),
            ImageFeatures([torch.cat(m) for m in maps], torch.cat([part.detector.position for part in parts])),
            [size for part in parts for size in part.sizes],
        )


@dataclass
class Answered:
    """What the language model said, for each image of a batch.

    Attributes:
        answers: the text of each answer; phrases: its phrases; sizes: (height, width) of each image.
        finished: for each answer, False where a limit cut it off.
    """

    answers: list[str]
    phrases: list[list[str]]
    sizes: list[tuple[int, int]]
    finished: list[bool]


@dataclass
class Understanding(Answered):
    """What the language model made of a batch, before the detector ran.

    Attributes:
        features: image features of the detector.
        bridge: projected queries and phrase features, phrases of the batch on one axis P.
    """

    features: ImageFeatures
    bridge: BridgeOutput


@dataclass
class Detection(Answered):
    """What the detector made of a batch, before post-processing; `output` is None where no answer has a phrase."""

    output: DetectorOutput | None
