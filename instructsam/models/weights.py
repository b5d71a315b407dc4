"""The names under which a folder holds weights, and the index of those in several files. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_index(folder: Path, what: str | None = None) -> dict[str, str]:
    """Tensor → name of the file in the folder that holds it, which may be missing there.

    Args:
        folder: with an index.
        what: beginning of the message: whose folder this is; None = its path.

    Raises:
        ValueError: an index that is none, names no files, or names anything but safetensors in that folder.
    """
    what = str(folder) if what is None else what
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {INDEX} is no index of weight files ({error!r})") from error
    if not names:
        raise ValueError(f"{what}: {INDEX} names no weight files")
    for name in names:
        # Names come from a file: they must not lead out of the folder, nor to pickles.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{what}: {INDEX} names {name!r}, which is no safetensors file in that folder")
    return weight_map
