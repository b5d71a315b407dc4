"""Commands in real processes of their own, without 9 seconds of imports each.

A process started with ``python -m instructsam.train`` spends 6 to 9 s of CPU on importing torch and transformers. Here
it is forked from a process that has imported them (`preloaded`) and knows nothing else: in the repository's root it
runs the module or script as ``python`` would, with its own arguments, environment and output, and ends with its own
exit code. With several processes, each is told its rank as torchrun tells it. How a user's shell and torchrun start
our commands is tested in test_launch.py, test_install.py and test_own_data_guide.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parents[1]
GRACE = 15
"""Seconds that the other ranks have to end by themselves when one has failed."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


def _run(program: Sequence[str], variables: dict[str, str], stdout: str, stderr: str) -> None:
    """In the new process: become the program."""
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal, wherever the tests run
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as a program starts; not how this one started
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", 1)))
    try:
        if program[0] == "-m":
            sys.argv = list(program[1:])
            sys.path.insert(0, str(REPOSITORY))
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(program)
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Running:
    """``python PROGRAM...`` (``-m MODULE ARGUMENT...`` or ``SCRIPT ARGUMENT...``) in so many processes.

    Args:
        variables: of the environment, beside this process's own and one thread for OpenMP.

    Attributes:
        ranks: a `multiprocessing.Process` each.
    """

    def __init__(self, program: Sequence[object], processes: int = 1, **variables: str):
        self._output = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._output.name, name)) for name in ("stdout", "stderr")]
        for path in self._files:
            Path(path).touch()
        self.ranks = []
        sys.audit("forked.start", program)
        # Python 3.11's forkserver finds `preloaded` by PYTHONPATH only.
        folders = [str(REPOSITORY), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, folders))):
            forkserver.ensure_running()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            own = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
            if processes > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = ([str(part) for part in program], own, *self._files)
            self.ranks.append(_CONTEXT.Process(target=_run, args=arguments))
            self.ranks[-1].start()

    def finish(self, seconds: float = 1800) -> subprocess.CompletedProcess[str]:
        """Wait for the end; the exit code is that of the first rank that failed, or 0.

        Raises:
            TimeoutError: it does not come; says what was printed.
        """
        deadline = time.monotonic() + seconds
        while running := [process for process in self.ranks if process.exitcode is None]:
            if time.monotonic() > deadline:
                for process in running:
                    process.kill()
                    process.join()
                break
            wait([process.sentinel for process in running], timeout=1)
            if any(process.exitcode for process in self.ranks):
                deadline = min(deadline, time.monotonic() + GRACE)
        stdout, stderr = (Path(path).read_text(encoding="utf-8", errors="replace") for path in self._files)
        self._output.cleanup()
        code = next((process.exitcode for process in self.ranks if process not in running and process.exitcode), 0)
        if running and not code:
            raise TimeoutError(f"not finished after {seconds:g} s: {stdout}{stderr}")
        return subprocess.CompletedProcess([], code, stdout, stderr)


def run(program: Sequence[object], processes: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start it, wait for the end, and return what was printed and the exit code. See `Running`."""
    return Running(program, processes, **variables).finish()
