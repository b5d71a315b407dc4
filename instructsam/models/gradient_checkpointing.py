"""Gradient checkpointing: layers keep their inputs only and are run again in the backward pass (DESIGN section 8).

transformers does it for the language model and both vision towers. SAM 3's fusion encoder, decoder and pixel decoder
are not made for it there; they are what grows with the number of phrases, so they get it here.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoderLayer, Sam3DetrEncoderLayer, Sam3PixelDecoder

from instructsam.models.detector import InstanceQueryDecoderLayer


class CheckpointedEncoderLayer(GradientCheckpointingLayer, Sam3DetrEncoderLayer):
    """A layer of the fusion encoder."""


class CheckpointedQueryDecoderLayer(GradientCheckpointingLayer, InstanceQueryDecoderLayer):
    """A layer of the decoder over the instance queries alone."""


class CheckpointedDecoderLayer(GradientCheckpointingLayer, Sam3DetrDecoderLayer):
    """A layer of the decoder with the presence token."""


class CheckpointedPixelDecoder(GradientCheckpointingLayer, Sam3PixelDecoder):
    """The upsampling to mask resolution: few weights, and the largest maps of all."""


CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {
    Sam3DetrEncoderLayer: CheckpointedEncoderLayer,
    InstanceQueryDecoderLayer: CheckpointedQueryDecoderLayer,
    Sam3DetrDecoderLayer: CheckpointedDecoderLayer,
    Sam3PixelDecoder: CheckpointedPixelDecoder,
}


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Switch it on for every layer of an InstructSAM, in place; it acts in training mode. Calling it again is harmless.

    Tensors, names and results stay the same. Layers of frozen towers whose inputs need no gradient record nothing, so
    they are not run a second time.
    """
    for module in model.modules():
        if type(module) in CHECKPOINTED:
            module.__class__ = CHECKPOINTED[type(module)]
    model.disable_input_require_grads()
    # Renamed in transformers 5.2x, with a warning under the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers makes the outputs of all embeddings require gradients, which only reentrant checkpointing needs: here
    # it would send gradients through the frozen vision towers.
    model.disable_input_require_grads()
