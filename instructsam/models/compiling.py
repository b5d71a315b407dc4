"""torch.compile for what is large, never trains and always sees pictures of one size: SAM 3's vision encoder.

Layer by layer: layers of one kind share what is compiled, so that 32 of them take as long as two. Qwen's vision tower
is left alone, since its inputs have another length in every batch, and so is everything that trains.
"""

from __future__ import annotations

from instructsam.models.modeling import InstructSAMModel


def compile_frozen_vision(model: InstructSAMModel) -> None:
    """Have the layers of the detector's vision encoder compiled, in place; names and tensors stay as they are.

    Call it once freezing is settled and before DDP, DeepSpeed or FSDP2 wrap the model. Compilation itself happens in
    the first forward pass, and again where batch size, precision or training mode are new (a few times in a run, also
    in the first evaluation). Works with gradient checkpointing, which does nothing in frozen layers.

    Raises:
        ValueError: parameters of the encoder train (named).
    """
    encoder = model.detector.vision_encoder
    if trained := [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]:
        more = f" and {len(trained) - 3} more" if len(trained) > 3 else ""
        raise ValueError(
            "model.compile_vision is for a frozen vision encoder, but of detector.vision_encoder there train "
            f"{', '.join(trained[:3])}{more}: freeze it (optim.freeze=['detector.vision_encoder']), or set "
            "model.compile_vision=false"
        )
    for layer in encoder.backbone.layers:
        layer.compile()
