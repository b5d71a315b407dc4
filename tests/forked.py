"""Commands in real processes of their own, without 9 seconds of imports each.

A process started with ``python -m instructsam.train`` spends 9 s of CPU on importing torch and transformers. Here it is
forked from a process that has imported them (`preloaded`) and knows nothing else: it runs the module or script as
``python`` would, with its own arguments, environment, folder and output, and ends with its own exit code. With several
processes, each is told its rank as torchrun tells it. How a user's shell and torchrun start our commands is tested in
test_launch.py, test_install.py and test_own_data_guide.py.
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

REPOSITORY = Path(__file__).parents[1]
GRACE = 15
"""Seconds that the other ranks have to end by themselves when one has failed."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


def _make_ready() -> None:
    """Start the process to fork from, if it does not run yet. Python 3.11's finds `preloaded` by PYTHONPATH only."""
    before = os.environ.get("PYTHONPATH")
    folders = [str(REPOSITORY), str(Path(__file__).parent), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(program: Sequence[str], folder: str, variables: dict[str, str], stdout: str, stderr: str) -> None:
    """In the new process: become the program."""
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal, wherever the tests run
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", 1)))
    try:
        if program[0] == "-m":
            sys.argv = list(program[1:])
            sys.path.insert(0, folder)
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(program)
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Running:
    """Processes of one command, one a rank.

    Attributes:
        ranks: `multiprocessing.Process`es; `pid`, `exitcode` and `kill` are what they are there.
    """

    def __init__(self, program: Sequence[object], processes: int, folder: Path, variables: dict[str, str]):
        self._output = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._output.name, name)) for name in ("stdout", "stderr")]
        for path in self._files:
            Path(path).touch()
        self.ranks = []
        sys.audit("forked.start", program)
        _make_ready()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            own = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
            if processes > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = ([str(part) for part in program], str(folder), own, *self._files)
            self.ranks.append(_CONTEXT.Process(target=_run, args=arguments))
            self.ranks[-1].start()

    def poll(self) -> int | None:
        """The exit code when all have ended (that of the first to fail, or 0), else None."""
        codes = [process.exitcode for process in self.ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def finish(self, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the end. Raises TimeoutError, with what was printed, when it does not come."""
        deadline = time.monotonic() + seconds
        failed_at = None
        while (code := self.poll()) is None:
            now = time.monotonic()
            if failed_at is None and any(process.exitcode for process in self.ranks):
                failed_at = now
            if failed_at is not None and now > failed_at + GRACE:
                self.kill()
            elif now > deadline:
                self.kill()
                raise TimeoutError(f"not finished after {seconds:g} s: {self.printed()}")
            wait([process.sentinel for process in self.ranks if process.exitcode is None], timeout=1)
        stdout, stderr = self.printed()
        self._output.cleanup()
        return subprocess.CompletedProcess([], code, stdout, stderr)

    def printed(self) -> tuple[str, str]:
        """Standard output and standard error so far, of all ranks."""
        stdout, stderr = (Path(path).read_text(encoding="utf-8", errors="replace") for path in self._files)
        return stdout, stderr


def start(program: Sequence[object], processes: int = 1, folder: Path = REPOSITORY, **variables: str) -> Running:
    """Start ``python PROGRAM...`` (``-m MODULE ARGUMENT...`` or ``SCRIPT ARGUMENT...``) in so many processes.

    Args:
        variables: of the environment, beside this process's own and one thread for OpenMP.
    """
    return Running(program, processes, folder, variables)


def run(
    program: Sequence[object],
    processes: int = 1,
    folder: Path = REPOSITORY,
    seconds: float = 600,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """`start`, wait for the end, and return what was printed and the exit code."""
    return start(program, processes, folder, **variables).finish(seconds)
