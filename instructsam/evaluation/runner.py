"""Run a segmenter over instructions and write down what it said: one plain record per instruction.

Batches of similar length are formed once for all processes and taken in turn, so each instruction is answered exactly
once, in the same batch and hence with the same figures, whatever the number of processes and however often a run was
killed. Reading, model and mask encoding of different batches overlap (`pipeline`), records are on disk as soon as they
are made (`streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from instructsam.evaluation import ranks, streaming
from instructsam.evaluation.fingerprint import items_digest
from instructsam.evaluation.pipeline import buckets, overlapped
from instructsam.evaluation.segmenter import Segmenter, StagedSegmenter
from instructsam.structures import DEFAULT_THRESHOLD, RLE, Prediction, Sample, Turn

Record = dict[str, Any]

PIXELS_PER_TOKEN = 32 * 32  # of Qwen3-VL, where a segmenter does not say how long its sequences are


@dataclass(frozen=True)
class EvalItem:
    """One instruction about one image.

    Attributes:
        ignore_rle: pixels that count nowhere.
        text: the expression without the prompt around it, where there is one.
    """

    sample: Sample
    turn: Turn
    ignore_rle: RLE | None = None
    text: str = ""

    @property
    def id(self) -> str:
        return self.turn.id or f"{self.sample.id}:{self.turn.instruction}"


def flatten(samples: Sequence[Sample], limit: int | None = None) -> list[EvalItem]:
    """Every turn of every sample on its own; with `limit`, that many spread evenly over the whole list."""
    return spread([EvalItem(sample, turn) for sample in samples for turn in sample.turns], limit)


def spread(items: Sequence[EvalItem], limit: int | None) -> list[EvalItem]:
    """`limit` items spread evenly over the whole list; all of them for None.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1 (null = all instructions)")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[k * len(items) // limit] for k in range(limit)]


def make_record(item: EvalItem, prediction: Prediction, extra: Mapping[str, Any] | None = None) -> Record:
    """The record of one instruction, as `evaluation.metrics` reads it; `extra` keys are added (benchmark, split)."""
    return {
        **_question(item),
        **(extra or {}),
        "pred_rles": [instance.rle for instance in prediction.instances],
        "pred_scores": [instance.score for instance in prediction.instances],
        "pred_boxes": [list(instance.box) for instance in prediction.instances],
        "pred_phrase_ids": [instance.phrase_index for instance in prediction.instances],
        "pred_phrases": list(prediction.phrases),
        "answer": prediction.answer,
        "finished": prediction.meta.get("finished", True),
    }


def _question(item: EvalItem) -> Record:
    """What a record holds before there is an answer."""
    question: Record = {
        "id": item.id,
        "image": str(item.sample.image),
        "instruction": item.turn.instruction,
        "kind": item.turn.kind,
        "height": item.sample.height,
        "width": item.sample.width,
        "gt_rles": [rle for phrase in item.turn.phrases for rle in phrase.rles],
    }
    if all(phrase.text for phrase in item.turn.phrases):  # some sets name no phrase, only masks
        question["gt_phrases"] = [phrase.text for phrase in item.turn.phrases]
    if item.text:
        question["text"] = item.text
    if item.ignore_rle is not None:
        question["ignore_rle"] = item.ignore_rle
    return question


