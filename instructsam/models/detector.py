"""SAM 3's image detector with its queries given from outside (DESIGN section 4, "Detector").

Every module is one of transformers' SAM 3 classes under the name it has there; only the decoder is subclassed, to take
the projected instance queries and to run without the presence token. Phrases of a whole batch lie on one axis.

Shape suffixes: B images, P phrases, N queries, T phrase tokens, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.sam3.configuration_sam3 import Sam3Config
from transformers.models.sam3.modeling_sam3 import (
    Sam3DetrDecoder,
    Sam3DetrDecoderLayer,
    Sam3DetrEncoder,
    Sam3DotProductScoring,
    Sam3GeometryEncoder,
    Sam3MaskDecoder,
    Sam3PreTrainedModel,
    Sam3VisionModel,
    box_cxcywh_to_xyxy,
    inverse_sigmoid,
)


@dataclass
class ImageFeatures:
    """FPN maps of a batch of images, finest first, (B, C, H, W) each, and the position encoding of the last one."""

    maps: list[Tensor]
    position: Tensor

    def select(self, index_P: Tensor) -> ImageFeatures:
        """Those of image ``index_P[p]`` for every phrase p: (P, C, H, W) each."""
        return ImageFeatures([m[index_P] for m in self.maps], self.position[index_P])


@dataclass
class DetectorOutput:
    """Detections per phrase.

    Attributes:
        pred_masks: (P, N, H, W) mask logits.
        pred_logits: (P, N) class logits, clamped to ±12.
        pred_boxes: (P, N, 4) xyxy in 0…1.
        presence_logits: (P, 1) or None without the presence token.
        aux: the same of the earlier decoder layers, if asked for.
        semantic_logits: with them, (P, H, W) logits of SAM 3's semantic head: is the pixel of any instance?
    """

    pred_masks: Tensor
    pred_logits: Tensor
    pred_boxes: Tensor
    presence_logits: Tensor | None = None
    aux: list[DetectorOutput] | None = None
    semantic_logits: Tensor | None = None


class InstanceQueryDecoderLayer(Sam3DetrDecoderLayer):
    """A decoder layer over the instance queries alone; SAM 3's own expects the presence token in front of them."""

    def forward(  # noqa: D102 (as the parent's)
        self,
        hidden_states,
        query_pos,
        text_features,
        vision_features,
        vision_pos_encoding,
        text_cross_attn_mask=None,
        vision_cross_attn_mask=None,
        **kwargs,
    ):
        def attend(name, states, key, value, mask):
            attended, _ = getattr(self, name)(
                query=states + query_pos, key=key, value=value, attention_mask=mask, **kwargs
            )
            dropout, norm = getattr(self, f"{name}_dropout"), getattr(self, f"{name}_layer_norm")
            return norm(states + dropout(attended))

        x = attend("self_attn", hidden_states, hidden_states + query_pos, hidden_states, None)
        x = attend("text_cross_attn", x, text_features, text_features, text_cross_attn_mask)
        x = attend(
            "vision_cross_attn", x, vision_features + vision_pos_encoding, vision_features, vision_cross_attn_mask
        )
        return self.mlp_layer_norm(x + self.mlp_dropout(self.mlp(x)))


