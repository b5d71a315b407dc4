"""What the harness evaluates: anything that answers instructions about images with instances (DESIGN section 13).

InstructSAM's `Predictor` is one, baselines are others. No torch here: a segmenter may be a program of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from instructsam.structures import Prediction


@runtime_checkable
class Segmenter(Protocol):
    """Images and instructions in, predictions out.

    Attributes:
        name: what reports call it.
    """

    name: str

    def segment(self, images: Sequence[Any], instructions: Sequence[str], *, threshold: float) -> list[Prediction]:
        """One prediction per (image, instruction), in order; instances with score > threshold.

        Args:
            images: paths or PIL images.
            instructions: as many.

        Raises:
            ValueError: an image that cannot be read, an empty instruction; the message says which.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that its answers depend on, as plain JSON: for reports, and to tell one run from another."""
        ...


@runtime_checkable
class StagedSegmenter(Segmenter, Protocol):
    """A segmenter whose work comes in three stages, so that those of different batches can run at the same time.

    ``finish(compute(prepare(images, instructions)), threshold)`` is ``segment(images, instructions, threshold)`` of one
    batch. `prepare` and `finish` are called in other threads than `compute`, `prepare` in several at once.
    """

    def prepare(self, images: Sequence[Any], instructions: Sequence[str]) -> Any:
        """Read and transform a batch: no accelerator, no gradient, no state."""
        ...

    def compute(self, prepared: Any) -> Any:
        """Run the model on what `prepare` gave."""
        ...

    def finish(self, computed: Any, threshold: float) -> list[Prediction]:
        """Masks at image size, run-length encoded, of what `compute` gave."""
        ...

    def estimate_length(self, height: int, width: int, instruction: str) -> int:
        """About how long the sequence of an image of that size (pixels) and that instruction is; batches are made of
        instructions of similar length."""
        ...