def run(
    segmenter: Segmenter,
    items: Sequence[EvalItem],
    path: str | Path | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    batch_size: int = 8,
    *,
    fingerprint: Mapping[str, Any] | None = None,
    restart: bool = False,
    extra: Mapping[str, Any] | None = None,
    workers: int = 2,
    label: str = "evaluating",
    progress: bool = True,
) -> list[Record]:
    """Records of all items in order, on every rank; each rank answers its share of the batches.

    Args:
        path: where to write them as JSON lines; there a killed run goes on. None = in memory only.
        threshold: instances with score > threshold are kept.
        batch_size: instructions that run through the model at once. It may change from one start to the next.
        fingerprint: what else, besides segmenter, threshold and items, makes this run another than the one in `path`.
        restart: throw away what `path` holds.
        extra: keys to add to every record.
        workers: threads that read ahead; 0 = read, compute and encode one after the other.

    Raises:
        ValueError: ids that occur twice, a batch size below 1, whatever the segmenter refuses (an unreadable image,
            say), and `path` with predictions of another run.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size={batch_size}, workers={workers}: must be at least 1 and 0")
    if not items:
        raise ValueError("no instructions to evaluate")
    ids = _unique_ids(items)
    rank, world = ranks.rank_and_world()
    all_batches = buckets(_lengths(segmenter, items), batch_size)
    if path is None:
        mine: dict[int, Record] = {}

        def keep(indices: Sequence[int], records: Sequence[Record]) -> None:
            mine.update(zip(indices, records, strict=True))

        _answer(segmenter, items, all_batches[rank::world], threshold, workers, extra, keep, label, progress)
        shares = [record for share in ranks.gather(mine) for record in share.items()]
        return [record for _, record in sorted(shares, key=lambda pair: pair[0])]

    path = Path(path)
    whole = {
        "segmenter": segmenter.describe(),
        "threshold": threshold,
        "instructions": {"count": len(items), "sha256": items_digest(map(_question, items))},
        **(fingerprint or {}),
        **({"record": dict(extra)} if extra else {}),
    }
    with ExitStack() as stack:

        def begin() -> set[str]:
            stack.enter_context(streaming.locked(path))
            return streaming.begin(path, ids, whole, restart)

        done = ranks.on_first(begin)
        # A batch that was finished in part runs again as a whole: its answers may depend on who else is in it.
        left = [batch for batch in all_batches if any(ids[index] not in done for index in batch)]
        if left:
            part = streaming.Part(path, rank, whole)

            def write(indices: Sequence[int], records: Sequence[Record]) -> None:
                part.append([record for record in records if record["id"] not in done])

            try:
                _answer(segmenter, items, left[rank::world], threshold, workers, extra, write, label, progress)
            finally:
                part.close()
        ranks.wait_for_all()
        ranks.on_first(lambda: streaming.merge(path, ids, whole))
        return streaming.read_records(path)


def _answer(
    segmenter: Segmenter,
    items: Sequence[EvalItem],
    share: Sequence[Sequence[int]],
    threshold: float,
    workers: int,
    extra: Mapping[str, Any] | None,
    done: Callable[[Sequence[int], Sequence[Record]], None],
    label: str,
    progress: bool,
) -> None:
    """Run batches of indices through the segmenter and hand their records to `done`."""
    staged = segmenter if isinstance(segmenter, StagedSegmenter) else None

    def read(batch: Sequence[int]) -> Any:
        images = [items[index].sample.image for index in batch]
        instructions = [items[index].turn.instruction for index in batch]
        return staged.prepare(images, instructions) if staged else (images, instructions)

    def compute(prepared: Any) -> Any:
        return staged.compute(prepared) if staged else segmenter.segment(*prepared, threshold=threshold)

    def encode(batch: Sequence[int], computed: Any) -> int:
        predictions = staged.finish(computed, threshold) if staged else computed
        if len(predictions) != len(batch):
            raise ValueError(f"{segmenter.name}: {len(predictions)} predictions for {len(batch)} instructions")
        for index, found in zip(batch, predictions, strict=True):
            _check_size(items[index], found)
        done(batch, [make_record(items[k], found, extra) for k, found in zip(batch, predictions, strict=True)])
        return len(batch)

    hidden = not progress or ranks.rank_and_world()[0] > 0
    with tqdm(total=sum(map(len, share)), desc=label, unit="instruction", disable=hidden, leave=False) as bar:
        for count in overlapped(share, read, compute, encode, workers):
            bar.update(count)


def _check_size(item: EvalItem, prediction: Prediction) -> None:
    found, wanted = (prediction.height, prediction.width), (item.sample.height, item.sample.width)
    if found != wanted:
        raise ValueError(
            f"instruction {item.id!r}: {item.sample.image} has height and width {found}, the annotations say {wanted} "
            "(EXIF orientation counts)"
        )


def _lengths(segmenter: Segmenter, items: Sequence[EvalItem]) -> list[int]:
    """Estimated sequence lengths."""
    lengths = []
    for item in items:
        height, width, instruction = item.sample.height, item.sample.width, item.turn.instruction
        if not isinstance(segmenter, StagedSegmenter):
            lengths.append(height * width // PIXELS_PER_TOKEN + len(instruction.split()))
            continue
        try:
            lengths.append(segmenter.estimate_length(height, width, instruction))
        except ValueError as error:
            raise ValueError(f"instruction {item.id!r} ({item.sample.image}): {error}") from None
    return lengths


def _unique_ids(items: Sequence[EvalItem]) -> list[str]:
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"instruction {twice!r} occurs twice: each is scored once only")
    return ids
