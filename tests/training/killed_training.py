"""Runs `instructsam.train` and kills itself at one moment of one step (started by a test).

    killed_training.py MOMENT STEP OVERRIDE...

MOMENT: "step" (between forward and backward), or while the step's checkpoint is written: "folder" (nothing is in it
yet), the name of a file (half of it is written), "publish" (all is written, nothing renamed) or "prune" (renamed, older
ones not removed yet).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import instructsam.train
from instructsam.training import checkpointing
from instructsam.training.checkpoint_files import STATE_FILE, path_of
from instructsam.training.engines import Engine

MOMENT, STEP = sys.argv[1], int(sys.argv[2])
OUTPUT = Path(next(part for part in sys.argv if part.startswith("output_dir=")).removeprefix("output_dir="))
CHECKPOINT = path_of(OUTPUT, STEP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_half_way(write, path_of):
    """`write`, but of the file that is named only half arrives."""

    def written(*arguments):
        path = path_of(*arguments)
        here = path.parent.name == f"{CHECKPOINT.name}.tmp"
        if here and MOMENT == "folder":
            kill()
        write(*arguments)
        if here and path.name == MOMENT:
            os.truncate(path, path.stat().st_size // 2)
            kill()

    return written


def kill_around(publish):
    def published(temporary, final):
        if MOMENT == "publish" and final == CHECKPOINT:
            kill()
        publish(temporary, final)
        if MOMENT == "prune" and final == CHECKPOINT:
            kill()

    return published


def kill_in_step(backward):
    def in_step(self, loss):
        if MOMENT == "step" and path_of(OUTPUT, STEP - 1).exists():  # the step before is done
            kill()
        backward(self, loss)

    return in_step


checkpointing.save_file = kill_half_way(checkpointing.save_file, lambda _, path: Path(path))
torch.save = kill_half_way(torch.save, lambda _, path: Path(path))
checkpointing.write_state = kill_half_way(checkpointing.write_state, lambda folder, _: folder / STATE_FILE)
checkpointing.publish = kill_around(checkpointing.publish)
Engine.backward = kill_in_step(Engine.backward)

if __name__ == "__main__":
    sys.argv = ["instructsam.train", *sys.argv[3:]]
    instructsam.train.main()
