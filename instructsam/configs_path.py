"""Where the Hydra configurations lie (beside the package in a checkout, inside it in an installed wheel), and how the
commands take one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

_BESIDE = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = str(_BESIDE if (_BESIDE / "train.yaml").exists() else Path(__file__).resolve().parent / "configs")


def missing_keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Keys without a value (???) in a nested configuration; OmegaConf's own cannot where others refer to them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from missing_keys(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def complete_settings(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values. Ends the process, naming the keys, if some are not given."""
    if missing := list(missing_keys(OmegaConf.to_container(config))):
        sys.exit(f"error: not given: {', '.join(f'{key}=...' for key in missing)}")
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
