"""From a path or hub name to a folder on this computer, with errors that say what to do.

What is not a folder here is looked up on the Hugging Face hub and downloaded into its cache: only the files of the
given patterns, and never pickles.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja")
"""Files of a model: configurations, weights, and a tokenizer's files with its chat template."""
SHIPPED = ("tiny",)
"""Models that come with the package, known by their name."""
_BESIDE = Path(__file__).resolve().parents[2] / "checkpoints"
_CHECKPOINTS = _BESIDE if (_BESIDE / SHIPPED[0]).is_dir() else Path(__file__).resolve().parents[1] / "checkpoints"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options of `find_folder` that go to `huggingface_hub.snapshot_download`."""


def is_hub_name(path_or_name: str | os.PathLike[str]) -> bool:
    """Whether this could be the name of a model on the hub (ORG/NAME) and is no folder here."""
    return isinstance(path_or_name, str) and bool(HUB_NAME.fullmatch(path_or_name)) and not Path(path_or_name).exists()


def download_command(name: str, patterns: Sequence[str] = PATTERNS, revision: str | None = None) -> str:
    """The shell command that downloads a model into ``weights/NAME``."""
    words = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    for pattern in patterns:
        words += ["--include", pattern]
    return shlex.join([*words, "--local-dir", f"weights/{name}"])


def find_folder(
    path_or_name: str | os.PathLike[str], kind: str, patterns: Sequence[str] = PATTERNS, **options: Any
) -> Path:
    """The folder of a model: a local one as it is, or the snapshot of a hub name, downloaded if need be.

    Args:
        path_or_name: a folder, the name of one that comes with the package (``tiny``), or ORG/NAME on the hub. A folder
            of that name goes first.
        kind: what is looked for, for messages ("Qwen3-VL", "InstructSAM processor").
        patterns: files to download (shell patterns; ``*`` crosses folders).
        options: of the download, any of `HUB_OPTIONS`; without effect on a local folder.

    Raises:
        ValueError: whatever keeps the folder from being found, and the command that helps.
        TypeError: an unknown option.
    """
    if unknown := sorted(set(options) - set(HUB_OPTIONS)):
        raise TypeError(f"unknown option {', '.join(unknown)}: the hub's are {', '.join(HUB_OPTIONS)}")
    if not str(path_or_name).strip():
        raise ValueError(f"{kind}: neither a folder nor a hub name is given")
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{kind}: {path} is a file: give the folder it lies in")
    if str(path_or_name) in SHIPPED:
        return _CHECKPOINTS / str(path_or_name)
    if not is_hub_name(path_or_name):
        raise ValueError(f"{kind}: no folder {path} (a model on the hub would be named ORG/NAME)")
    name = str(path_or_name)
    try:
        snapshot = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(PICKLES), library_name="instructsam", **options
        )
    except Exception as error:  # the hub's, its HTTP client's (another one in every major version), the disk's
        raise ValueError(explain(error, name, kind, patterns, options)) from error
    return Path(snapshot)


def explain(
    error: Exception, name: str, kind: str, patterns: Sequence[str] = PATTERNS, options: dict[str, Any] | None = None
) -> str:
    """Why a download failed and what to do, in plain words."""
    options = options or {}
    revision = options.get("revision")
    download = download_command(name, patterns, revision)
    page = f"{constants.ENDPOINT}/{name}"
    start = f"{kind}: there is no folder {name} here, and "
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return (
            f"{start}the hub gives {name} only to those who have accepted its terms: accept them at {page}, make the "
            "account known with `hf auth login`, and start again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{start}the hub knows no model of that name, or it is private: check the spelling at {page}; for a "
            "private one `hf auth login` with an account that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{start}{name} on the hub has no revision {revision!r}: see {page}/commits for those there are"
    if isinstance(error, LocalTokenNotFoundError):
        return f"{start}token=True needs a stored token, and there is none: `hf auth login`"
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return (
            f"{start}the hub refuses access to {name} (HTTP {status}): `hf auth login` with a valid token that may "
            f"read it; its page is {page}"
        )
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):  # ConnectionError: offline mode
        if options.get("local_files_only"):
            why = "local_files_only=True forbids to download it"
        elif constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE=1 forbids to download it"
        elif isinstance(error.__cause__, HfHubHTTPError):
            why = f"the hub is in trouble ({first_line(error.__cause__)})"
        else:
            why = "the hub cannot be reached"
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        return (
            f"{start}{why}, while the cache ({cache}) holds {name} not at all or only in part. With a network: "
            f"`{download}`, and then give the folder weights/{name} in place of the name"
        )
    if isinstance(error, HfHubHTTPError):
        return f"{start}the hub answers with HTTP {status} ({first_line(error)}): try again later, or `{download}`"
    return (
        f"{start}its download from the hub failed ({type(error).__name__}: {first_line(error)}): start again, the "
        f"files that are complete are kept; or `{download}` and give the folder weights/{name} in place of the name"
    )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
