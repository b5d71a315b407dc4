"""Questions of many askers in one batch, where one that cannot be answered spoils no other."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from instructsam.inference.model import InstructSAM
from instructsam.processing.chat import ChatTurn, Turns
from instructsam.structures import DEFAULT_THRESHOLD, Prediction

_log = logging.getLogger(__name__)


class OutOfMemory(ValueError):
    """A question that does not fit into the memory there is, even alone."""


@dataclass(frozen=True)
class Question:
    """A picture (RGB, upright), an instruction about it, the phrases of the answer or None, and the least score."""

    image: Image.Image
    instruction: str
    phrases: tuple[str, ...] | None = None
    threshold: float = DEFAULT_THRESHOLD

    @property
    def turns(self) -> Turns:
        """The conversation that it is."""
        return [ChatTurn(self.instruction, self.phrases)]


def answer_each(model: InstructSAM, questions: Sequence[Question]) -> list[Prediction | Exception]:
    """Of each question the prediction, or the error that it alone gives.

    A text with a reserved token or a picture too thin is found before anything runs. Questions whose answers are given
    and those whose answers are written make a batch each; a batch that fails is tried again one by one, so that what
    needs more memory than there is (`OutOfMemory`) harms only itself.
    """
    outcomes: list[Prediction | Exception | None] = [_fault(model, question) for question in questions]
    for written in (True, False):
        places = [k for k, q in enumerate(questions) if outcomes[k] is None and (q.phrases is None) == written]
        found = _answer(model, [questions[k] for k in places])
        if isinstance(found, Exception):
            _log.warning("a batch of %d failed and is asked one by one: %r", len(places), found)
        for place, k in enumerate(places):
            if not isinstance(found, Exception):
                outcomes[k] = found[place]
            else:
                alone = found if len(places) == 1 else _answer(model, [questions[k]])
                outcomes[k] = _in_words(alone, questions[k]) if isinstance(alone, Exception) else alone[0]
    return [outcome for outcome in outcomes if outcome is not None]


def _fault(model: InstructSAM, question: Question) -> Exception | None:
    try:
        model.predictor.check(question.turns, (question.image.height, question.image.width))
    except Exception as error:
        return error
    return None


def _answer(model: InstructSAM, questions: Sequence[Question]) -> list[Prediction] | Exception:
    if not questions:
        return []
    thresholds = [question.threshold for question in questions]
    try:
        return model.answer([q.image for q in questions], [q.turns for q in questions], thresholds)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # or they would hold the batch's tensors while others are tried
        return error


def _in_words(error: Exception, question: Question) -> Exception:
    from accelerate.utils.memory import should_reduce_batch_size  # knows how each device says so

    if isinstance(error, MemoryError) or should_reduce_batch_size(error):
        size = f"{question.image.width}x{question.image.height} pixels"
        return OutOfMemory(f"a picture of {size}: not enough memory ({repr(error)[:200]})")
    return error
