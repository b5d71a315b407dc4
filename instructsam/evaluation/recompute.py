"""Figures and reports of predictions that are on disk: no model, no data set, and without pictures no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructsam.evaluation.output import Metrics, Wanted, figures_of, write_all
from instructsam.evaluation.streaming import read_records

HEADLINE = ("mAP", "AP50", "giou", "ciou", "n_acc")  # where no metrics.json says which


def recompute(settings: Mapping[str, Any]) -> dict[str, Metrics]:
    """Evaluate ``settings["predictions"]``; what was run is taken from the metrics.json beside it, where there is one.

    Writes to ``settings["output_dir"]``, by default the folder ``recomputed`` beside the predictions. With a threshold
    the predictions below it are left out, as the model would have done with it, and what is kept is written there too.

    Returns:
        {name of the benchmark and split: its figures}

    Raises:
        ValueError: no records there, a malformed one, fewer than were evaluated, a threshold below the one that the
            predictions were kept with, the run's own folder as output.
    """
    path = Path(settings["predictions"])
    folder = Path(settings["output_dir"] or path.parent / "recomputed")
    if folder.resolve() == path.parent.resolve():
        raise ValueError(f"output_dir={folder}: holds the run itself, whose rules must stay beside its predictions")
    records = read_records(path)
    stored = _stored(path.with_name("metrics.json"))
    evaluated = (stored.get("overall") or {}).get("num_samples")
    if evaluated is not None and evaluated != len(records):
        raise ValueError(f"{path}: holds {len(records)} records, but {evaluated} instructions were evaluated")
    benchmark: dict[str, Any] = dict(stored.get("benchmark") or {})
    if not benchmark:
        first = records[0]
        benchmark = {"name": first.get("benchmark", path.stem), "split": first.get("split", ""), "threshold": None}
        benchmark |= {"min_area": 0, "headline": list(HEADLINE), "published": [], "conventions": {}}
    conventions = dict(benchmark["conventions"])
    threshold, kept = settings["threshold"], benchmark["threshold"]
    if threshold is not None:
        if kept is not None and threshold < kept:
            raise ValueError(
                f"threshold={threshold}: {path} holds predictions of score {kept} and above only; lower thresholds "
                "need the model"
            )
        benchmark |= {"threshold": threshold, "inclusive": False}
        conventions["kept"] = f"score > {threshold}"
        records = [_kept(record, threshold) for record in records]
    if settings["min_area"] is not None:
        benchmark["min_area"] = settings["min_area"]
        conventions["minimum area"] = f"a union of fewer than {settings['min_area']} pixels counts as empty"
    benchmark["conventions"] = conventions
    wanted = Wanted.of(settings)
    metrics, measured = figures_of(records, benchmark, wanted)
    metrics |= {"benchmark": benchmark, "checkpoint": stored.get("checkpoint")}
    described = {**stored.get("settings", {}), "predictions": str(path)}
    names = write_all(folder, metrics, records, measured, wanted, described)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    print(f"written to {folder}: {', '.join([*names, 'predictions.jsonl'])}")
    return {"_".join(part for part in (benchmark["name"], benchmark["split"]) if part): metrics}


def _kept(record: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The record with the predictions of score > threshold only."""
    chosen = [index for index, score in enumerate(record["pred_scores"]) if score > threshold]
    lists = ("pred_rles", "pred_scores", "pred_boxes", "pred_phrase_ids")
    cut = {key: [record[key][index] for index in chosen] for key in lists if record.get(key) is not None}
    return {**record, **cut}


def _stored(path: Path) -> dict[str, Any]:
    """What metrics.json says, {} where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {type(found).__name__}")
    return found