class InstanceQueryDecoder(Sam3DetrDecoder):
    """SAM 3's decoder fed with queries from outside, with or without the presence token.

    ``query_embed`` keeps its N rows, so that the released layout loads; it is read in query mode ``add`` and as the
    stand-in when no queries are given. ``reference_points`` are the N learned boxes of SAM 3.
    """

    def __init__(self, config, presence_token: bool):
        super().__init__(config)
        self.has_presence_token = presence_token
        if not presence_token:
            for layer in self.layers:
                layer.__class__ = InstanceQueryDecoderLayer
            del self.presence_token, self.presence_head, self.presence_layer_norm

    def forward(
        self,
        queries_PNC: Tensor,
        vision_features: Tensor,
        text_features: Tensor,
        vision_pos_encoding: Tensor,
        text_mask: Tensor | None,
        spatial_shape: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decode.

        Args:
            queries_PNC: instance queries.
            vision_features, vision_pos_encoding: (P, H·W, C) from the fusion encoder.
            text_features: (P, T, C).
            text_mask: (P, T) bool, True = token, or None.
            spatial_shape: (H, W) of the fusion encoder's map.

        Returns:
            Per layer: hidden states (layers, P, N, C), refined boxes (layers, P, N, 4) cxcywh in 0…1, and presence
            logits (layers, P, 1) or None.
        """
        skip = int(self.has_presence_token)
        # Boxes are refined in float32 whatever the weights: bfloat16 tells 1/256 of the picture apart, no less.
        points = self.reference_points.weight
        boxes = points.float().sigmoid().expand(queries_PNC.shape[0], -1, -1)
        states = queries_PNC
        if self.has_presence_token:
            token = self.presence_token.weight.expand(queries_PNC.shape[0], 1, -1).to(states.dtype)
            states = torch.cat([token, states], dim=1)
        text_attention = None
        if text_mask is not None:
            text_attention = create_bidirectional_mask(
                config=self.config, inputs_embeds=states, attention_mask=text_mask, encoder_hidden_states=text_features
            )

        all_states, all_boxes, all_presence = [], [], []
        for layer in self.layers:
            query_pos = self.ref_point_head(self.position_encoding.encode_boxes(boxes).to(states.dtype))
            bias = self._get_rpb_matrix(boxes.to(points.dtype), spatial_shape).to(states.dtype)
            states = layer(
                states,
                query_pos=query_pos,
                text_features=text_features,
                vision_features=vision_features,
                vision_pos_encoding=vision_pos_encoding,
                text_cross_attn_mask=text_attention,
                # The presence token attends everywhere alike.
                vision_cross_attn_mask=F.pad(bias, (0, 0, skip, 0)),
            )
            normed = self.output_layer_norm(states[:, skip:])
            refined = (self.box_head(normed).float() + inverse_sigmoid(boxes)).sigmoid()
            boxes = refined.detach()
            all_states.append(normed)
            all_boxes.append(refined)
            if self.has_presence_token:
                logit = self.presence_head(self.presence_layer_norm(states[:, :1])).squeeze(-1)
                limit = self.clamp_presence_logit_max_val
                all_presence.append(logit.clamp(-limit, limit))
        presence = torch.stack(all_presence) if all_presence else None
        return torch.stack(all_states), torch.stack(all_boxes), presence


class InstanceDetector(Sam3PreTrainedModel):
    """SAM 3's detector without its text encoder: image features, phrase features and queries in, instances out.

    ``text_projection`` (unused: it maps CLIP features, which do not exist here) and ``geometry_encoder`` (box prompts)
    stay, so that checkpoints load and export tensor by tensor.
    """

    def __init__(self, config: Sam3Config, presence_token: bool = False):
        super().__init__(config)
        for part in ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder"):
            getattr(config, f"{part}_config")._attn_implementation = config._attn_implementation
        self.vision_encoder = Sam3VisionModel(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.detr_encoder_config.hidden_size)
        self.geometry_encoder = Sam3GeometryEncoder(config.geometry_encoder_config)
        self.detr_encoder = Sam3DetrEncoder(config.detr_encoder_config)
        self.detr_decoder = InstanceQueryDecoder(config.detr_decoder_config, presence_token)
        self.mask_decoder = Sam3MaskDecoder(config.mask_decoder_config)
        self.dot_product_scoring = Sam3DotProductScoring(config)
        self.post_init()

    @property
    def num_maps(self) -> int:
        """Feature maps in use: all of the neck's but the coarsest."""
        return len(self.vision_encoder.neck.fpn_layers) - 1

    def exact_positions(self) -> None:
        """Have the vision encoder's position tables in float32, whatever the precision of the weights.

        transformers casts them with the weights when it loads; in bfloat16 positions would be off by up to 1/16 patch.
        """
        for layer in self.vision_encoder.backbone.layers:
            if hasattr(layer, "precompute_positions"):
                exact = layer.precompute_positions(layer.config, layer.window_size)
                layer.position_ids = layer.position_ids.float().copy_(exact)

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """Vision encoder and neck. pixel_values (B, 3, S, S) → maps (B, C, H, W); the neck's coarsest map is unused."""
        trainable = any(p.requires_grad for p in self.vision_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            output = self.vision_encoder(pixel_values.to(self.dtype))
        return ImageFeatures(list(output.fpn_hidden_states[:-1]), output.fpn_position_encoding[-2])

    def forward(
        self,
        features: ImageFeatures,
        phrase_image_P: Tensor,
        queries_PNC: Tensor,
        phrase_features_PTC: Tensor,
        phrase_mask_PT: Tensor | None,
        with_aux: bool = False,
    ) -> DetectorOutput:
        """Detect the instances of every phrase.

        Args:
            features: of the B images.
            phrase_image_P: int64, the image of each phrase.
            queries_PNC: projected instance queries.
            phrase_features_PTC: they play the role of SAM 3's text features.
            phrase_mask_PT: bool, True = token; None = all are.
            with_aux: also give the detections of the earlier decoder layers and the semantic logits.
        """
        per_phrase = features.select(phrase_image_P)
        height, width = per_phrase.maps[-1].shape[-2:]
        fused = self.detr_encoder(
            vision_features=[per_phrase.maps[-1]],
            text_features=phrase_features_PTC,
            vision_pos_embeds=[per_phrase.position.to(phrase_features_PTC.dtype)],
            text_mask=phrase_mask_PT,
        )
        states, boxes, presence = self.detr_decoder(
            queries_PNC,
            vision_features=fused.last_hidden_state,
            text_features=phrase_features_PTC,
            vision_pos_encoding=fused.pos_embeds_flattened,
            text_mask=phrase_mask_PT,
            spatial_shape=(height, width),
        )
        logits = self.dot_product_scoring(states, phrase_features_PTC, phrase_mask_PT).squeeze(-1)
        embedded_PCHW = self._pixel_embeddings(per_phrase, fused.last_hidden_state, phrase_features_PTC, phrase_mask_PT)
        pixels_PCHW = self.mask_decoder.instance_projection(embedded_PCHW)

        def output(layer: int) -> DetectorOutput:
            masks = torch.einsum("pnc,pchw->pnhw", self.mask_decoder.mask_embedder(states[layer]), pixels_PCHW)
            presence_P1 = None if presence is None else presence[layer]
            return DetectorOutput(masks, logits[layer], box_cxcywh_to_xyxy(boxes[layer]), presence_P1)

        last = output(-1)
        if with_aux:
            last.aux = [output(layer) for layer in range(len(states) - 1)]
            last.semantic_logits = self.mask_decoder.semantic_projection(embedded_PCHW)[:, 0]
        return last

    def _pixel_embeddings(
        self, per_phrase: ImageFeatures, fused: Tensor, phrase_features_PTC: Tensor, phrase_mask_PT: Tensor | None
    ) -> Tensor:
        """Pixel embeddings (P, C, H, W) that the mask heads read; the same for all decoder layers."""
        decoder = self.mask_decoder
        normed = decoder.prompt_cross_attn_norm(fused)
        mask = None
        if phrase_mask_PT is not None:
            mask = create_bidirectional_mask(
                config=decoder.config,
                inputs_embeds=normed,
                attention_mask=phrase_mask_PT,
                encoder_hidden_states=phrase_features_PTC,
            )
        attended, _ = decoder.prompt_cross_attn(
            query=normed, key=phrase_features_PTC, value=phrase_features_PTC, attention_mask=mask
        )
        fused = fused + decoder.prompt_cross_attn_dropout(attended)
        return decoder._embed_pixels(per_phrase.maps, fused)
