"""InstructSAM: Qwen3-VL, a bank of instance queries, projectors and SAM 3's detector (DESIGN sections 3 to 5).

Read `InstructSAMModel.forward` first: it is the picture of DESIGN section 3 in six lines.

Shape suffixes: B batch, L sequence, P phrases, N queries, T phrase tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from instructsam.models.attention_mask import TokenLayout, block_mask, dense_mask
from instructsam.models.bridge import QueryBank, build_projector
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.detector import DetectorOutput, ImageFeatures, InstanceDetector
from instructsam.models.hub import resolve
from instructsam.models.layouts import RELEASED
from instructsam.models.loading import LoadReport
from instructsam.models.lora import has_adapter, has_lora, load_adapter, save_with_adapter
from instructsam.models.own_layout import layout_of, load_own
from instructsam.models.phrases import PhraseIndex, find_phrases
from instructsam.models.released import load_released
from instructsam.processing.hub import HUB_OPTIONS

logger = logging.getLogger(__name__)
ATTENTION = ("sdpa", "flex_attention")


@dataclass
class VisionFeatures:
    """What the VLM's vision tower makes of pictures, one after the other: takes the place of their pixels.

    Attributes:
        tokens: per picture (T, C), one row an image token.
        deepstack: per picture a list of (T, C), for the language model's first layers.
    """

    tokens: list[Tensor]
    deepstack: list[list[Tensor]]

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, indices: Sequence[int]) -> VisionFeatures:
        """The features of these pictures, in this order; one may come several times."""
        return VisionFeatures([self.tokens[k] for k in indices], [self.deepstack[k] for k in indices])


@dataclass
class LanguageOutput:
    """What the language model yields: last hidden states (B, L, C), one per layer if asked for, and the phrases."""

    hidden_BLC: Tensor
    phrases: PhraseIndex
    all_hidden: tuple[Tensor, ...] | None = None
    image_tokens: Tensor | None = None

    def query_states(self, num_layers: int) -> list[Tensor]:
        """Hidden states (P, N, C) at the queries after each of the last `num_layers` layers."""
        assert self.all_hidden is not None, "run the language model with output_hidden_states"
        rows = self.phrases.row[:, None]
        return [hidden[rows, self.phrases.queries] for hidden in self.all_hidden[-num_layers:]]


@dataclass
class BridgeOutput:
    """The language model's message to the detector, in the detector's width."""

    queries_PNC: Tensor
    phrase_features_PTC: Tensor
    phrase_mask_PT: Tensor
    phrase_image_P: Tensor

    def select(self, index: Tensor) -> BridgeOutput:
        """These phrases only."""
        return BridgeOutput(
            self.queries_PNC[index],
            self.phrase_features_PTC[index],
            self.phrase_mask_PT[index],
            self.phrase_image_P[index],
        )


@dataclass
class InstructSAMOutput:
    """Result of a forward pass: hidden states (B, L, C), the bridge's output and the detections of every phrase."""

    language: LanguageOutput
    bridge: BridgeOutput
    detections: DetectorOutput


