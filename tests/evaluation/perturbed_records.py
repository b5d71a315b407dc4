"""Records as a middling model would leave them: the tiny world's truth, with masks moved, shrunk, lost and doubled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from instructsam import masks
from instructsam.data.coco_instructions import read_coco_instructions


def perturbed_records(root: Path, seed: int = 0) -> list[dict[str, Any]]:
    """One record for every held-out instruction of a tiny world in ``root``."""
    rng = random.Random(seed)
    records = []
    for sample in read_coco_instructions(root, "val"):
        for turn in sample.turns:
            found: list[tuple[masks.RLE, float, int]] = []
            for index, phrase in enumerate(turn.phrases):
                found += _found(rng, phrase.rles, index)
                if not phrase.rles and rng.random() < 0.6:
                    found.append((masks.box_to_rle([20, 20, 70, 90], sample.height, sample.width), 0.4, index))
            records.append(
                {
                    "id": f"{sample.id}/{turn.id or turn.instruction}",
                    "image": str(sample.image),
                    "instruction": turn.instruction,
                    "kind": turn.kind,
                    "height": sample.height,
                    "width": sample.width,
                    "gt_rles": [rle for phrase in turn.phrases for rle in phrase.rles],
                    "gt_phrases": [phrase.text for phrase in turn.phrases],
                    "pred_rles": [rle for rle, _, _ in found],
                    "pred_scores": [score for _, score, _ in found],
                    "pred_phrase_ids": [index for _, _, index in found],
                    "pred_phrases": [phrase.text for phrase in turn.phrases],
                    "answer": " and ".join(phrase.text for phrase in turn.phrases),
                }
            )
    return records


def _found(rng: random.Random, rles: tuple[masks.RLE, ...], index: int) -> list[tuple[masks.RLE, float, int]]:
    found = []
    for rle in rles:
        fate = rng.random()
        if fate < 0.15:  # lost
            continue
        moved = _changed(masks.decode(rle), rng.choice((0, 1, 2, 6, 25)), rng.choice((1, 1, 3, 5)))
        if not moved.any():
            continue
        score = round(rng.uniform(0.35, 0.99), 3)
        found.append((masks.encode(moved), score, index))
        if fate > 0.85:  # doubled
            found.append((masks.encode(_changed(moved, 1, 1)), round(0.8 * score, 3), index))
    return found


def _changed(mask: np.ndarray, shift: int, erosion: int) -> np.ndarray:
    """The mask, moved to the right and eroded by an odd number of pixels across (1 = not at all)."""
    moved = np.zeros_like(mask)
    moved[:, shift:] = mask[:, : mask.shape[1] - shift]
    if erosion > 1:
        moved = np.asarray(Image.fromarray(moved).convert("L").filter(ImageFilter.MinFilter(erosion))) > 127
    return moved
