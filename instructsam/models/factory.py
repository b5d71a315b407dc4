"""Build model and processor from a configuration (`configs/model/*.yaml`): fresh weights, then parts of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from instructsam.models.checkpoints import fresh_model, take_modules
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.modeling import InstructSAM
from instructsam.processing.chat import ChatLayout
from instructsam.processing.processor import InstructSAMProcessor

VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def load_tokenizer(path: str | Path) -> Any:
    """A tokenizer folder. Raises ValueError naming the folder where there is none."""
    if not Path(path).is_dir():
        raise ValueError(
            f"{path}: no tokenizer folder there; the tiny world's is made by `python -m instructsam.make_tiny_world`"
        )
    return AutoTokenizer.from_pretrained(str(path))


def build_model(settings: Mapping[str, Any], seed: int = 0) -> tuple[InstructSAM, InstructSAMProcessor]:
    """A new model with its processor.

    Args:
        settings: keys ``tokenizer`` (folder), ``config`` (arguments of `InstructSAMConfig`; vocabulary size and token
            ids come from the tokenizer), ``vlm_image``, ``max_length``,
            ``mask_resize``, ``init`` (list of {checkpoint, modules}).
        seed: of the fresh weights; the same seed gives the same weights whatever was drawn before.
    """
    tokenizer = load_tokenizer(settings["tokenizer"])
    values = copy.deepcopy(dict(settings["config"]))
    chat = ChatLayout(tokenizer, num_queries=1)
    vlm = values.setdefault("vlm_config", {})
    text = vlm.setdefault("text_config", {})
    text.setdefault("vocab_size", len(tokenizer))
    text["pad_token_id"] = chat.token_ids["pad"]
    for key, token in VISION_TOKENS.items():
        vlm[key] = tokenizer.convert_tokens_to_ids(token)
    config = InstructSAMConfig(**values, token_ids=chat.token_ids)
    model = fresh_model(config, seed)
    for part in settings.get("init") or ():
        take_modules(model, part["checkpoint"], part["modules"])
    image_size = config.detector_config.vision_config.backbone_config.image_size
    processor = InstructSAMProcessor(
        tokenizer,
        config.num_queries,
        config.mask_size,
        vlm_image=dict(settings.get("vlm_image") or {}),
        detector_image_size=image_size,
        max_length=settings.get("max_length", 16384),
        mask_resize=settings.get("mask_resize", "nearest"),
    )
    return model, processor
