"""What a run was started from and with: revision of the code, overrides, versions, engine, devices.

One record a start, a line of OUTPUT_DIR/starts.jsonl. The name of the machine and paths are left out: such records get
published.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from instructsam.training.engines import Engine

PACKAGES = ("instructsam", "torch", "transformers", "accelerate", "deepspeed", "peft", "numpy")
_MOST_FILES = 50
_PACKAGE_FILE = Path(__file__).resolve().parents[1] / "__init__.py"


def git_revision(file: str | Path = _PACKAGE_FILE) -> dict[str, Any] | None:
    """{"commit", "dirty": names of changed and untracked files, at most 50} of the repository that tracks `file`.

    None outside a repository (an installed package, even where it lies inside another project's repository), or without
    git. Never an error.
    """
    file = Path(file)

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "-z", "--no-renames").split("\0")
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return {"commit": commit, "dirty": [change[3:] for change in changes if change][:_MOST_FILES]}


def versions() -> dict[str, str]:
    """Version of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_start(
    engine: Engine,
    step: int,
    overrides: Sequence[str] = (),
    global_batch_size: float | None = None,
) -> dict[str, Any]:
    """The record of a start: plain JSON. Only the main process, which alone writes it, asks git.

    Args:
        step: finished steps: 0, or where the run resumes.
        overrides: of the configuration, as on the command line.
        global_batch_size: samples of an optimizer step (a mean, if it varies).
    """
    device = engine.accelerator.device
    return {
        "step": step,
        "git": git_revision() if engine.accelerator.is_main_process else None,
        "overrides": list(overrides),
        "versions": versions(),
        "engine": engine.name,
        "num_processes": engine.accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": engine.precision,
        "global_batch_size": global_batch_size,
    }


def one_line(start: dict[str, Any]) -> str:
    """A start for people: revision, versions, engine."""
    git = start["git"]
    revision = "no git revision"
    if git:
        number = len(git["dirty"])
        changed = f"{number}{' or more' if number == _MOST_FILES else ''} changed file{'s' if number > 1 else ''}"
        revision = f"revision {git['commit'][:12]}" + (f" with {changed}" if number else "")
    count = start["num_processes"]
    return (
        f"{revision}, torch {start['versions'].get('torch')}, {count} process{'es' if count > 1 else ''} on "
        f"{start['device']} (engine {start['engine']}, precision {start['precision']})"
    )
