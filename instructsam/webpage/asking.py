"""What the page does with a question, apart from the page: runs it, remembers it, shows parts of it, writes files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from instructsam.inference.model import InstructSAM
from instructsam.inference.questions import Question, answer_each
from instructsam.inference.results import Result
from instructsam.serving.limits import Limits
from instructsam.visualization import instance_colors, overlay

LOWEST, HIGHEST = 0.05, 0.95
"""Where the threshold's slider ends. All instances with a score above the lower end are kept, so that it can show them
without computing anything anew."""


@dataclass
class Conversation:
    """What one visitor has asked about one picture.

    Attributes:
        picture: its path.
        results: one for each instruction, with all instances above `LOWEST`; all hold the same image, decoded once.
        shown: which of them is on the page.
    """

    picture: str | None = None
    results: list[Result] = field(default_factory=list)
    shown: int = -1

    @property
    def result(self) -> Result | None:
        return self.results[self.shown] if self.results else None


class Asker:
    """One model for all visitors, one question at a time.

    Args:
        model: used here only; limits: of pictures and texts.
        history: so many instructions about a picture are remembered.
    """

    def __init__(self, model: InstructSAM, limits: Limits, history: int = 20):
        self.model, self.limits, self.history = model, limits, history
        self._one_at_a_time = threading.Lock()

    def ask(self, conversation: Conversation, path: str | None, instruction: str, phrases: str) -> Conversation:
        """Ask about the picture at a path; with phrases (separated by commas) nothing is written.

        Raises:
            ValueError: no picture, one that is beyond the limits or the memory, gone, or none at all, nothing asked: in
                words for the visitor.
        """
        if not path:
            raise ValueError("Choose a picture first.")
        said = [phrase for phrase in (part.strip() for part in phrases.split(",")) if phrase]
        text, words = self.limits.texts(instruction, said)
        if conversation.picture != path:
            conversation = Conversation(path)
        image = conversation.results[-1].image if conversation.results else self._read(path)
        with self._one_at_a_time:
            [answer] = answer_each(self.model, [Question(image, text, words, LOWEST)])
        if isinstance(answer, Exception):
            raise answer
        result = Result.of(answer, image, Path(path).name, text)
        results = [*conversation.results, result][-self.history :]
        return Conversation(path, results, len(results) - 1)

    def _read(self, path: str) -> Image.Image:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:  # uploads are not kept for ever
            raise ValueError("The picture is no longer kept: choose it again.") from None
        return self.limits.picture(content)


def visible(result: Result, threshold: float) -> list[int]:
    """Indices of the instances above the threshold."""
    return [k for k, instance in enumerate(result) if instance.score > threshold]


def picture_of(result: Result, chosen: Sequence[int]) -> Image.Image:
    """The overlay of these instances; each keeps its colour and number whichever others are shown."""
    colors = instance_colors(len(result))
    labels = [f"{label_of(result, k)} {result[k].score:.2f}" for k in chosen]
    return overlay(result.image, [result[k] for k in chosen], labels, colors=[colors[k] for k in chosen])


def label_of(result: Result, k: int) -> str:
    """What an instance is called everywhere on the page."""
    return f"{k + 1} {result[k].phrase}"


def rows_of(result: Result, chosen: Sequence[int]) -> list[list[Any]]:
    """Table rows: number, phrase, score, area in pixels and in per cent of the picture."""
    pixels = result.prediction.height * result.prediction.width
    return [
        [k + 1, result[k].phrase, round(result[k].score, 3), result[k].area, round(100 * result[k].area / pixels, 1)]
        for k in chosen
    ]


def timings_of(result: Result) -> str:
    """One line about how long it took."""
    meta = result.prediction.meta
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in meta["seconds"].items())
    known = " (picture known from before)" if meta["cached"] else ""
    return f"{sum(meta['seconds'].values()):.2f} s: {parts}{known}"
