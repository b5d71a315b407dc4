"""Model folders by path or hub name, checked for what loading needs before anything is read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructsam.models.weights import INDEX, WEIGHTS, read_index
from instructsam.processing.hub import PATTERNS, PICKLES, download_command, find_folder, is_hub_name

CONFIG = "config.json"
LFS_HEADER = b"version https://git-lfs.github.com"


def resolve(
    path_or_name: str | os.PathLike[str], kind: str, patterns: Sequence[str] = PATTERNS, **options: Any
) -> Path:
    """The folder of a model with its configuration and safetensors weights, complete.

    Args:
        path_or_name: a local folder, or a hub name (ORG/NAME), which is downloaded into the hub's cache.
        kind: what is looked for ("Qwen3-VL", "SAM 3", "InstructSAM"), for messages.
        patterns: files to download.
        options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` of the download.

    Returns:
        A folder with config.json and either model.safetensors or an index with all its shards.

    Raises:
        ValueError: no such folder or hub model, no access, no network, files that are missing, pickles instead of
            safetensors, an interrupted download; every message says what to do.
        TypeError: an unknown option.
    """
    folder = find_folder(path_or_name, kind, patterns, **options)
    if is_hub_name(path_or_name):
        fix = f"`{download_command(str(path_or_name), patterns, options.get('revision'))}` fetches what is missing"
        check_model_folder(folder, f"{kind}: {path_or_name} (in {folder})", fix)
    else:
        fix = f"`hf download ORG/NAME --local-dir {shlex.quote(str(folder))}` fetches what is missing of a hub model"
        check_model_folder(folder, f"{kind}: {folder}", fix)
    return folder


def check_model_folder(folder: Path, what: str, fix: str) -> None:
    """Raise ValueError where a folder lacks its configuration or (part of) its weights.

    Args:
        folder: an existing folder.
        what: beginning of the message: whose folder this is.
        fix: what helps where files are missing.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{what}: no {CONFIG} there, so this is not a model folder{_instead(folder)}; {fix}")
    if (folder / INDEX).is_file():
        shards = sorted(set(read_index(folder, what).values()))
        if (folder / WEIGHTS).is_file() and WEIGHTS not in shards:
            raise ValueError(f"{what}: both {WEIGHTS} and {INDEX} there, of two different saves? Remove one of them")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{what}: {len(missing)} of the {len(shards)} files that {INDEX} names are missing (first: "
                f"{missing[0]}), an interrupted download or copy? {fix}"
            )
    elif (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    else:
        raise ValueError(f"{what}: {_no_weights(folder, fix)}")
    for shard in shards:
        with open(folder / shard, "rb") as file:
            if file.read(len(LFS_HEADER)) == LFS_HEADER:
                raise ValueError(
                    f"{what}: {shard} is a pointer of Git LFS, not the weights: run `git lfs pull` in that folder; "
                    f"or delete it, and {fix}"
                )


def _no_weights(folder: Path, fix: str) -> str:
    """Why a folder with a configuration has no weights that can be loaded."""
    if any(folder.rglob("*.incomplete")):
        return f"the weights have not been downloaded completely: {fix}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"neither {WEIGHTS} nor {INDEX} there, only {', '.join(others[:3])}, an interrupted download? {fix}"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        convert = (
            "import torch; from safetensors.torch import save_file; "
            f"d = torch.load({pickles[0]!r}, map_location='cpu', weights_only=True); "
            f"save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {WEIGHTS!r})"
        )
        return (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run any code when they are opened and are "
            f"never read here. Take a revision with safetensors; or convert them, if you trust where they come "
            f'from: `python -c "{convert}"` in that folder'
        )
    return f"no weights there (neither {WEIGHTS} nor {INDEX}); {fix}"


def _instead(folder: Path) -> str:
    """A hint at the model folders inside of a folder."""
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return f" (but there is one in {inside[0]})" if inside else ""
