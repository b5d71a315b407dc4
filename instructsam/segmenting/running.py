"""Jobs through the model, batch by batch; the next batch's pictures are read meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from instructsam.errors import DataError, at
from instructsam.inference.inputs import read_picture
from instructsam.inference.model import InstructSAM
from instructsam.inference.questions import Question, answer_each
from instructsam.inference.results import Result
from instructsam.processing.chat import ChatTurn
from instructsam.segmenting.jobs import FileJob

Outcome = tuple[FileJob, "Result | Exception"]


def check_texts(model: InstructSAM, jobs: Sequence[FileJob]) -> None:
    """Raise ValueError for an instruction, or phrases, that could not be answered about any picture."""
    for text, phrases in dict.fromkeys((job.text, job.phrases) for job in jobs):
        model.predictor.check([ChatTurn(text, phrases)])


def run_jobs(
    model: InstructSAM,
    jobs: Sequence[FileJob],
    batch_size: int,
    threshold: float,
    top_k: int | None = None,
    nms_iou: float | None = None,
) -> Iterator[Outcome]:
    """Each job with its result, in order; with the error where its picture or its text is of no use.

    Raises:
        Exception: whatever else goes wrong, where it concerns no single job.
    """
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(_read, batches[0]) if batches else None
        for k, batch in enumerate(batches):
            assert ahead is not None
            pictures = ahead.result()
            ahead = reader.submit(_read, batches[k + 1]) if k + 1 < len(batches) else None
            for job, outcome in _run(model, batch, pictures, threshold):
                if isinstance(outcome, Result):
                    yield job, outcome.where(top_k=top_k, nms_iou=nms_iou)
                elif isinstance(outcome, ValueError):
                    yield job, at(job.where, outcome) if job.where else outcome
                else:
                    raise outcome


def _read(batch: Sequence[FileJob]) -> dict[Path, Image.Image | DataError]:
    known: dict[Path, Image.Image | DataError] = {}
    for job in batch:
        if job.image not in known:
            try:
                known[job.image] = read_picture(job.image)
            except DataError as error:
                known[job.image] = error
    return known


def _run(
    model: InstructSAM, batch: Sequence[FileJob], pictures: dict[Path, Image.Image | DataError], threshold: float
) -> Iterator[Outcome]:
    questions: dict[str, Question] = {}
    for job in batch:
        picture = pictures[job.image]
        if isinstance(picture, Image.Image):
            questions[job.id] = Question(picture, job.text, job.phrases, threshold)
    answers = dict(zip(questions, answer_each(model, list(questions.values())), strict=True))
    for job in batch:
        picture = pictures[job.image]
        answer = answers.get(job.id, picture)
        if isinstance(answer, Exception):
            yield job, answer
        else:
            question = questions[job.id]
            yield job, Result.of(answer, question.image, job.image.name, question.instruction)  # type: ignore[arg-type]
