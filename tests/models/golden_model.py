"""Build the tiny model of a golden fixture and load its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.modeling import InstructSAMModel

# released prefix → ours
PREFIXES = {
    "model.language_model.": "vlm.language_model.",
    "model.visual.": "vlm.visual.",
    "model.mask_queries": "query_bank.weight",
    "model.mask_hidden_fcs.0.": "query_projector.",
    "model.text_hidden_fcs.0.": "phrase_projector.",
    "model.grounding_model.model.": "detector.",
}


def our_name(released: str) -> str:
    for prefix, ours in PREFIXES.items():
        if released.startswith(prefix):
            return ours + released.removeprefix(prefix)
    raise KeyError(released)


def load_golden(folder: Path) -> tuple[InstructSAMModel, dict, dict]:
    """Returns (model in eval mode, meta.json, tensors)."""
    meta = json.loads((folder / "meta.json").read_text())
    tokens = meta["tokens"]
    config = InstructSAMConfig(
        meta["vlm_config"],
        meta["detector_config"],
        num_queries=meta["num_queries"],
        token_ids={key: tokens[key] for key in ("ref_start", "ref_end", "seg", "mask_start", "mask_end", "eos", "pad")},
    )
    model = InstructSAMModel(config).eval()
    state = {our_name(name): tensor for name, tensor in load_file(folder / "weights.safetensors").items()}
    model.load_state_dict(state, strict=True)
    return model, meta, load_file(folder / "tensors.safetensors")
