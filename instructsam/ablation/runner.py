"""Run cells: the stages of a training, then the evaluation, each as a command of its own with its output in a file.

What is complete is not run again; what was interrupted goes on, since both commands go on where they were killed; what
failed is noted with its reason and stops no other cell. A cell's folder is locked while something runs in it, also
by the commands themselves: if the sweep alone is killed, the next one waits for the orphan and takes over its result.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from instructsam.ablation.cells import EVALUATION, Ablation, Cell
from instructsam.ablation.plan import filled, planned, quoted
from instructsam.ablation.state import COMPLETE, FAILED, INTERRUPTED, RUNNING, Place, status_of
from instructsam.evaluation.fingerprint import differences
from instructsam.lock import exclusive

TRAIN = (sys.executable, "-m", "instructsam.train")
EVALUATE = (sys.executable, "-m", "instructsam.evaluate")
_STOPPED = (130, 143, -signal.SIGTERM, -signal.SIGINT)
_TAIL_LINES, _TAIL_BYTES = 15, 20_000
_POLL_S = 0.5


class Sweep:
    """An ablation in an output folder.

    Args:
        train_command, evaluate_command: what overrides are appended to; None: this Python with the command's module.
        jobs: cells that run at once.
        devices: numbers for CUDA_VISIBLE_DEVICES, one a job; None: every job sees all.
        retry: run cells again that failed.

    Raises:
        ValueError: numbers out of range, settings that do not compose, or that are others than those a finished step
            was run with (names cell, seed and settings).
    """

    def __init__(
        self,
        ablation: Ablation,
        output: str | Path,
        train_command: Sequence[str] | None = None,
        evaluate_command: Sequence[str] | None = None,
        jobs: int = 1,
        devices: Sequence[int] | None = None,
        retry: bool = False,
    ) -> None:
        if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
            raise ValueError(f"jobs={jobs}: must be a whole number of at least 1")
        if devices is not None and len(devices) < jobs:
            raise ValueError(f"devices={list(devices)}: too few for jobs={jobs}, every job has one of its own")
        self.ablation = ablation
        self.output = Path(output).resolve()
        self.commands = {"train": list(train_command or TRAIN), EVALUATION: list(evaluate_command or EVALUATE)}
        self.jobs = jobs
        self.retry = retry
        self.stopping = False
        self._children: set[subprocess.Popen[bytes]] = set()
        self.devices = devices
        self._devices: queue.Queue[int] = queue.Queue()
        for device in devices or ():
            self._devices.put(device)
        self.plans = {name: planned(ablation, cell) for name, cell in ablation.cells.items()}
        self._check_unchanged()

    def run(self, pairs: Sequence[tuple[Cell, int]]) -> bool:
        """Run these cells; cells that another sweep is at are looked at again in the end. False: it was stopped."""
        with self._signals(), ThreadPoolExecutor(self.jobs) as pool:
            busy = [pair for pair, done in zip(pairs, pool.map(self._unless_busy, pairs), strict=True) if not done]
            list(pool.map(lambda pair: self._cell(pair[0], pair[1], wait=True), busy))
        return not self.stopping

    # ---- one cell -----------------------------------------------------------------------------------------------

    def _unless_busy(self, pair: tuple[Cell, int]) -> bool:
        return self._cell(pair[0], pair[1], wait=False)

    def _cell(self, cell: Cell, seed: int, wait: bool) -> bool:
        """False: another process is at work on it."""
        before, source = status_of(self.ablation, self.output, cell, seed)[0], self.ablation.source(cell)
        if self.stopping or before == COMPLETE:
            return True
        if before == FAILED and not self.retry:
            return True
        if source is not cell:  # its training may be under way: without it there is nothing to do here
            with self._locked(source, seed, wait=True) as lock:
                trained = lock is not None and self._stages(source, seed, lock)
            if not trained:
                return True
        with self._locked(cell, seed, wait) as lock:
            if lock is None:
                return self.stopping
            if source is not cell or self._stages(cell, seed, lock):
                self._evaluate(cell, seed, lock)
        status, reason = status_of(self.ablation, self.output, cell, seed)
        print(f"{cell.name}/{seed}: {status}{f' ({reason})' if reason else ''}", flush=True)
        return True

    def _stages(self, cell: Cell, seed: int, lock: int) -> bool:
        """Train what is not trained yet; True if all is."""
        place = Place.of(self.output, cell, seed)
        for stage, overrides in cell.stages.items():
            output = place.train / stage
            own = [filled(override, place.train) for override in overrides]
            own += [f"seed={seed}", f"output_dir={quoted(output)}", "trainer.progress_bar=false"]
            settings = self.plans[cell.name][stage]
            if not self._step(place, stage, [*self.commands["train"], *own], settings, output / "checkpoint", lock):
                return False
        return True

    def _evaluate(self, cell: Cell, seed: int, lock: int) -> bool:
        place, source = Place.of(self.output, cell, seed), self.ablation.source(cell)
        model = Place.of(self.output, source, seed).train / list(source.stages)[-1] / "checkpoint"
        own = [*cell.evaluate, f"checkpoint={quoted(model)}", f"output_dir={quoted(place.eval)}"]
        settings = self.plans[cell.name][EVALUATION]
        command = [*self.commands[EVALUATION], *own]
        return self._step(place, EVALUATION, command, settings, place.eval / "metrics.json", lock)

    def _step(
        self, place: Place, step: str, command: list[str], settings: dict[str, Any], result: Path, lock: int
    ) -> bool:
        """Run one command unless its result is there; True if it is in the end."""
        record = place.steps().get(step, {})
        if record.get("status") == COMPLETE:
            return True
        if self.stopping or (record.get("status") == FAILED and not self.retry):
            return False
        spent, began = record.get("seconds", 0.0), time.monotonic()
        record = {"status": RUNNING, "command": command, "settings": settings, "seconds": spent}
        place.write(step, record)
        log = place.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{place.folder.parent.name}/{place.folder.name.removeprefix('seed_')}: {step} ...", flush=True)
        try:
            code = self._call(command, log, lock)
            tail = _tail(log)
        except OSError as error:
            code, tail = 127, [f"{command[0]}: {error.strerror}"]
        record["seconds"] = spent + time.monotonic() - began
        if code == 0 and result.exists():
            place.write(step, {**record, "status": COMPLETE})
            return True
        status, reason = FAILED, _reason(code, tail, result)
        if self.stopping or code in _STOPPED:
            status, reason = INTERRUPTED, "stopped; the next start goes on"
        place.write(step, {**record, "status": status, "exit_code": code, "reason": reason, "last_lines": tail})
        return False

    def _call(self, command: list[str], log: Path, lock: int) -> int:
        """Exit status of a command; it leads a process group of its own, so that a signal reaches it once."""
        device = None if self.devices is None else self._devices.get()
        environment = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
        child = None
        try:
            with log.open("ab") as file:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            self._children.add(child)
            if self.stopping:  # the signal came while it started
                _terminate(child)
            return child.wait()
        finally:
            if child is not None:
                self._children.discard(child)
            if device is not None:
                self._devices.put(device)

    # ---- locks, signals, checks ---------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, cell: Cell, seed: int, wait: bool) -> Iterator[int | None]:
        """Hold a cell's folder; gives None if another process does, or while waiting for it the sweep is stopped."""
        folder, lock, told = Place.of(self.output, cell, seed).folder, None, False
        with ExitStack() as stack:
            while lock is None and not self.stopping:
                try:
                    lock = stack.enter_context(exclusive(folder))
                except ValueError:
                    if not wait:
                        break
                    if not told:
                        print(f"{cell.name}/{seed}: another process is at work there, waiting", flush=True)
                    told = True
                    time.sleep(_POLL_S)
            yield lock

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the commands in order (a training saves a checkpoint), and then the sweep."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: object) -> None:
            self.stopping = True
            print(f"{signal.Signals(number).name}: stopping; the same command again goes on", flush=True)
            for child in list(self._children):
                _terminate(child)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _check_unchanged(self) -> None:
        for cell, seed in self.ablation.order():
            place, source = Place.of(self.output, cell, seed), self.ablation.source(cell)
            steps = place.steps()
            trained = Place.of(self.output, source, seed).steps()
            if steps.get(EVALUATION, {}).get("status") == COMPLETE and not set(source.stages) <= set(trained):
                raise ValueError(
                    f"cell {cell.name}, seed {seed}: evaluated, but the training of {source.name} is gone; remove "
                    f"{place.folder} too, so that it is not taken for the evaluation of another model"
                )
            for step, record in steps.items():
                now = self.plans[cell.name].get(step)
                # What is not complete may be mended; a training that goes on checks for itself.
                if record["status"] != COMPLETE or record["settings"] == now:
                    continue
                found = ["the step itself is gone"] if now is None else differences(record["settings"], now)
                raise ValueError(
                    f"cell {cell.name}, seed {seed}: {step} was run with other settings ({'; '.join(found)}); "
                    f"take another output_dir, or remove {place.folder} to run the cell anew"
                )


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """Ask a command and all that it started to end."""
    if child.poll() is None:
        try:
            os.killpg(child.pid, signal.SIGTERM)
        except ProcessLookupError:
            return


def _tail(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_TAIL_LINES:]


def _reason(code: int, tail: Sequence[str], result: Path) -> str:
    """One line that says why a command failed."""
    if code == 0:
        return f"ended without writing {result.name}"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return f"exit code {code}: {tail[-1] if tail else 'it printed nothing'}"
