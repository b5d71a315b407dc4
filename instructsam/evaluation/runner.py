"""Run a predictor over instructions and write down what it said: one plain record per instruction.

Every rank takes its own share of the items without padding, so that each instruction is scored exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from instructsam.predictor import Predictor
from instructsam.structures import Prediction, Sample, Turn

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalItem:
    """One instruction about one image."""

    sample: Sample
    turn: Turn

    @property
    def id(self) -> str:
        return self.turn.id or f"{self.sample.id}:{self.turn.instruction}"


def flatten(samples: Sequence[Sample], limit: int | None = None) -> list[EvalItem]:
    """Every turn of every sample on its own; with `limit`, that many spread evenly over the whole list."""
    items = [EvalItem(sample, turn) for sample in samples for turn in sample.turns]
    if limit is not None and limit < len(items):
        items = [items[k * len(items) // limit] for k in range(limit)]
    return items


def make_record(item: EvalItem, prediction: Prediction) -> Record:
    """The record of one instruction, as `evaluation.metrics` reads it."""
    return {
        "id": item.id,
        "image": str(item.sample.image),
        "instruction": item.turn.instruction,
        "kind": item.turn.kind,
        "height": item.sample.height,
        "width": item.sample.width,
        "gt_rles": [rle for phrase in item.turn.phrases for rle in phrase.rles],
        "gt_phrases": [phrase.text for phrase in item.turn.phrases],
        "pred_rles": [instance.rle for instance in prediction.instances],
        "pred_scores": [instance.score for instance in prediction.instances],
        "pred_boxes": [list(instance.box) for instance in prediction.instances],
        "pred_phrase_ids": [instance.phrase_index for instance in prediction.instances],
        "pred_phrases": list(prediction.phrases),
        "answer": prediction.answer,
        "finished": prediction.meta.get("finished", True),
    }


def predict(
    predictor: Predictor,
    items: Sequence[EvalItem],
    threshold: float,
    batch_size: int,
    max_new_tokens: int = 128,
    progress: bool = True,
) -> list[Record]:
    """Records of all items in order, on every rank; each rank predicts its own share.

    Args:
        threshold: instances with score > threshold are kept.
        batch_size: instructions that run through the model at once.
    """
    rank, world = _rank_and_world()

    def run(batch: Sequence[EvalItem]) -> list[Record]:
        predictions = predictor.segment(
            [item.sample.image for item in batch],
            [item.turn.instruction for item in batch],
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            batch_size=len(batch),
        )
        return [make_record(item, prediction) for item, prediction in zip(batch, predictions, strict=True)]

    return _share(list(items), batch_size, rank, world, run, "evaluating", progress)


def batches(items: Sequence[Any], batch_size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `batch_size`."""
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _share(
    items: list[EvalItem],
    batch_size: int,
    rank: int,
    world: int,
    run: Callable[[Sequence[EvalItem]], list[Record]],
    label: str,
    progress: bool,
) -> list[Record]:
    """Run this rank's share (every world-th item) and collect all shares in the items' order."""
    mine = items[rank::world]
    records: list[Record] = []
    for batch in tqdm(
        list(batches(mine, batch_size)), desc=label, unit="batch", disable=not progress or rank > 0, leave=False
    ):
        records.extend(run(batch))
    if world == 1:
        return records
    gathered: list[list[Record]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, records)
    result: list[Record | None] = [None] * len(items)
    for other, share in enumerate(gathered):
        result[other::world] = share
    assert all(record is not None for record in result)
    return [record for record in result if record is not None]
