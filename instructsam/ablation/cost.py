"""What a cell costs: time and tokens of its last stage of training, and parameters of its model."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open

from instructsam.ablation.cells import Ablation, Cell
from instructsam.ablation.state import Place
from instructsam.evaluation.fingerprint import weight_files

# Name in a report -> key.
COSTS = {"seconds a step": "seconds_per_step", "tokens a sample": "tokens_per_sample", "parameters": "parameters"}


def cost_of(ablation: Ablation, output: str | Path, cell: Cell, seed: int) -> dict[str, float | int | None]:
    """Seconds a step (median) and tokens a sample (mean) of the last stage, and the model's parameters."""
    source = ablation.source(cell)
    folder = Place.of(output, source, seed).train / list(source.stages)[-1]
    rows = []
    if (folder / "progress.jsonl").exists():
        for line in (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # what a kill leaves of a line
                continue
            if row.get("seconds_per_step"):
                rows.append(row)
    seconds = sorted(row["seconds_per_step"] for row in rows)
    pairs = [(row["tokens_per_second"], row["samples_per_second"]) for row in rows if row.get("tokens_per_second")]
    return {
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
        "tokens_per_sample": sum(tokens / samples for tokens, samples in pairs) / len(pairs) if pairs else None,
        "parameters": _parameters(folder / "checkpoint"),
    }


def _parameters(checkpoint: Path) -> int | None:
    """Numbers in the weight files, read from their headers; None where the weights are gone."""
    try:
        files = weight_files(checkpoint)
    except ValueError:
        return None
    total = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return total
