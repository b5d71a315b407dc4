"""Look at a training set: random samples as they would be asked, what it is made of.

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

    from instructsam.inspection.drawing import Asker, draw
    from instructsam.inspection.page import Shown, page
    from instructsam.inspection.pictures import Asked, contact_sheet
    from instructsam.inspection.statistics import statistics
    from instructsam.visualization import save_png

    for key, least in {"num": 1, "seed": 0, "statistics_limit": 1}.items():
        value = settings[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key}={value}: must be a whole number of at least {least}")

    num_queries = settings["num_queries"]
    if num_queries is not None and (not isinstance(num_queries, int) or num_queries < 1):
        raise ValueError(f"num_queries={num_queries}: must be at least 1, or null to allow any number of instances")

    def progress(name: str, samples: Iterable[Any]) -> Iterable[Any]:
        return tqdm(samples, desc=name, unit=" samples", disable=None)

    data, seed, limit = settings["data"], settings["seed"], settings["statistics_limit"]
    asker = Asker.of(data, num_queries)
    drawn = draw(data, settings["num"], limit, seed, asker, progress)
    found: dict[str, Any] = {"seed": seed, "statistics_limit": limit, "num_queries": num_queries, "sources": {}}
    found["all"] = statistics([(one.facts, one.weight) for one in drawn])
    for one in drawn:
        counts = {"samples": one.total, "counted": len(one.facts), "nothing_to_ask": one.silent, "epoch": one.epoch}
        found["sources"][one.source.name] = {
            **counts,
            "left_out": dict(one.left_out),
            "aside": dict(one.aside),
            **statistics([(one.facts, 1.0)]),
        }

    rng = np.random.default_rng(seed)
    shown = [Shown(one.source.name, *asker.ask(sample, rng)) for one in drawn for sample in one.shown]
    shown = [one for one in shown if one.sample.turns]
    if not shown:
        raise ValueError("there is no sample to show")
    # The turns come in random order, so that the first is one at random.
    asked = [Asked(one.source, one.sample, one.sample.turns[0], one.change) for one in shown]
    sheet = contact_sheet(asked, settings["columns"])

    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    save_png(sheet, folder / "contact_sheet.png", max_bytes=4_000_000)
    title = f"Samples of {data.get('name') or ', '.join(found['sources'])}"
    (folder / "index.html").write_bytes(page(title, found, shown, notes(found, data)))
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    (folder / "statistics.json").write_text(text, encoding="utf-8")
    return found


def notes(found: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """What the figures are of."""
    sources, too_many = found["sources"], data.get("too_many_instances") or "raise"
    said = [
        "Samples are measured and shown as one epoch asks them: composed, so many turns at once, flipped and tinted "
        "where data.augmentation says so. Figures of all sources together are those of an epoch: a source counts as "
        "often as an epoch draws it."
    ]
    if (number := found["num_queries"]) is not None:
        done = {"drop": "are left out", "truncate": f"keep {number} of them"}
        done["raise"] = "are left out with their instruction; training stops at them unless data.on_bad=skip"
        said.append(f"Phrases of more than {number} instances (num_queries) {done[too_many]}.")
    said.append(
        "Not applied is the model's max_length, which needs its tokenizer: training leaves out the last instructions "
        "of what does not fit, and counts at its start how many samples that concerns."
    )
    silent = {name: one for name, one in sources.items() if one["nothing_to_ask"]}
    if silent:
        listed = ", ".join(f"{name} ({one['nothing_to_ask']:,} of {one['counted']:,})" for name, one in silent.items())
        said.append(f"Samples of which nothing is asked, in no other figure: {listed}.")
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
        bad += "".join(f", {number:,} {what}" for what, number in one["aside"].items())
        print(f"{name}: {one['samples']:,} samples{bad}")
    folder = Path(settings["output_dir"])
    print(f"written: {folder / 'index.html'}, {folder / 'contact_sheet.png'}, {folder / 'statistics.json'}")


if __name__ == "__main__":
    main()
