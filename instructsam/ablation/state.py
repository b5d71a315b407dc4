"""Where a cell's outputs lie, and how far it is.

OUTPUT/cells/NAME/seed_0/
    train/STAGE/        the output of `instructsam.train`
    eval/               the output of `instructsam.evaluate`: metrics.json, predictions.jsonl
    logs/STEP.log       what the commands printed, all starts one after the other
    cell.json           of every step: status, settings, seconds, and of a failed one exit code and reason
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructsam.ablation.cells import EVALUATION, Ablation, Cell
from instructsam.files import replace_text

COMPLETE, FAILED, INTERRUPTED, RUNNING, MISSING = "complete", "failed", "interrupted", "running", "missing"


@dataclass(frozen=True)
class Place:
    """The folder of a cell with one seed."""

    folder: Path

    @classmethod
    def of(cls, output: str | Path, cell: Cell, seed: int) -> Place:
        return cls(Path(output) / "cells" / cell.name / f"seed_{seed}")

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def eval(self) -> Path:
        return self.folder / "eval"

    def log(self, step: str) -> Path:
        return self.folder / "logs" / f"{step}.log"

    def steps(self) -> dict[str, dict[str, Any]]:
        """Step -> its record; empty before the first start. Raises ValueError for a file that is none of ours."""
        path = self.folder / "cell.json"
        try:
            return dict(json.loads(path.read_bytes())["steps"])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); remove {self.folder} to run the cell anew") from error

    def write(self, step: str, record: dict[str, Any]) -> None:
        """Replace one step's record. For the holder of the folder's lock."""
        steps = {**self.steps(), step: record}
        replace_text(self.folder / "cell.json", json.dumps({"steps": steps}, indent=2, ensure_ascii=False) + "\n")


def status_of(ablation: Ablation, output: str | Path, cell: Cell, seed: int) -> tuple[str, str]:
    """(status, reason) of a cell: complete, failed, interrupted (goes on at the next start), running or missing.

    A cell whose record says "running" may have been killed; only the folder's lock tells, see `runner`.
    """
    source = ablation.source(cell)
    training, own = Place.of(output, source, seed).steps(), Place.of(output, cell, seed).steps()
    steps = {stage: training.get(stage) for stage in source.stages} | {EVALUATION: own.get(EVALUATION)}
    for step, record in steps.items():
        if record is not None and record["status"] == COMPLETE:
            continue
        where = step if step == EVALUATION or source is cell else f"{step} of {source.name}"
        if record is None:
            started = any(one is not None for one in steps.values())
            return (INTERRUPTED, f"{where} not begun") if started else (MISSING, "not run yet")
        return record["status"], f"{where}: {record['reason']}" if record.get("reason") else where
    return COMPLETE, ""
