"""Configuration of InstructSAM: the VLM's and the detector's own configurations, and the bridge between them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.configuration_utils import PretrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.sam3.configuration_sam3 import Sam3Config

from instructsam.models.attention_mask import VARIANTS
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.processing.special_tokens import QWEN_IDS, SPECIAL_TOKENS

QUERY_INITS = ("zeros", "normal", "seg_token")
QUERY_MODES = ("replace", "add")
PHRASE_FEATURES = ("embeddings", "hidden_states")
PROJECTORS = ("mlp", "linear")

# Ids in the Qwen3-VL vocabulary (DESIGN section 4).
QWEN_TOKEN_IDS = {name: QWEN_IDS[token] for name, token in SPECIAL_TOKENS.items()}


def _as_config(value: Any, config_class: type[PretrainedConfig], name: str) -> PretrainedConfig:
    if value is None:
        return config_class()
    if isinstance(value, config_class):
        return value
    if isinstance(value, dict):
        return config_class(**{key: item for key, item in value.items() if key != "model_type"})
    raise ValueError(f"{name} must be a {config_class.__name__} or a dict, not {type(value).__name__}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return value


class InstructSAMConfig(PretrainedConfig):
    """Everything that determines the model's tensors and its forward pass.

    Args:
        vlm_config: Qwen3-VL's own configuration (or its dict).
        detector_config: SAM 3's own configuration (or its dict); its decoder's ``num_queries`` becomes `num_queries`.
        num_queries: N, instance queries a phrase owns (10 in the release).
        query_init: how a new query bank starts: ``zeros`` (release), ``normal`` or
            ``seg_token`` (the embedding of ``[SEG]``).
        attention_variant: rule of DESIGN section 5, one of `attention_mask.VARIANTS`.
        projector: ``mlp`` (Linear, ReLU, Linear; release) or ``linear``.
        phrase_features: what the phrase projector reads: input ``embeddings`` (release) or ``hidden_states``.
        query_mode: projected queries ``replace`` the detector's own (release) or are ``add``-ed to them.
        presence_token: keep SAM 3's presence token (off in the release).
        max_phrase_tokens: phrase tokens beyond this are cut (32).
        token_ids: ids of ref_start, ref_end, region, seg, mask_start, mask_end, eos, pad.
        independent_turns: how the model was trained: the turns of a conversation did not see each other. Changes no
            forward pass; `inference.session.Session` goes by it.
        initializer_range: standard deviation of new projector weights and, with query_init ``normal``, of the bank.
        embedding_std: standard deviation of new token embeddings and of the bank, where they must be larger than the
            weights (narrow models drown small embeddings in the first residual); None leaves it to the VLM.

    Raises:
        ValueError: an unknown choice, or sizes that make no sense.
    """

    model_type = "instructsam"
    is_composition = True

    def __init__(
        self,
        vlm_config: Qwen3VLConfig | dict | None = None,
        detector_config: Sam3Config | dict | None = None,
        num_queries: int = 10,
        query_init: str = "zeros",
        attention_variant: str = "hybrid",
        projector: str = "mlp",
        phrase_features: str = "embeddings",
        query_mode: str = "replace",
        presence_token: bool = False,
        max_phrase_tokens: int = 32,
        token_ids: dict[str, int] | None = None,
        independent_turns: bool = False,
        initializer_range: float = 0.02,
        embedding_std: float | None = None,
        **kwargs: Any,
    ):
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries}: a phrase needs at least one instance query")
        if max_phrase_tokens < 1:
            raise ValueError(f"max_phrase_tokens={max_phrase_tokens}: must be at least 1")
        self.vlm_config = _as_config(vlm_config, Qwen3VLConfig, "vlm_config")
        self.detector_config = _as_config(detector_config, Sam3Config, "detector_config")
        self.detector_config.detr_decoder_config.num_queries = num_queries
        self.num_queries = num_queries
        self.query_init = _one_of("query_init", query_init, QUERY_INITS)
        self.attention_variant = _one_of("attention_variant", attention_variant, VARIANTS)
        self.projector = _one_of("projector", projector, PROJECTORS)
        self.phrase_features = _one_of("phrase_features", phrase_features, PHRASE_FEATURES)
        self.query_mode = _one_of("query_mode", query_mode, QUERY_MODES)
        self.presence_token = presence_token
        self.max_phrase_tokens = max_phrase_tokens
        self.independent_turns = independent_turns
        self.initializer_range = initializer_range
        self.embedding_std = embedding_std
        self.token_ids = {**QWEN_TOKEN_IDS, **(token_ids or {})}
        super().__init__(**kwargs)
        # The tied head is this class's own affair (see InstructSAM.lm_logits).
        self.tie_word_embeddings = False

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.vlm_config.text_config.hidden_size

    @property
    def detector_size(self) -> int:
        """Width of the detector."""
        return self.detector_config.detr_decoder_config.hidden_size

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of the mask logits: the finest feature map of the detector's neck."""
        vision = self.detector_config.vision_config
        image, patch = vision.backbone_config.image_size, vision.backbone_config.patch_size
        image_hw = (image, image) if isinstance(image, int) else tuple(image)
        patch_hw = (patch, patch) if isinstance(patch, int) else tuple(patch)
        scale = max(vision.scale_factors)
        return int(image_hw[0] // patch_hw[0] * scale), int(image_hw[1] // patch_hw[1] * scale)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["vlm_config"] = self.vlm_config.to_dict()
        output["detector_config"] = self.detector_config.to_dict()
        return output


AutoConfig.register("instructsam", InstructSAMConfig, exist_ok=True)
AutoProcessor.register(InstructSAMConfig, InstructSAMProcessor, exist_ok=True)
