"""InstructSAM as a user holds it: pictures and instructions in, instances out.

from instructsam import InstructSAM

model = InstructSAM.from_pretrained("tiny")
result = model.segment("photo.jpg", "the two dogs on the left")
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from instructsam.errors import at
from instructsam.inference.cache import ImageCache
from instructsam.inference.inputs import check_source, make_jobs, name_of, read_picture
from instructsam.inference.results import Result
from instructsam.inference.selection import check_selection
from instructsam.inference.session import Session
from instructsam.models.decoding_rules import DEFAULT_RULE
from instructsam.predictor import Predictor
from instructsam.processing.chat import Turns
from instructsam.structures import DEFAULT_THRESHOLD, Prediction


class InstructSAM:
    """Segments every instance that an instruction asks for.

    Not for several threads at once: `instructsam serve` shows how to share one model.

    Args:
        predictor: the model with its processor.
        cached_images: so many pictures stay encoded, so that further instructions about them are quicker.

    Raises:
        ValueError: a negative number of cached images.
    """

    def __init__(self, predictor: Predictor, cached_images: int = 4):
        self.predictor = predictor
        self.cache = ImageCache(cached_images)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        decoding: str = DEFAULT_RULE,
        max_new_tokens: int = 128,
        cached_images: int = 4,
    ) -> InstructSAM:
        """Load a model.

        Args:
            name: ``tiny`` (comes with the package; knows coloured shapes only), a folder, or a hub name; in our own
                layout or the released one.
            device: ``auto`` (an NVIDIA GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` …
            dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
            decoding: ``trained``, or ``released`` as the released inference code does.
            max_new_tokens: limit on written answers.
            cached_images: see the class.

        Raises:
            ValueError: no such model, one of another architecture, a device that is not there, an unknown choice.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        predictor = Predictor.from_pretrained(name, device, dtype, decoding, max_new_tokens)
        return cls(predictor, cached_images)

    def segment(
        self,
        image: Any,
        instruction: str | Sequence[str] | None = None,
        *,
        phrases: Sequence[str] | Sequence[Sequence[str]] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        top_k: int | None = None,
        nms_iou: float | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
    ) -> Any:
        """Segment what is asked for.

        Args:
            image: one picture, or a list of them: path, bytes of an image file, PIL image, numpy array or torch tensor
                (`inputs.read_picture` says which).
            instruction: one for all pictures; or a list, one for each picture, or several about one picture.
            phrases: what to segment, in place of the model's own words: nothing is written, which is quicker. A list of
                phrases for all pictures, or a list of lists, one for each.
            threshold, top_k, nms_iou: which instances are kept, see `selection.select`.
            max_new_tokens: limit on the written answer; None = the model's own.
            batch_size: so many run at once.

        Returns:
            A `Result`, or a list of them if `image` or `instruction` is a list (or `phrases` a list of lists).

        Raises:
            ValueError: nothing asked, something empty, lists of different lengths, a picture that cannot be read: says
                which.
        """
        check_selection(threshold, top_k, nms_iou)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        several_images = isinstance(image, (list, tuple))
        sources = list(image) if several_images else [image]
        if not sources:
            raise ValueError("no picture is given")
        jobs = make_jobs(len(sources), not several_images, instruction, phrases)
        # What can be found before anything runs is found now: an error in the middle would lose all results before it.
        for k, job in enumerate(jobs):
            with _naming(f"question {k}", len(jobs)):
                self.predictor.check(job.turns)
        for k, source in enumerate(sources):
            with _naming(f"picture {k}", len(sources)):
                check_source(source)
        results: list[Result] = []
        pictures: dict[int, Image.Image] = {}
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            pictures = {job.image: pictures[job.image] for job in batch if job.image in pictures}
            for job in batch:
                with _naming(f"picture {job.image}", len(sources)):
                    if job.image not in pictures:
                        pictures[job.image] = read_picture(sources[job.image])
                    self.predictor.check(job.turns, pictures[job.image].size[::-1])
            images, conversations = [pictures[job.image] for job in batch], [job.turns for job in batch]
            predictions = self.answer(images, conversations, threshold, max_new_tokens)
            for job, prediction in zip(batch, predictions, strict=True):
                name = name_of(sources[job.image], job.image)
                result = Result.of(prediction, pictures[job.image], name, job.instruction)
                results.append(result.where(top_k=top_k, nms_iou=nms_iou))
        nested = phrases is not None and not all(isinstance(phrase, str) for phrase in phrases)
        several = several_images or nested or not (instruction is None or isinstance(instruction, str))
        return results if several else results[0]

    def answer(
        self,
        images: Sequence[Image.Image],
        conversations: Sequence[Turns],
        threshold: float | Sequence[float] = DEFAULT_THRESHOLD,
        max_new_tokens: int | None = None,
    ) -> list[Prediction]:
        """The last answer of each conversation, in one batch.

        Args:
            images: of each conversation its picture, in RGB and upright (`inputs.read_picture`).
            conversations: see `Predictor.answer`; such as `Predictor.check` lets pass.
            threshold: instances with score > threshold are kept; one for all, or one for each conversation.
            max_new_tokens: limit on the written answers; None = the model's own.

        Returns:
            Predictions whose ``meta`` says ``seconds`` spent on the batch (pictures, language, detector), and whether
            the picture was ``cached``.
        """
        clock = _Clock(self.predictor.model.device)
        encoded, image_of_row, cached = self.cache.encode(images, self.predictor.encode_images)
        clock.lap("pictures")
        understanding = self.predictor.answer(encoded, image_of_row, conversations, max_new_tokens)
        clock.lap("language")
        predictions = self.predictor.detect(understanding, threshold)
        clock.lap("detector")
        for prediction, known in zip(predictions, cached, strict=True):
            prediction.meta.update(seconds=dict(clock.laps), cached=known)
        return predictions

    def session(self, image: Any, context: bool | None = None) -> Session:
        """A conversation about one picture, see `session.Session`.

        Raises:
            ValueError: a picture that cannot be read.
        """
        return Session(self, read_picture(image), name_of(image, 0), context)


@contextlib.contextmanager
def _naming(what: str, count: int) -> Iterator[None]:
    """Say which one an error is about, if there are several."""
    try:
        yield
    except ValueError as error:
        raise at(what, error) if count > 1 else error from None


class _Clock:
    """Seconds of each part of a batch."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, dict[str, float]()
        self.began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name], self.began = now - self.began, now
