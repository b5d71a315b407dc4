"""A conversation about one picture: every instruction sees what was said before.

The picture is encoded once, as long as it is among those that the model keeps encoded (`cached_images`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from instructsam.errors import DataError, at
from instructsam.inference.inputs import make_jobs
from instructsam.inference.results import Result
from instructsam.inference.selection import check_selection
from instructsam.predictor import Predictor
from instructsam.processing.chat import ChatTurn, Turns
from instructsam.structures import DEFAULT_THRESHOLD, Prediction

_PHRASE = re.compile(r"<\|object_ref_start\|>.*?<\|object_ref_end\|>", re.DOTALL)


class Model(Protocol):
    """What a session needs of an `InstructSAM`."""

    predictor: Predictor

    def answer(
        self,
        images: Sequence[Image.Image],
        conversations: Sequence[Turns],
        threshold: float | Sequence[float] = ...,
        max_new_tokens: int | None = ...,
    ) -> list[Prediction]:
        """The last answer of each conversation."""
        ...


class Session:
    """What `InstructSAM.session` gives.

    Args:
        model, image, name: whose conversation, about which picture (RGB, upright), called what.
        context: earlier instructions and answers stand before a new one, as in the conversations that the released
            model is trained on. False: every instruction stands alone. None: as the model was trained
            (`InstructSAMConfig.independent_turns`; the tiny model knows no conversations).

    Attributes:
        results: of all instructions so far.
    """

    def __init__(self, model: Model, image: Image.Image, name: str, context: bool | None = None):
        if context is None:
            context = not model.predictor.model.config.independent_turns
        self.model, self.image, self.name, self.context = model, image, name, context
        self.results: list[Result] = []
        self._turns: list[ChatTurn] = []

    def segment(
        self,
        instruction: str | None = None,
        *,
        phrases: Sequence[str] | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        top_k: int | None = None,
        nms_iou: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Result:
        """The next instruction; arguments as those of `InstructSAM.segment`.

        Raises:
            ValueError: nothing asked, or something empty; a conversation that has become too long (`reset` helps).
        """
        check_selection(threshold, top_k, nms_iou)
        jobs = make_jobs(1, True, instruction, phrases)
        if len(jobs) != 1:
            raise ValueError("a session takes one instruction at a time")
        job = jobs[0]
        turns = [*self._turns, *job.turns]
        try:
            self.model.predictor.check(turns, self.image.size[::-1])
        except DataError as error:
            if error.kind != "too long":
                raise
            raise at(f"after {len(self._turns)} turns (reset() starts afresh)", error) from error
        prediction = self.model.answer([self.image], [turns], threshold, max_new_tokens)[0]
        if self.context and prediction.meta["finished"]:
            self._remember(job.instruction, prediction.answer, prediction.phrases)
        result = Result.of(prediction, self.image, self.name, job.instruction).where(top_k=top_k, nms_iou=nms_iou)
        self.results.append(result)
        return result

    def reset(self) -> None:
        """Forget what was said; the picture stays."""
        self.results.clear()
        self._turns.clear()

    def _remember(self, instruction: str, answer: str, phrases: Sequence[str]) -> None:
        pieces = _PHRASE.split(answer)
        if len(pieces) != len(phrases) + 1:  # a phrase that got no queries
            pieces = []
        try:
            self.model.predictor.processor.chat.answer(phrases, pieces)
        except DataError:  # such as a phrase that is empty or never ends: it cannot be said again
            return
        if phrases or "".join(pieces).strip():
            self._turns.append(ChatTurn(instruction, list(phrases), pieces))
