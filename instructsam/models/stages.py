"""What one stage of a prediction hands to the next (see `predictor.Predictor`), one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instructsam.models.detector import DetectorOutput, ImageFeatures
from instructsam.models.modeling import BridgeOutput


@dataclass
class Prepared:
    """A batch as the model reads it, still in main memory.

    Attributes:
        batch: what the processor's `collate` gives.
        phrases: the phrases of each answer, None where they are to be written; sizes: (height, width) of each image.
    """

    batch: dict[str, Any]
    phrases: Sequence[Sequence[str] | None]
    sizes: list[tuple[int, int]]


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
