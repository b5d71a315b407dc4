"""Check a training set: every record, and every picture as a whole.

    python -m instructsam.validate                             # the tiny world
    python -m instructsam.validate data=stage1                 # as it would be trained on
    python -m instructsam.validate data=stage1 only=[refcoco,lvis_v1_train] workers=32
    python -m instructsam.validate data=coco_instructions data.root=data/mine

The held-out instructions of `data.val` are checked too, as the source "val".

Writes validation.jsonl (every problem: source, kind, file, index, reason) and validation.md (by kind, with the first of
each) to `output_dir`, and prints how many there are of each kind. Source files are read, all of them (of each source
the first `data.limit` samples, if that is set), whether or not tables were prepared from them; of tables that are there
(`data.prepared`), the checksums are compared.

Exit status: 0 nothing found, 1 problems found, 2 it could not run. Settings: `configs/validate.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from instructsam.configs_path import CONFIGS, complete_settings
from instructsam.data.validation_report import ValidationReport

VAL = "val"


def validate(settings: dict[str, Any]) -> ValidationReport:
    """Run one validation as configured, and write its report.

    Raises:
        ValueError: settings that cannot work, source files that are not there (all are named).
        RuntimeError: a process that opens pictures died.
    """
    from instructsam.data.limits import TOO_MANY
    from instructsam.data.picture_checks import PictureChecks, number_of_workers
    from instructsam.data.sources import check_files, choose, held_out_of, limit_of, parse_sources
    from instructsam.data.validation import validate_source, verify_table

    workers = number_of_workers(settings["workers"], least=0)
    num_queries = settings["num_queries"]
    if num_queries is not None and (not isinstance(num_queries, int) or num_queries < 1):
        raise ValueError(f"num_queries={num_queries}: must be at least 1, or null to allow any number of instances")
    data = settings["data"]
    too_many = data.get("too_many_instances") or "raise"
    if too_many not in TOO_MANY:
        raise ValueError(f"data.too_many_instances={too_many!r} is not one of {', '.join(TOO_MANY)}")
    if data.get("val") and data["sources"].get(VAL):
        raise ValueError(f"data.sources.{VAL}: that is what data.val is called here; give the source another name")
    limit = limit_of(data)
    wanted = {**data["sources"], **({VAL: data["val"]} if data.get("val") else {})}
    sources = choose(parse_sources(wanted), settings["only"])
    check_files(sources)
    held_out = held_out_of(sources, data)
    title = f"Validation of {data.get('name') or ', '.join(source.name for source in sources)}"
    with ValidationReport(Path(settings["output_dir"]), title) as report, PictureChecks(workers) as pictures:
        for source in sources:
            with tqdm(desc=source.name, unit=" samples", disable=None) as bar:

                def add(problem: Any, name: str = source.name, bar: Any = bar) -> None:
                    report.add(name, problem)
                    bar.set_postfix(problems=report.total, refresh=False)

                # Evaluation takes all held-out samples, with any number of instances.
                most, first = (None, None) if source.name == VAL and data.get("val") else (num_queries, limit)
                notes = validate_source(source, pictures, add, held_out, most, bar.update, too_many, first)
                if data.get("prepared") and verify_table(Path(data["prepared"]) / source.name, add):
                    notes["prepared table (checksums compared)"] = 1
            report.close_source(source.name, notes)
    return report


class _Finished(SystemExit):
    """Validation ran to its end."""


@hydra.main(config_path=CONFIGS, config_name="validate", version_base="1.3")
def main(config: DictConfig) -> None:
    settings = complete_settings(config)
    try:
        report = validate(settings)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{report.summary()}\n\nwritten: {report.folder / 'validation.md'}, {report.folder / 'validation.jsonl'}")
    raise _Finished(1 if report.total else 0)


def entry_point() -> None:
    """`main`, with exit status 2 for everything that kept it from running, wrong settings included."""
    try:
        main()
    except _Finished:
        raise
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        sys.exit(2 if stop.code else 0)


if __name__ == "__main__":
    entry_point()
