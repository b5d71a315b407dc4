"""`accelerate launch` that outlives the signals which ask for a checkpoint: they are for the training processes.

SIGTERM, SIGINT and SIGUSR1 often reach all processes of a job. Plain `accelerate launch` dies of SIGUSR1, and on
SIGTERM or SIGINT leaves its processes 30 seconds, which may be too short for a checkpoint. This one does nothing when
it gets them; forward.sh hands them on. Handlers, unlike ignored signals, do not pass to the processes started here.
"""

from __future__ import annotations

import os
import runpy
import signal

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
# torchrun would put handlers of its own in their place. Where PyTorch is too old for this setting the 30 seconds hold,
# but only if the launcher itself is signalled (Slurm's preemption), not for what forward.sh hands on.
os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGQUIT")
runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
