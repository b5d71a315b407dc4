"""Stands in for train and evaluate: `stub_command.py (train|evaluate) CONTROL KEY=VALUE ...`.

Counts three steps in OUTPUT/steps.txt, from where it was; a file in CONTROL called block_WHAT_CELL_SEED, kill_...,
fail_... or nothing_... makes it wait after the first step, die, fail with a message, or end without a result.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    what, control = sys.argv[1], Path(sys.argv[2])
    values = dict(argument.split("=", 1) for argument in sys.argv[3:])
    output = Path(values["output_dir"].strip("'"))
    place = output.parents[1] if what == "train" else output.parent  # .../cells/NAME/seed_0
    name = f"{what}_{place.parent.name}_{place.name}"
    with (control / "calls.txt").open("a") as file:
        file.write(f"{name} {values.get('seed', '-')} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    if what == "evaluate":
        assert (Path(values["checkpoint"].strip("'"))).is_dir()
    output.mkdir(parents=True, exist_ok=True)
    steps = output / "steps.txt"
    done = len(steps.read_text().split()) if steps.exists() else 0
    for step in range(done, 3):
        with steps.open("a") as file:
            file.write(f"{step}\n")
        if (control / f"fail_{name}").exists():
            print("reading data")
            sys.exit("error: no such folder: data/none")
        if (control / f"kill_{name}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        while (control / f"block_{name}").exists():
            (control / f"blocked_{name}").write_text(str(os.getpid()))
            time.sleep(0.02)
    if (control / f"nothing_{name}").exists():
        return
    if what == "train":
        (output / "checkpoint").mkdir(exist_ok=True)
    else:
        (output / "metrics.json").write_text("{}")


if __name__ == "__main__":
    main()
