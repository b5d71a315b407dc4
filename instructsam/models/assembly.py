"""A new InstructSAM from a Qwen3-VL and a SAM 3, each a directory or a hub name (DESIGN sections 4 and 8).

Everything comes from the two but query bank and projectors, which are new; SAM 3's text encoder and tracker are left
out, and of its learned queries and reference points the first N are taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.sam3.configuration_sam3 import Sam3Config

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.layouts import FIRST_ROWS, QWEN3_VL, SAM3, untie_or_tie
from instructsam.models.loading import LoadReport, TensorFolder, empty_model, fill
from instructsam.models.modeling import InstructSAMModel

NEW = ("query_bank.", "query_projector.", "phrase_projector.")


def read_vlm_config(folder: Path) -> Qwen3VLConfig:
    """The configuration of a Qwen3-VL folder. Raises ValueError where it is of another model."""
    values = _read(folder, "qwen3_vl", "Qwen3-VL")
    untie_or_tie(values)
    return Qwen3VLConfig(**{key: value for key, value in values.items() if key != "model_type"})


def read_detector_config(folder: Path) -> Sam3Config:
    """The detector's configuration out of a SAM 3 folder's. Raises ValueError where it is of another model."""
    values = _read(folder, "sam3_video", "SAM 3").get("detector_config")
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'}: has no detector_config")
    return Sam3Config(**{key: value for key, value in values.items() if key != "model_type"})


def assemble(
    vlm_folder: Path,
    detector_folder: Path,
    token_ids: Mapping[str, int],
    bridge: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[InstructSAMModel, LoadReport]:
    """Put the model together.

    Args:
        vlm_folder, detector_folder: Qwen3-VL's and SAM 3's files.
        token_ids: of the special tokens, see `InstructSAMConfig`.
        bridge: further arguments of `InstructSAMConfig` (num_queries, query_init, …).
        dtype: of all tensors; None keeps what the files hold, with new tensors in float32.
        seed: of the new tensors.

    Raises:
        ValueError: folders of other models; missing, unexpected or mis-shaped tensors (named).
    """
    config = InstructSAMConfig(
        read_vlm_config(vlm_folder), read_detector_config(detector_folder), token_ids=dict(token_ids), **bridge
    )
    model = empty_model(InstructSAMModel, config)
    sources = [(TensorFolder(vlm_folder), QWEN3_VL), (TensorFolder(detector_folder), SAM3)]
    report = fill(model, sources, dtype=dtype, may_be_new=NEW, first_rows=FIRST_ROWS, seed=seed)
    model.load_report = report
    return model, report


def _read(folder: Path, model_type: str, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a configuration in JSON ({error})") from None
    if found != model_type:
        raise ValueError(f"{path}: describes a {found!r} model, not a {what} ({model_type!r})")
    return values
