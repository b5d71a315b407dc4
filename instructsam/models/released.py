"""The released checkpoint's layout, in and out (DESIGN section 11).

    FOLDER/config.json            Qwen3-VL's configuration; ours is added under "instructsam" when we write it
    FOLDER/model.safetensors      or shards with an index; a tied head is not stored

The release's config.json does not have to tell SAM 3's sizes or ours: where they are absent, those of the released
model are taken, and the tensors' shapes, which are all checked, show whether that was right.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.full_size import QWEN3_VL_2B
from instructsam.models.layouts import RELEASED, untie_or_tie
from instructsam.models.loading import LoadReport, Model, TensorFolder, empty_model, fill
from instructsam.models.placement import as_dtype

OURS = "instructsam"
"""Key of config.json under which the settings are kept that Qwen3-VL's configuration has no place for."""


INDIFFERENT = {"trust_remote_code", "low_cpu_mem_usage", "use_safetensors"}
"""Arguments of transformers' `from_pretrained` that change nothing here: no code is run, nor a pickle read."""


def is_released(folder: str | Path) -> bool:
    """Whether the tensors of a folder carry the release's names. Raises ValueError where they cannot be read."""
    return "model.mask_queries" in set(TensorFolder(folder))


def released_config(folder: str | Path, tensors: TensorFolder) -> InstructSAMConfig:
    """The configuration of a released checkpoint; raises ValueError where config.json cannot be read."""
    path = Path(folder) / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    untie_or_tie(values)
    bridge = values.pop(OURS, None) or {"num_queries": tensors.shape("model.mask_queries")[0]}
    vlm = values if {"text_config", "vision_config"} <= set(values) else QWEN3_VL_2B
    fields = {key: value for key, value in vlm.items() if key not in ("architectures", "model_type", "_name_or_path")}
    return InstructSAMConfig(Qwen3VLConfig(**fields), **bridge)


def load_released(
    model_class: type[Model],
    folder: str | Path,
    *,
    config: InstructSAMConfig | None = None,
    dtype: str | torch.dtype | None = "auto",
    attn_implementation: str | None = None,
    **unsupported: Any,
) -> tuple[Model, LoadReport]:
    """Load a folder of the released layout, every tensor or none.

    Args:
        config: instead of what config.json says.
        dtype: of the result; "auto" keeps what the files hold (bfloat16 in the release).
        attn_implementation: ``sdpa`` (default) or ``flex_attention``, for the language model.
        unsupported: refused, but for those that change nothing here.

    Raises:
        ValueError: files that cannot be read; missing, unexpected or mis-shaped tensors (named).
    """
    if refused := sorted(set(unsupported) - INDIFFERENT):
        raise ValueError(
            f"{folder}: {', '.join(refused)} cannot be used with the released layout; convert it first: "
            "python -m instructsam.export FOLDER OUTPUT --layout instructsam"
        )
    tensors = TensorFolder(folder)
    config = config or released_config(folder, tensors)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model = empty_model(model_class, config)
    report = fill(model, [(tensors, RELEASED)], dtype=as_dtype(dtype))
    return model, report


def export_released(model: PreTrainedModel, folder: str | Path, max_shard_size: str = "5GB") -> list[str]:
    """Write configuration and tensors of an InstructSAM in the released layout; returns the names written.

    Raises:
        ValueError: a tensor that the layout has no name for, as a LoRA's (merge it first).
    """
    state, names = model.state_dict(), {}
    for ours in state:
        theirs = None if "lora_" in ours or ".base_layer." in ours else RELEASED.to_theirs(ours)
        if theirs is None:
            raise ValueError(
                f"tensor {ours!r} has no name in the released layout; merge LoRA first: python -m instructsam.merge"
            )
        names[theirs] = ours
    assert len(names) == len(state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: InstructSAMConfig = model.config
    arguments = set(inspect.signature(InstructSAMConfig.__init__).parameters) - {"self", "kwargs", "vlm_config"}
    bridge = {key: value for key, value in config.to_dict().items() if key in arguments}
    dtype = str(model.dtype).removeprefix("torch.")
    values = {**config.vlm_config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype, OURS: bridge}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_torch_state_dict(
        {theirs: state[ours].contiguous() for theirs, ours in names.items()}, folder, max_shard_size=max_shard_size
    )
    return sorted(names)