class InstructSAMModel(PreTrainedModel):
    """Segments every instance that an instruction asks for.

    Parts: ``vlm`` (Qwen3VLModel), ``query_bank``, ``query_projector``, ``phrase_projector``, ``detector``; ``lm_head``
    exists only where the VLM's head is not tied to its embeddings.
    """

    config_class = InstructSAMConfig
    config: InstructSAMConfig
    load_report: LoadReport | None = None
    base_model_prefix = "instructsam"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InstructSAMConfig):
        super().__init__(config)
        vlm_config = config.vlm_config
        if config._attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} is not one of {', '.join(ATTENTION)}"
            )
        # A boolean mask under "eager" is silently wrong in transformers, so the language model never runs eager.
        for part in (vlm_config, vlm_config.vision_config, vlm_config.text_config):
            part._attn_implementation = "sdpa"
        self.vlm = Qwen3VLModel(vlm_config)
        if config._attn_implementation == "flex_attention":
            # Only afterwards: transformers does not offer it for this class, but its layers take a block mask.
            self.vlm.language_model.config._attn_implementation = "flex_attention"
        self.lm_head: nn.Linear | None = None
        if not vlm_config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, vlm_config.text_config.vocab_size, bias=False)
        self.query_bank = QueryBank(config.num_queries, config.hidden_size)
        self.query_projector = build_projector(config.projector, config.hidden_size, config.detector_size)
        self.phrase_projector = build_projector(config.projector, config.hidden_size, config.detector_size)
        config.detector_config._attn_implementation = "sdpa"
        self.detector = InstanceDetector(config.detector_config, config.presence_token)
        self.post_init()
        self.freeze_unused()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub repository in our own layout or in the released one; `load_report` says which it was.

        Strict, whichever it is. LoRA weights in the subfolder ``adapter`` of our own layout are put in place. Further
        arguments are transformers' own; of them the released layout takes ``dtype`` (default "auto": as stored),
        ``attn_implementation`` and ``output_loading_info``.

        Raises:
            ValueError: nothing there, not an InstructSAM; missing, unexpected or mis-shaped tensors (named).
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = resolve(pretrained_model_name_or_path, "InstructSAM", **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        if "torch_dtype" in kwargs:  # transformers' older name
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if layout_of(folder) == RELEASED.name:
            model, report = load_released(cls, folder, **kwargs)
            info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
            if int(os.environ.get("RANK", 0)) == 0:
                logger.warning("%s", report)  # not the usual case, so it is said aloud
        else:
            model, info, report = load_own(super().from_pretrained, folder, **kwargs)
            logger.info("%s", report)
            model.detector.exact_positions()
        # Loading puts new parameters in place of those that __init__ froze.
        model.freeze_unused()
        if has_adapter(folder):
            load_adapter(model, folder)
        model.load_report = report
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers' own. With LoRA, base weights and adapter are written apart, see `lora.save_with_adapter`."""
        if has_lora(self) and "state_dict" not in kwargs:
            save_with_adapter(self, save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)

    def freeze_unused(self) -> None:
        """Exclude tensors that no output depends on; they exist for the checkpoint's layout only."""
        detector = self.detector
        unused: list[nn.Module] = [
            detector.text_projection,
            detector.geometry_encoder,
            detector.mask_decoder.semantic_projection,
            detector.vision_encoder.neck.fpn_layers[-1],  # the coarsest map is dropped
        ]
        if self.config.query_mode == "replace":
            unused.append(detector.detr_decoder.query_embed)
        # Each step upwards in the pixel decoder ends at one of the maps; there is a stage more than maps to go up to.
        pixel_decoder, steps = detector.mask_decoder.pixel_decoder, detector.num_maps - 1
        unused += [*pixel_decoder.conv_layers[steps:], *pixel_decoder.norms[steps:]]
        for module in unused:
            module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QueryBank):
            seg = None
            if self.config.query_init == "seg_token":
                seg = self.get_input_embeddings().weight[self.config.token_ids["seg"]]
            module.initialise(self.config.query_init, self.config.initializer_range, seg)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of hidden states (..., C); call it only where they are needed."""
        weight = self.get_input_embeddings().weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight)

    # ---- the parts of the forward pass ---------------------------------------------------------------------------

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None, turn_ids: Tensor | None = None
    ) -> Tensor:
        """M-RoPE positions (3, B, L) int64. With independent turns, each restarts where the image prefix ends."""
        types = (input_ids == self.config.vlm_config.image_token_id).int()
        position_ids, _ = self.vlm.get_rope_index(
            input_ids, mm_token_type_ids=types, image_grid_thw=image_grid_thw, attention_mask=attention_mask.long()
        )
        if turn_ids is None:
            return position_ids
        # Text positions are equal on the three axes; the first one of every turn gives its offset.
        text_BL = position_ids[0].masked_fill(~attention_mask.bool(), torch.iinfo(torch.int64).max)
        first = torch.full((len(text_BL), int(turn_ids.max()) + 1), torch.iinfo(torch.int64).max, device=text_BL.device)
        first.scatter_reduce_(1, turn_ids, text_BL, reduce="amin")
        shift = torch.where(turn_ids > 0, first.gather(1, turn_ids) - first[:, 1:2], 0)
        return position_ids - torch.where(attention_mask.bool(), shift, 0)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (..., C) of ids (...).

        Look-ups are not autocast, and in float32 they would keep the whole residual stream there: so this does it.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        device = embeddings.device.type
        return embeddings.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embeddings

    def encode_vision(self, pixel_values: Tensor, image_grid_thw: Tensor) -> VisionFeatures:
        """Run the VLM's vision tower on the patches of some pictures."""
        vision = self.vlm.get_image_features(pixel_values, image_grid_thw)
        tokens = list(vision.pooler_output)
        lengths = [len(rows) for rows in tokens]
        # Per picture in some versions of transformers, of all pictures together in others.
        layers = [f if isinstance(f, Tensor) else torch.cat(tuple(f)) for f in vision.deepstack_features]
        split = [layer.split(lengths) for layer in layers]
        return VisionFeatures(tokens, [[layer[k] for layer in split] for k in range(len(tokens))])

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | VisionFeatures | None, image_grid_thw: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Token embeddings (B, L, C) with image features and query bank in place, image mask (B, L), deepstack maps.

        `pixel_values` are the pictures' patches, or what `encode_vision` made of them.
        Without any picture (patches of length 0) the vision tower runs on a blank one whose features are cut
        away, so that its parameters have gradients, which are zero: DDP waits for them. With None it does not run.
        """
        embeddings = self.look_up(input_ids)
        is_image = input_ids == self.config.vlm_config.image_token_id
        deepstack: list[Tensor] = []
        if pixel_values is not None:
            no_picture = not len(pixel_values)
            vision = pixel_values
            if not isinstance(vision, VisionFeatures):
                assert isinstance(pixel_values, Tensor) and image_grid_thw is not None
                if no_picture:
                    merge = self.config.vlm_config.vision_config.spatial_merge_size
                    pixel_values = pixel_values.new_zeros(merge**2, pixel_values.shape[1])
                    image_grid_thw = image_grid_thw.new_tensor([[1, merge, merge]])
                vision = self.encode_vision(pixel_values, image_grid_thw)
            features = torch.cat(vision.tokens)
            deepstack = [torch.cat(layer) for layer in zip(*vision.deepstack, strict=True)]
            if no_picture:
                features, deepstack = features[:0], [f[:0] for f in deepstack]
            if len(features) != int(is_image.sum()):
                raise ValueError(f"{int(is_image.sum())} image tokens for {len(features)} image features")
            embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        embeddings = self.query_bank(embeddings, input_ids == self.config.token_ids["seg"])
        return embeddings, is_image, deepstack

    def layout(self, input_ids: Tensor, attention_mask: Tensor, turn_ids: Tensor | None = None) -> TokenLayout:
        """What the attention rules need to know of the tokens."""
        return TokenLayout.from_tokens(
            input_ids,
            attention_mask,
            seg_token_id=self.config.token_ids["seg"],
            eos_token_id=self.config.token_ids["eos"],
            num_queries=self.config.num_queries,
            turn=turn_ids,
        )

    def run_language_model(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | VisionFeatures | None,
        image_grid_thw: Tensor | None,
        position_ids: Tensor | None = None,
        turn_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        layout: TokenLayout | None = None,
        phrases: PhraseIndex | None = None,
    ) -> LanguageOutput:
        """The VLM over a whole sequence, answer included, under the hybrid mask.

        `position_ids`, `layout` and `phrases` are read off the tokens if not given (other rules: `decoding_rules`).
        """
        attention_mask = attention_mask.bool()
        if phrases is None:
            config = self.config
            phrases = find_phrases(input_ids, config.token_ids, config.num_queries, config.max_phrase_tokens)
        embeddings, is_image, deepstack = self.embed(input_ids, pixel_values, image_grid_thw)
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask, image_grid_thw, turn_ids)
        if layout is None:
            layout = self.layout(input_ids, attention_mask, turn_ids)
        flex = self.vlm.language_model.config._attn_implementation == "flex_attention"
        build_mask = block_mask if flex else dense_mask
        output = self.vlm.language_model(
            inputs_embeds=embeddings,
            attention_mask=build_mask(self.config.attention_variant, layout),
            position_ids=position_ids,
            visual_pos_masks=is_image if deepstack else None,
            deepstack_visual_embeds=deepstack or None,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        return LanguageOutput(output.last_hidden_state, phrases, output.hidden_states, is_image)

    def project(self, query_hidden_PNC: Tensor, phrase_tokens_PTC: Tensor, phrases: PhraseIndex) -> BridgeOutput:
        """Queries and phrase tokens from the language model's width to the detector's."""
        return BridgeOutput(
            self.query_projector(query_hidden_PNC), self.phrase_projector(phrase_tokens_PTC), phrases.mask, phrases.row
        )

    def bridge(self, input_ids: Tensor, language: LanguageOutput) -> BridgeOutput:
        """Read the queries' hidden states and the phrases' features, and project both."""
        phrases = language.phrases
        rows = phrases.row[:, None]
        if self.config.phrase_features == "embeddings":
            phrase_tokens = self.get_input_embeddings()(input_ids[rows, phrases.tokens])
        else:
            phrase_tokens = language.hidden_BLC[rows, phrases.tokens]
        return self.project(language.hidden_BLC[rows, phrases.queries], phrase_tokens, phrases)

    def detect(self, features: ImageFeatures, bridge: BridgeOutput, with_aux: bool = False) -> DetectorOutput:
        """Run the detector on the projected queries of every phrase."""
        queries = bridge.queries_PNC
        if self.config.query_mode == "add":
            queries = queries + self.detector.detr_decoder.query_embed.weight
        return self.detector(
            features, bridge.phrase_image_P, queries, bridge.phrase_features_PTC, bridge.phrase_mask_PT, with_aux
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        detector_pixel_values: Tensor,
        position_ids: Tensor | None = None,
        turn_ids: Tensor | None = None,
        with_aux: bool = False,
        output_hidden_states: bool = False,
    ) -> InstructSAMOutput:
        """One pass over prompt and answer.

        Args:
            input_ids: (B, L) int64, chat with query blocks (see `processing.chat`).
            attention_mask: (B, L) bool, False = padding.
            pixel_values, image_grid_thw: the VLM's patches and grids, one image for every row with image tokens, in
                the order of rows; length 0 if there is none.
            detector_pixel_values: (images, 3, S, S) of the same images.
            position_ids: (3, B, L); computed if not given.
            turn_ids: (B, L) int64 for independent turns (see `TokenLayout.turn`).
            with_aux: detections of the earlier decoder layers too.
            output_hidden_states: hidden states of every layer of the language model too.

        Raises:
            ValueError: broken query blocks, image tokens that do not fit the images, a phrase in a row without image.
        """
        images = detector_pixel_values
        # Without any image a blank one stands in, for the same reason as in `embed`; no phrase can belong to it.
        features = self.detector.encode_image(images if len(images) else images.new_zeros(1, *images.shape[1:]))
        language = self.run_language_model(
            input_ids, attention_mask, pixel_values, image_grid_thw, position_ids, turn_ids, output_hidden_states
        )
        bridge = self.bridge(input_ids, language)
        if len(images) != len(input_ids):
            bridge.phrase_image_P = self._image_of_phrases(input_ids, language.phrases, len(images))
        if len(language.phrases):
            return InstructSAMOutput(language, bridge, self.detect(features, bridge, with_aux))
        return InstructSAMOutput(language, bridge, self._no_detections(features, language, with_aux))

    def _image_of_phrases(self, input_ids: Tensor, phrases: PhraseIndex, num_images: int) -> Tensor:
        """The image of each phrase (P,) where only some rows have one: image k is that of the k-th row with any."""
        has_image_B = (input_ids == self.config.vlm_config.image_token_id).any(-1)
        if int(has_image_B.sum()) != num_images:
            raise ValueError(f"{int(has_image_B.sum())} rows with image tokens for {num_images} images of the detector")
        if not bool(has_image_B[phrases.row].all()):
            bad = int(phrases.row[~has_image_B[phrases.row]][0])
            raise ValueError(f"batch row {bad}: a phrase in a conversation about no image")
        return (has_image_B.cumsum(0) - 1)[phrases.row]

    def _no_detections(self, features: ImageFeatures, language: LanguageOutput, with_aux: bool) -> DetectorOutput:
        """Detections of zero phrases that are still connected to every trainable parameter.

        One phantom phrase goes through bridge and detector and is cut away, so that its gradients exist and are zero:
        without it, ranks whose batch has no mask would leave the others waiting in DDP.
        """
        phantom = language.hidden_BLC.new_zeros(1, 1, self.config.hidden_size) + self.query_bank.weight[None, :1]
        queries = language.hidden_BLC[:1, :1] * 0 + self.query_bank.weight[None]
        index = PhraseIndex(
            row=torch.zeros(1, dtype=torch.long, device=queries.device),
            queries=language.phrases.queries,
            tokens=language.phrases.tokens,
            mask=torch.ones(1, 1, dtype=torch.bool, device=queries.device),
        )
        return _cut(self.detect(features, self.project(queries, phantom, index), with_aux))


def _cut(output: DetectorOutput) -> DetectorOutput:
    presence = None if output.presence_logits is None else output.presence_logits[:0]
    aux = None if output.aux is None else [_cut(layer) for layer in output.aux]
    semantic = None if output.semantic_logits is None else output.semantic_logits[:0]
    return DetectorOutput(output.pred_masks[:0], output.pred_logits[:0], output.pred_boxes[:0], presence, aux, semantic)


AutoModel.register(InstructSAMConfig, InstructSAMModel, exist_ok=True)
