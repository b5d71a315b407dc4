"""Everything that can be checked of a training set before it is trained on (DESIGN section 16).

The readers check what is written in the files. Here comes what they leave out, because it needs more than one record
or a look at the pictures: ids that occur twice, texts with reserved tokens, phrases with more instances than there are
queries, and pictures that are missing, broken or of another size. A fault is reported once, where it is; what is lost
because of it is only counted.

Not checked is whether a sample fits the longest sequence: that takes a tokenizer. Training counts what it leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path

from instructsam.data.checks import Place, Problem, Skips
from instructsam.data.leakage import Leakage, coco_id
from instructsam.data.picture_checks import Picture, PictureChecks
from instructsam.data.sources import Source, read_source
from instructsam.data.table import MANIFEST, SampleTable
from instructsam.errors import kind_of
from instructsam.processing.special_tokens import QWEN_IDS
from instructsam.structures import Sample, Turn

MOST_PHRASES = 10
MOST_INSTANCES = 100
"""Limits of a sample (DESIGN section 9). What is beyond them is no fault: training asks a part of it at a time."""

Report = Callable[[Problem], None]


def validate_source(
    source: Source,
    pictures: PictureChecks,
    report: Report,
    held_out: Collection[int] = (),
    num_queries: int | None = 10,
    progress: Callable[[], object] = lambda: None,
    too_many_instances: str = "raise",
    limit: int | None = None,
) -> Counter[str]:
    """Read a source to its end and check every sample. Memory grows by a few numbers a sample only.

    A picture is opened once for every size that samples state for it. Its problem is that of the first such sample.

    Args:
        report: is handed every problem. Its place is one in the source's files; for problems of a sample its id and
            the turn; for those of pictures their file and the sample's id.
        held_out: COCO ids of the pictures of validation and test splits.
        num_queries: more instances of a phrase are too many; None for any number.
        progress: is called after each sample.
        too_many_instances: "raise" makes such a phrase a problem; with "drop" or "truncate", which is what training
            does about it then, it is a note.
        limit: the first so many samples only.

    Returns:
        How many samples, instructions, phrases, instances and pictures there are, and notes on what is no fault.
    """
    skips = Skips("skip", report=report)
    notes: Counter[str] = Counter()
    ids: set[int] = set()
    opened: set[int] = set()  # hashes of pictures and sizes
    leakage = Leakage()
    try:
        for sample in islice(read_source(source, skips, held_out, leakage), limit):
            count(sample, notes)
            if coco_id(sample.image) in held_out:
                notes["samples kept (held_out is false) although their pictures are in a validation or test split"] += 1
            if (identity := hash(sample.id)) in ids:
                report(Problem("duplicate", Place(sample.id), "another sample of the source has this id"))
            ids.add(identity)
            for problem in check_sample(sample, num_queries):
                if problem.kind != "too many instances" or too_many_instances == "raise":
                    report(problem)
                else:
                    notes[f"phrases of more than {num_queries} instances (training: {too_many_instances})"] += 1
            if sample.image is not None:
                picture = Picture(str(sample.image), sample.height, sample.width, sample.id)
                if (key := hash(picture[:3])) not in opened:
                    opened.add(key)
                    for problem in pictures.add(picture):
                        report(problem)
            progress()
    except ValueError as error:
        report(Problem(kind_of(error), Place(source.name), f"{error}; what comes after is not checked"))
    for problem in pictures.finish():
        report(problem)
    notes["pictures"] = len(opened)
    notes["samples left out: their pictures are in a validation or test split"] = leakage.samples
    notes["samples kept although their pictures' names give no COCO id (held_out is true)"] = leakage.unknown
    for what, number in skips.counts.items():
        notes[f"{what} left out"] += number
    for what, number in skips.aside.items():
        notes[f"{what} cannot be used"] += number
    return +notes


def count(sample: Sample, notes: Counter[str]) -> None:
    """Count what a sample has, and what is unusual about it."""
    phrases = [phrase for turn in sample.turns for phrase in turn.phrases]
    instances = sum(len(phrase.rles) for phrase in phrases)
    notes["samples"] += 1
    notes["instructions"] += len(sample.turns)
    notes["phrases"] += len(phrases)
    notes["instances"] += instances
    if len(phrases) > MOST_PHRASES:
        notes[f"samples of more than {MOST_PHRASES} phrases (a part is asked at a time)"] += 1
    if instances > MOST_INSTANCES:
        notes[f"samples of more than {MOST_INSTANCES} instances (a part is asked at a time)"] += 1
    if sample.image is None:
        notes["samples about no picture"] += 1


def check_sample(sample: Sample, num_queries: int | None = 10) -> Iterator[Problem]:
    """What is wrong with a sample by itself: its texts, and phrases of more instances than there are queries."""
    for number, turn in enumerate(sample.turns):
        place = Place(sample.id, f"turns[{number}]" + (f" (id {turn.id!r})" if turn.id else ""))
        if reason := _text_fault(turn):
            yield Problem("text", place, reason)
        for phrase in turn.phrases:
            if num_queries is not None and len(phrase.rles) > num_queries:
                reason = f"phrase {phrase.text[:80]!r} has {len(phrase.rles)} instances for {num_queries} queries"
                yield Problem("too many instances", place, reason)


def _text_fault(turn: Turn) -> str:
    for what, text in (("instruction", turn.instruction), *(("phrase", phrase.text) for phrase in turn.phrases)):
        if not text.strip():
            return f"the {what} is empty"
    for text in turn.texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"text {text[:80]!r} holds half a character, which no file can hold"
        for token in QWEN_IDS:
            if token in text:
                return f"text {text[:80]!r} contains the reserved token {token!r}"
    return ""


def verify_table(folder: Path, report: Report) -> bool:
    """Whether there is a prepared table in the folder; the checksums of its files are compared."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        SampleTable(folder).verify()
    except ValueError as error:
        report(Problem(kind_of(error), Place(folder), f"{error} (python -m instructsam.prepare makes it anew)"))
    return True
