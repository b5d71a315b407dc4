"""Where the Hydra configurations lie: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = str(_BESIDE if (_BESIDE / "train.yaml").exists() else Path(__file__).resolve().parent / "configs")
