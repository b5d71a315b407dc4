"""Ablations: train and evaluate variants with several seeds, and report what differs.

    python -m instructsam.ablate experiment=ablation/queries
    python -m instructsam.ablate experiment=ablation/attention jobs=4 devices=[0,1,2,3]
    python -m instructsam.ablate experiment=ablation/attention "ablation.train=['trainer.max_steps=100']"
    python -m instructsam.ablate experiment=ablation/attention report_only=true
    python -m instructsam.ablate -m experiment=ablation/attention only=hybrid/0,causal/0 hydra/launcher=joblib

The same command again goes on where a killed sweep stopped; every cell runs once with every seed. A cell that fails is
noted with its reason and stops no other (`retry=true` runs it again). With `only=CELL/SEED` the cells can be spread by
Hydra's launchers (joblib, submitit; the output folder is shared); a last start with report_only=true writes the report.
Settings: `configs/ablate.yaml`, ablations: `configs/experiment/ablation/`. They build on the parts in
`checkpoints/`, as their files say.
"""

from __future__ import annotations

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from instructsam.ablation.cells import Ablation, parse
from instructsam.configs_path import CONFIGS, complete_settings


def ablate(settings: dict[str, Any]) -> int:
    """Run an ablation as configured.

    Returns:
        The exit status: 0, 1 if a cell failed (not with report_only), 130 if it was stopped by a signal.

    Raises:
        ValueError: settings that cannot work, cells whose settings have changed since they ran.
    """
    from instructsam.ablation.report import write_report
    from instructsam.ablation.runner import Sweep
    from instructsam.ablation.state import FAILED, status_of

    ablation, output = parse(settings["ablation"]), settings["output_dir"]
    for key in ("report_only", "retry"):
        if not isinstance(settings[key], bool):
            raise ValueError(f"{key}={settings[key]}: must be true or false")
    if not isinstance(settings["bootstrap"], int) or settings["bootstrap"] < 1:
        raise ValueError(f"bootstrap={settings['bootstrap']}: must be a whole number of at least 1")
    pairs = ablation.order() if settings["only"] is None else [ablation.find(settings["only"])]
    if settings["report_only"] and settings["only"] is not None:
        raise ValueError("only=... runs one cell, report_only=true runs none: give one of them")
    failed = False
    if not settings["report_only"]:
        keys = ("train_command", "evaluate_command", "jobs", "devices", "retry")
        if not Sweep(ablation, output, **{key: settings[key] for key in keys}).run(pairs):
            return 130
        failed = any(status_of(ablation, output, *pair)[0] == FAILED for pair in pairs)
    if settings["only"] is None:
        write_report(ablation, output, settings["bootstrap"])
        _print(ablation, output)
    return int(failed)


def _print(ablation: Ablation, output: str) -> None:
    from instructsam.ablation.state import COMPLETE, status_of

    for cell, seed in ablation.order():
        status, reason = status_of(ablation, output, cell, seed)
        if status != COMPLETE:
            print(f"{cell.name}/{seed}: {status}: {reason}")
    print(f"written to {output}: report.md, tables.tex, summary.csv, cells.csv, figures.json, records.parquet, plots/")


@hydra.main(config_path=CONFIGS, config_name="ablate", version_base="1.3")
def main(config: DictConfig) -> None:
    try:
        code = ablate(complete_settings(config))
    except ValueError as error:
        sys.exit(f"error: {error}")
    # One of several of a multirun: a failed cell is on record, and the others are to run.
    if code == 130 or (code and HydraConfig.get().mode != RunMode.MULTIRUN):
        sys.exit(code)


if __name__ == "__main__":
    main()
