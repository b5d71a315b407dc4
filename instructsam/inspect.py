"""Look at a training set before it is trained on: random samples as they would be asked, and what it is made of.

    python -m instructsam.inspect                              # the tiny world
    python -m instructsam.inspect data=stage1 num=60 seed=1
    python -m instructsam.inspect data=coco_instructions data.root=data/mine

Writes to `output_dir`: contact_sheet.png (an instruction of each sample over its picture), index.html (the samples with
their instructions and answers, and charts) and statistics.json. Settings: `configs/inspect.yaml`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from instructsam.configs_path import CONFIGS, complete_settings


def inspect(settings: dict[str, Any]) -> dict[str, Any]:
    """Draw, measure and write as configured; returns what statistics.json holds.

    Raises:
        ValueError: settings that cannot work, files or tables that are missing, a source that cannot be read.
    """
    import numpy as np
    from tqdm import tqdm

    from instructsam.data.composition import Composition
    from instructsam.inspection.drawing import as_asked, draw
    from instructsam.inspection.page import page
    from instructsam.inspection.pictures import Asked, contact_sheet
    from instructsam.inspection.statistics import statistics
    from instructsam.visualization import save_png

    for key, least in {"num": 1, "seed": 0, "statistics_limit": 1}.items():
        value = settings[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key}={value}: must be a whole number of at least {least}")

    def progress(name: str, samples: Iterable[Any]) -> Iterable[Any]:
        return tqdm(samples, desc=name, unit=" samples", disable=None)

    data, seed, limit = settings["data"], settings["seed"], settings["statistics_limit"]
    composition = Composition.from_mapping(data.get("composition") or {})
    drawn = draw(data, settings["num"], limit, seed, progress)
    found: dict[str, Any] = {"seed": seed, "statistics_limit": limit, "sources": {}}
    found["all"] = statistics([(one.facts, one.weight) for one in drawn])
    for one in drawn:
        counts = {"samples": one.total, "counted": len(one.facts), "repeats": one.source.repeats}
        found["sources"][one.source.name] = {
            **counts,
            "left_out": dict(one.left_out),
            **statistics([(one.facts, 1.0)]),
        }

    rng = np.random.default_rng(seed)
    asked = [(one.source.name, as_asked(sample, composition, rng)) for one in drawn for sample in one.shown]
    asked = [(name, sample) for name, sample in asked if sample.turns]
    if not asked:
        raise ValueError("there is no sample to show")
    # The turns come in random order, so that the first is one at random.
    sheet = contact_sheet([Asked(name, sample, sample.turns[0]) for name, sample in asked], settings["columns"])

    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    save_png(sheet, folder / "contact_sheet.png", max_bytes=4_000_000)
    title = f"Samples of {data.get('name') or ', '.join(found['sources'])}"
    (folder / "index.html").write_bytes(page(title, found, asked, notes(found)))
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    (folder / "statistics.json").write_text(text, encoding="utf-8")
    return found


def notes(found: dict[str, Any]) -> list[str]:
    """What the figures are of."""
    sources = found["sources"]
    said = ["Figures of all sources together are those of an epoch: a source counts as often as it is repeated."]
    part = {name: one for name, one in sources.items() if one["counted"] < one["samples"]}
    if part:
        listed = ", ".join(f"{name} ({one['counted']:,} of {one['samples']:,})" for name, one in part.items())
        said.append(f"Measured on a random part of the samples: {listed}.")
    said.append(
        "Instructions are shown in the words that one epoch would choose; another epoch chooses others. An answer's "
        "phrases stand in brackets, with the number of their instances."
    )
    return said


@hydra.main(config_path=CONFIGS, config_name="inspect", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = complete_settings(config)
    try:
        found = inspect(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, one in found["sources"].items():
        bad = "".join(f", {number:,} {what} left out" for what, number in one["left_out"].items())
        print(f"{name}: {one['samples']:,} samples{bad}")
    folder = Path(settings["output_dir"])
    print(f"written: {folder / 'index.html'}, {folder / 'contact_sheet.png'}, {folder / 'statistics.json'}")


if __name__ == "__main__":
    main()
