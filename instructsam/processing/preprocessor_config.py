"""Qwen's ``preprocessor_config.json`` ⇄ settings of `VLMImageTransform`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"  # newer transformers nest the same settings in here, as image_processor
BICUBIC = 3  # PIL's number of it
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": BICUBIC}


def read_preprocessor_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The image settings in a folder, and the file that they come from. Raises ValueError where there are none."""
    for name in (PREPROCESSOR_CONFIG, PROCESSOR_CONFIG):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        if name == PROCESSOR_CONFIG and isinstance(values, dict):
            values = values.get("image_processor")
        if isinstance(values, dict):
            return values, str(path)
    raise ValueError(f"{folder}: no {PREPROCESSOR_CONFIG} there, nor image settings in a {PROCESSOR_CONFIG}")


def settings_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `VLMImageTransform` from Qwen2-VL's image processor settings.

    Raises:
        ValueError: naming `where` and the entry: one is missing, or asks for what the transform does not do.
    """

    def problem(key: str, wanted: str) -> ValueError:
        found = repr(values[key]) if key in values else "missing"
        return ValueError(f"{where}: {key} is {found}, but {wanted}")

    for key, wanted in _FIXED.items():
        if values.get(key, wanted) not in (wanted, None):
            raise problem(key, f"this transform works with {wanted} only")
    factor = values.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise problem("rescale_factor", "this transform works with 1/255 only")
    settings: dict[str, Any] = {}
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        if not isinstance(values.get(key), int) or isinstance(values[key], bool):
            raise problem(key, "an integer is needed")
        settings[key] = values[key]
    for key, name in (("image_mean", "mean"), ("image_std", "std")):
        channels = values.get(key)
        channels = [channels] if isinstance(channels, (int, float)) else channels
        if not isinstance(channels, list) or not channels or not all(isinstance(c, (int, float)) for c in channels):
            raise problem(key, "one number per channel is needed")
        if len(set(channels)) > 1:
            raise problem(key, "this transform has one value for all channels")
        settings[name] = float(channels[0])
    # Older files give the limits as min_pixels and max_pixels, which go before size as in Qwen's own processor.
    size = values.get("size") or {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        limit = values.get(key) if values.get(key) is not None else size.get(edge)
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise problem("size", f"{edge} (or {key}) must give the pixels of a picture as an integer")
        settings[key] = limit
    return settings


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: a complete configuration of Qwen2-VL's image processor."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": settings["max_pixels"], "shortest_edge": settings["min_pixels"]},
        "patch_size": settings["patch_size"],
        "temporal_patch_size": settings["temporal_patch_size"],
        "merge_size": settings["merge_size"],
        "image_mean": [settings["mean"]] * 3,
        "image_std": [settings["std"]] * 3,
        "rescale_factor": 1 / 255,
        **_FIXED,
    }
