"""What tells one evaluation from another: digests of its checkpoint and of its instructions, and their differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from instructsam.models.weights import INDEX, WEIGHTS, read_index

ADAPTER = "adapter"
# Files other than weights that answers depend on.
CONFIGURATION = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    f"{ADAPTER}/adapter_config.json",
)


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint in order: the model's own (shards by name), then those of its adapter.

    Raises:
        ValueError: no weights there, or an index that is none.
    """
    folder = Path(folder)
    names = sorted(set(read_index(folder).values())) if (folder / INDEX).is_file() else [WEIGHTS]
    files = [folder / name for name in names]
    files += sorted((folder / ADAPTER).glob("*.safetensors"))
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: no file {missing[0]}")
    return files


def weights_digest(folder: str | Path) -> str:
    """SHA-256 (hexadecimal) over the bytes of `weight_files` in their order, always read anew.

    For a checkpoint of one file it is what ``sha256sum model.safetensors`` says.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def configuration_digest(folder: str | Path) -> str:
    """SHA-256 (hexadecimal) over names and contents of the configuration, tokenizer and processor files there."""
    digest = hashlib.sha256()
    for name in CONFIGURATION:
        if (path := Path(folder) / name).is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def items_digest(lines: Iterable[Any]) -> str:
    """SHA-256 (hexadecimal) over plain JSON values in order: what is asked, and what the truth is."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, one line a (nested) key; empty where they are equal."""
    old, new = dict(_flat(there)), dict(_flat(now))
    return [
        f"{key}: {_short(old.get(key, 'nothing'))} there, {_short(new.get(key, 'nothing'))} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "…" if len(text) == 64 else text[:59] + "…"
