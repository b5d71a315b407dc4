"""Build model and processor from a configuration (`configs/model/*.yaml`).

Three ways: new weights (the tiny model), Qwen3-VL and SAM 3 put together, or a checkpoint that goes on training.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from instructsam.models.assembly import assemble, read_vlm_config
from instructsam.models.checkpoints import fresh_model, take_modules
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.gradient_checkpointing import enable_gradient_checkpointing
from instructsam.models.hub import resolve
from instructsam.models.layouts import RELEASED
from instructsam.models.lora import LoraSettings, add_lora, has_lora
from instructsam.models.modeling import InstructSAMModel
from instructsam.models.placement import as_dtype, cast_parameters
from instructsam.processing.chat import ChatLayout
from instructsam.processing.images import VLMImageTransform
from instructsam.processing.preprocessor_config import PREPROCESSOR_CONFIG
from instructsam.processing.pretrained import read_tokenizer
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.processing.special_tokens import add_special_tokens

VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
SETTINGS = {"checkpoint", "vlm_path", "detector_path", "tokenizer", "config", "init", "dtype", "attn_implementation"}
SETTINGS |= {"lora", "gradient_checkpointing", "compile_vision", "vlm_image", "max_length", "mask_resize"}
MAX_VISUAL_TOKENS = 8192  # DESIGN section 8
# Options of a checkpoint that may be set anew, since no tensor hangs on them.
FREE_OPTIONS = ("attention_variant", "max_phrase_tokens")


def build_model(settings: Mapping[str, Any], seed: int = 0) -> tuple[InstructSAMModel, InstructSAMProcessor]:
    """A model to train, with its processor.

    Args:
        settings: ``checkpoint``, or ``vlm_path`` and ``detector_path``, or ``tokenizer`` (a folder) say where the model
            comes from; ``config`` holds arguments of `InstructSAMConfig` (token ids come from the tokenizer);
            ``init`` lists parts to take from other checkpoints ({checkpoint, modules}); ``dtype``,
            ``attn_implementation``, ``lora`` (see `LoraSettings`), ``gradient_checkpointing``; ``vlm_image`` (pixel
            limits), ``max_length`` and ``mask_resize`` of the processor. ``compile_vision`` is acted on later, when it
            is known what trains: see `compiling.compile_frozen_vision`.
        seed: of new weights; the same seed gives the same weights whatever was drawn before.

    Raises:
        ValueError: unknown or contradictory settings, and whatever the sources complain of.
    """
    unknown = sorted(set(settings) - SETTINGS)
    if unknown:
        raise ValueError(f"unknown model settings {', '.join(unknown)}; known are {', '.join(sorted(SETTINGS))}")
    sources = [name for name in ("checkpoint", "vlm_path", "tokenizer") if settings.get(name)]
    if len(sources) != 1 or bool(settings.get("vlm_path")) != bool(settings.get("detector_path")):
        raise ValueError(
            "a model comes from model.checkpoint, or from model.vlm_path with model.detector_path, or (new) from "
            f"model.tokenizer and model.config: exactly one of them, not {', '.join(sources) or 'none'}"
        )
    build = {"checkpoint": _from_checkpoint, "vlm_path": _from_parts, "tokenizer": _from_nothing}[sources[0]]
    model, processor = build(settings, seed)
    for part in settings.get("init") or ():
        for note in take_modules(model, part["checkpoint"], part["modules"]):
            _say(note)
    if settings.get("lora"):
        add_lora(model, LoraSettings.from_mapping(settings["lora"]), seed)
    if settings.get("gradient_checkpointing"):
        enable_gradient_checkpointing(model)
    return model, processor


def _from_nothing(settings: Mapping[str, Any], seed: int) -> tuple[InstructSAMModel, InstructSAMProcessor]:
    tokenizer = load_tokenizer(settings["tokenizer"])
    values = copy.deepcopy(dict(settings["config"]))
    chat = ChatLayout(tokenizer, num_queries=1)
    vlm = values.setdefault("vlm_config", {})
    text = vlm.setdefault("text_config", {})
    text.setdefault("vocab_size", len(tokenizer))
    text["pad_token_id"] = chat.token_ids["pad"]
    for key, token in VISION_TOKENS.items():
        vlm[key] = tokenizer.convert_tokens_to_ids(token)
    config = InstructSAMConfig(**values, **_attention(settings), token_ids=chat.token_ids)
    model = fresh_model(config, seed)
    if dtype := as_dtype(settings.get("dtype")):
        cast_parameters(model.parameters(), dtype)
    return model, make_processor(config, tokenizer, settings)


def _from_parts(settings: Mapping[str, Any], seed: int) -> tuple[InstructSAMModel, InstructSAMProcessor]:
    if twice := sorted({"vlm_config", "detector_config"} & set(settings["config"])):
        raise ValueError(f"model.config has {', '.join(twice)}, which vlm_path and detector_path bring along")
    vlm_folder = resolve(settings["vlm_path"], "Qwen3-VL")
    detector_folder = resolve(settings["detector_path"], "SAM 3")
    vocab_size = read_vlm_config(vlm_folder).text_config.vocab_size
    tokenizer = read_tokenizer(vlm_folder)
    token_ids = add_special_tokens(tokenizer, vocab_size)
    bridge = {**settings["config"], **_attention(settings)}
    model, report = assemble(vlm_folder, detector_folder, token_ids, bridge, as_dtype(settings.get("dtype")), seed)
    _say(report)
    return model, make_processor(model.config, tokenizer, settings, vlm_folder)


def _from_checkpoint(settings: Mapping[str, Any], seed: int) -> tuple[InstructSAMModel, InstructSAMProcessor]:
    folder = resolve(settings["checkpoint"], "InstructSAM")
    model = InstructSAMModel.from_pretrained(folder, dtype=settings.get("dtype") or "auto", **_attention(settings))
    if model.load_report.layout != RELEASED.name:  # which is said while loading
        _say(model.load_report)
    if has_lora(model):
        raise ValueError(
            f"{folder}: its LoRA is not merged yet; run `python -m instructsam.merge {folder} {folder}-merged` and go "
            "on from there"
        )
    for key, value in (settings.get("config") or {}).items():
        found = getattr(model.config, key, None)
        if key in FREE_OPTIONS:
            setattr(model.config, key, value)
        elif key not in ("query_init", "vlm_config", "detector_config") and found != value:
            raise ValueError(f"{folder}: has {key}={found!r}, the settings say {value!r}")
    # Through the configuration's own checks once more.
    InstructSAMConfig(**{key: getattr(model.config, key) for key in FREE_OPTIONS})
    return model, load_processor(folder, model.config, settings)


def _say(report: Any) -> None:
    """Tell once, however many processes load the model."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(report, flush=True)


