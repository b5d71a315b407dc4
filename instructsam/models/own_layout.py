"""Our own layout, as `save_pretrained` writes it: loaded through transformers, with nothing missing or left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.layouts import RELEASED
from instructsam.models.loading import LoadReport, has_weights
from instructsam.models.released import is_released

NAME = "InstructSAM"


def layout_of(folder: str | Path) -> str:
    """The name of the layout that a checkpoint folder has: ours or the released one.

    Raises:
        ValueError: no checkpoint, or one of another model.
    """
    path = Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except OSError:
        raise ValueError(f"{folder}: no config.json there, so this is not a checkpoint folder") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a configuration in JSON ({error})") from None
    if has_weights(folder) and is_released(folder):  # names of tensors tell more than a configuration
        return RELEASED.name
    if model_type == InstructSAMConfig.model_type:
        return NAME
    if not has_weights(folder):
        raise ValueError(f"{folder}: holds a {model_type!r} model without safetensors, which cannot be an InstructSAM")
    raise ValueError(
        f"{folder}: holds a {model_type!r} model, neither an InstructSAM nor one in the released layout; a new model "
        "is assembled with model=instructsam_2b model.vlm_path=DIR model.detector_path=DIR"
    )


def load_own(from_pretrained: Callable[..., Any], folder: Path, **kwargs: Any) -> tuple[Any, dict, LoadReport]:
    """Load with transformers' `from_pretrained`; returns the model, its loading info and our report.

    Raises:
        ValueError: truncated files; missing, unexpected or mis-shaped tensors (named).
    """
    kwargs.setdefault("dtype", "auto")
    try:
        model, info = from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: weights cannot be loaded, truncated? ({error})") from error
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in info[f"{kind}_keys"])
        if names:
            problems.append(f"{len(names)} {kind}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}")
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit the configuration: {'; '.join(problems)}")
    return model, info, LoadReport(NAME, str(folder), loaded=list(model.state_dict()))
