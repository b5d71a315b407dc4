"""Query reliance: how far the figures fall when the projected queries are replaced by ones that cannot know.

A detector may solve its task from the phrase alone; then queries that carry nothing change nothing, whatever the AP.
Three replacements, all with the answer's own phrases:
 - ``slot_mean``: every query by the mean of its slot over the whole set;
 - ``other_image``: the queries of another image under the same instruction;
 - ``other_instruction``: the queries of another instruction about the same image that asks for other pixels.
Instructions for which there is no such partner are left out of a comparison, on both of its sides.

Shape suffixes: P phrases, N queries, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.pipeline import batches
from instructsam.evaluation.runner import EvalItem, Record, make_record
from instructsam.masks import pairwise_iou, union
from instructsam.models.stages import Understanding
from instructsam.predictor import Predictor

REPLACEMENTS = ("slot_mean", "other_image", "other_instruction")


def _understand(predictor: Predictor, items: Sequence[EvalItem], records: Sequence[Record]) -> Understanding:
    return predictor.understand(
        [item.sample.image for item in items],
        [item.turn.instruction for item in items],
        [record["pred_phrases"] for record in records],
    )


def query_reliance(
    predictor: Predictor,
    items: Sequence[EvalItem],
    records: Sequence[Record],
    threshold: float,
    batch_size: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures with replaced queries beside those with the real ones.

    Args:
        records: what `runner.run` gave for `items`; answers without a phrase are left out.

    Returns:
        ``{replacement: {"real": figures, "replaced": figures}}``, both over the same instructions; figures as
        `evaluate_records` gives them.
    """
    kept = [(item, record) for item, record in zip(items, records, strict=True) if record["pred_phrases"]]
    if not kept:
        return {}
    items, records = [item for item, _ in kept], [record for _, record in kept]
    real: list[Tensor] = []
    shares = list(batches(list(range(len(items))), batch_size))
    for share in tqdm(shares, desc="query reliance: reading", unit="batch", disable=not progress, leave=False):
        understanding = _understand(predictor, [items[k] for k in share], [records[k] for k in share])
        real.extend(understanding.bridge.queries_PNC.cpu().split([len(p) for p in understanding.phrases]))
    mean_NC = torch.cat(real).mean(0)
    partners = {"other_image": same_instruction(records), "other_instruction": same_image(records)}

    replaced: dict[str, list[Record]] = {name: [] for name in REPLACEMENTS}
    for share in tqdm(shares, desc="query reliance: replacing", unit="batch", disable=not progress, leave=False):
        understanding = _understand(predictor, [items[k] for k in share], [records[k] for k in share])
        for name in REPLACEMENTS:
            if name == "slot_mean":
                chosen = [mean_NC.expand_as(real[k]) for k in share]
                use = list(share)
            else:
                chosen = [real[partners[name].get(k, k)] for k in share]
                use = [k for k in share if k in partners[name]]
            queries_PNC = torch.cat(chosen).to(understanding.bridge.queries_PNC)
            predictions = predictor.detect(understanding, threshold, queries_PNC)
            by_index = dict(zip(share, predictions, strict=True))
            replaced[name].extend(make_record(items[k], by_index[k]) for k in use)

    by_id = {record["id"]: record for record in records}
    return {
        name: {
            "real": evaluate_records([by_id[record["id"]] for record in found]),
            "replaced": evaluate_records(found),
        }
        for name, found in replaced.items()
        if found
    }


def _group(records: Sequence[Mapping[str, Any]], key: Any) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for k, record in enumerate(records):
        groups[key(record)].append(k)
    return groups


def same_instruction(records: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """For each record the next one (cyclically) with the same instruction, the same phrases and another image."""
    partners = {}
    for group in _group(records, lambda r: (r["instruction"].lower(), tuple(r["pred_phrases"]))).values():
        for place, k in enumerate(group):
            for other in group[place + 1 :] + group[:place]:
                if records[other]["image"] != records[k]["image"]:
                    partners[k] = other
                    break
    return partners


def same_image(records: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """For each record with a target the next one (cyclically) about the same image that asks for other pixels."""
    partners = {}
    for group in _group(records, lambda r: (r["image"], len(r["pred_phrases"]))).values():
        wanted = {k: union(records[k]["gt_rles"], records[k]["height"], records[k]["width"]) for k in group}
        for place, k in enumerate(group):
            for other in group[place + 1 :] + group[:place]:
                targets = records[k]["gt_rles"] and records[other]["gt_rles"]
                if targets and pairwise_iou([wanted[k]], [wanted[other]])[0, 0] == 0:
                    partners[k] = other
                    break
    return partners
