"""The configuration of the released model: Qwen3-VL-2B, SAM 3 and the bridge between them (DESIGN section 4)."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.sam3.configuration_sam3 import Sam3Config

from instructsam.models.configuration import InstructSAMConfig

QWEN3_VL_2B: dict[str, Any] = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
        "out_hidden_size": 2048,
    },
}


def full_size_config(**bridge: Any) -> InstructSAMConfig:
    """Configuration of the 2B model; `bridge` are further arguments of `InstructSAMConfig`."""
    # The defaults of transformers' Sam3Config are those of facebook/sam3.
    return InstructSAMConfig(Qwen3VLConfig(**QWEN3_VL_2B), Sam3Config(), **bridge)