def _attention(settings: Mapping[str, Any]) -> dict[str, Any]:
    wanted = settings.get("attn_implementation")
    return {"attn_implementation": wanted} if wanted else {}


def load_tokenizer(path: str | Path) -> Any:
    """A tokenizer folder. Raises ValueError naming the folder where there is none that can be read."""
    if not Path(path).is_dir():
        raise ValueError(
            f"{path}: no tokenizer folder there; the tiny world's is made by `python -m instructsam.make_tiny_world`"
        )
    return read_tokenizer(path)


def make_processor(
    config: InstructSAMConfig,
    tokenizer: Any,
    settings: Mapping[str, Any],
    folder: Path | None = None,
    max_visual_tokens: int | None = None,
) -> InstructSAMProcessor:
    """The processor that fits a model.

    Args:
        settings: ``vlm_image``, ``max_length``, ``mask_resize``, each optional.
        folder: where Qwen's preprocessor_config.json may lie, with normalisation and pixel limits.
        max_visual_tokens: what a picture takes at most, whatever the pixel limits are; None = no such cap.
    """
    vision = config.vlm_config.vision_config
    image = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        **(settings.get("vlm_image") or {}),
    }
    if folder is not None and (folder / PREPROCESSOR_CONFIG).exists():
        transform = VLMImageTransform.from_preprocessor_config(folder, **image)
    else:
        transform = VLMImageTransform(**image)
    if max_visual_tokens is not None:
        most = max_visual_tokens * transform.factor**2
        transform = replace(transform, max_pixels=min(transform.max_pixels, most))
    return InstructSAMProcessor(
        tokenizer,
        config.num_queries,
        config.mask_size,
        vlm_image=transform,
        detector_image_size=config.detector_config.vision_config.backbone_config.image_size,
        max_length=settings.get("max_length") or 16384,
        mask_resize=settings.get("mask_resize") or "nearest",
    )


def load_processor(
    folder: str | Path, config: InstructSAMConfig, settings: Mapping[str, Any] | None = None
) -> InstructSAMProcessor:
    """The processor of a checkpoint folder: its own, or for the released layout one that fits the model.

    Args:
        config: of the folder's model.
        settings: as in `make_processor`; what is given there wins over what the folder says.

    Raises:
        ValueError: no tokenizer, or a tokenizer or processor of another model.
    """
    folder, settings = Path(folder), dict(settings or {})
    if InstructSAMProcessor.is_saved_in(folder):
        own = InstructSAMProcessor.from_pretrained(folder)
        tokenizer, kept = own.tokenizer, own._settings
        image = {**kept["vlm_image"], **(settings.get("vlm_image") or {})}
        settings = {name: settings.get(name) or kept[name] for name in ("max_length", "mask_resize")}
        processor = make_processor(config, tokenizer, {**settings, "vlm_image": image})
        if own.num_queries != config.num_queries:
            raise ValueError(
                f"{folder}: the processor has num_queries={own.num_queries}, the model {config.num_queries}"
            )
    else:
        tokenizer = read_tokenizer(folder)
        add_special_tokens(tokenizer, config.vlm_config.text_config.vocab_size)
        # Qwen's own limit leaves no room for words and queries beside a large photograph.
        processor = make_processor(config, tokenizer, settings, folder, MAX_VISUAL_TOKENS)
    wrong = {name: token for name, token in processor.chat.token_ids.items() if config.token_ids[name] != token}
    if wrong:
        raise ValueError(f"{folder}: the tokenizer's ids {wrong} are not the model's, so it belongs to another model")
    return processor
