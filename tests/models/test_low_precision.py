"""The model in bfloat16 and float16, and training under bfloat16 autocast, beside float32.

The bounds are about three times what was measured on the golden model, and tell the next coarser precision apart:
`test_the_bounds_notice_coarse_weights` exceeds every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from golden_fixtures import GOLDEN_ROOT
from golden_model import load_golden
from test_training_golden import golden_batch
from torch import Tensor

from instructsam.losses.criterion import SetCriterion
from instructsam.models.decoding import decode
from instructsam.models.modeling import InstructSAMModel
from instructsam.training.objectives import InstructionObjective

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "detector_pixel_values")
# One block of every part whose own arithmetic must happen in the lower precision.
BLOCKS = {
    "vision tower": "vlm.visual.blocks.0.mlp",
    "language model": "vlm.language_model.layers.0.mlp",
    "last language layer": "vlm.language_model.layers.1",
    "query projector": "query_projector",
    "detector's vision encoder": "detector.vision_encoder.backbone.layers.0.mlp",
    "fusion encoder": "detector.detr_encoder.layers.0.mlp",
    "decoder": "detector.detr_decoder.layers.0.mlp",
}


@dataclass(frozen=True)
class Bounds:
    """Largest relative L2 error (hidden states, masks), absolute error (scores, boxes), share of flipped pixels."""

    hidden: float
    masks: float
    scores: float
    boxes: float
    flipped: float


BOUNDS = {
    torch.bfloat16: Bounds(hidden=0.06, masks=0.08, scores=0.01, boxes=0.012, flipped=0.03),
    torch.float16: Bounds(hidden=0.007, masks=0.009, scores=0.0015, boxes=0.0014, flipped=0.0035),
}
dtypes = pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(scope="module")
def golden_a():
    return load_golden(GOLDEN_ROOT / "a")


@pytest.fixture(scope="module")
def folder(golden_a, tmp_path_factory):
    """The golden model as a checkpoint, from which it is loaded in every precision."""
    path = tmp_path_factory.mktemp("precision")
    golden_a[0].save_pretrained(path)
    return path


@torch.no_grad()
def one_pass(model, tensors):
    return model(*(tensors[name].to(model.device) for name in INPUTS))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float().cpu() - expected).norm() / expected.norm())


def errors(language, detections, expected_language, expected) -> dict[str, float]:
    """What `Bounds` bounds; also checks that everything is finite."""
    values = (language.hidden_BLC, detections.pred_masks, detections.pred_logits, detections.pred_boxes)
    assert all(bool(value.isfinite().all()) for value in values)
    masks, boxes = detections.pred_masks.float().cpu(), detections.pred_boxes.float().cpu()
    scores = detections.pred_logits.float().cpu().sigmoid()
    return {
        "hidden": relative(language.hidden_BLC, expected_language.hidden_BLC),
        "masks": relative(masks, expected.pred_masks),
        "scores": float((scores - expected.pred_logits.sigmoid()).abs().max()),
        "boxes": float((boxes - expected.pred_boxes).abs().max()),
        "flipped": float(((masks > 0) != (expected.pred_masks > 0)).float().mean()),
    }


def check(found: dict[str, float], bounds: Bounds) -> None:
    too_large = {name: value for name, value in found.items() if value > getattr(bounds, name)}
    assert not too_large, f"beyond {bounds}: {too_large}"


def watch(model) -> dict[str, torch.dtype]:
    """Fills itself with the output precision of every block of `BLOCKS` while the model runs."""
    seen: dict[str, torch.dtype] = {}

    def hook(name):
        def record(module, args, output):
            seen[name] = (output if isinstance(output, Tensor) else output[0]).dtype

        return record

    for name, path in BLOCKS.items():
        model.get_submodule(path).register_forward_hook(hook(name))
    return seen


@dtypes
@devices
def test_single_pass(golden_a, folder, dtype, device):
    reference, _, tensors = golden_a
    model = InstructSAMModel.from_pretrained(folder, dtype=dtype).to(device)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tables = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert any("inv_freq" in name for name in tables) and any("position_ids" in name for name in tables)
    assert not {name: buffer.dtype for name, buffer in tables.items() if buffer.dtype != torch.float32}
    seen = watch(model)
    output, expected = one_pass(model, tensors), one_pass(reference, tensors)
    assert seen == dict.fromkeys(BLOCKS, dtype)
    check(errors(output.language, output.detections, expected.language, expected.detections), BOUNDS[dtype])


def decode_forced(model, meta, tensors, rule):
    """Decode the fixture's sample 0, its answer given token by token; returns (decoded, detections)."""
    answer = [*tensors["released_decode.tokens"].flatten().tolist(), meta["tokens"]["eos"]]
    prompt = tensors["input_ids"][:1, : int((tensors["labels"][0] != -100).nonzero()[0])]
    decoded = decode(
        model,
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        tensors["pixel_values"][: int(tensors["image_grid_thw"][0].prod())],
        tensors["image_grid_thw"][:1],
        choose=lambda step, logits: torch.tensor([answer[step]], device=logits.device),
        rule=rule,
    )
    features = model.detector.encode_image(tensors["detector_pixel_values"][:1])
    return decoded, model.detect(features, model.bridge(decoded.input_ids, decoded.language))


@pytest.mark.parametrize("rule", ["trained", "released"])
@dtypes
@devices
@torch.no_grad()
def test_decoding(golden_a, folder, dtype, device, rule):
    """A forced answer in steps gives the hidden states and masks that float32 gives."""
    reference, meta, tensors = golden_a
    expected_decoded, expected = decode_forced(reference, meta, tensors, rule)
    model = InstructSAMModel.from_pretrained(folder, dtype=dtype).to(device)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    decoded, detections = decode_forced(model, meta, moved, rule)
    assert torch.equal(decoded.input_ids.cpu(), expected_decoded.input_ids)
    check(errors(decoded.language, detections, expected_decoded.language, expected), BOUNDS[dtype])


@dtypes
@devices
@torch.no_grad()
def test_detector_alone(golden_a, folder, dtype, device):
    """The detector on the same queries and phrases, so that its own error is seen by itself."""
    reference, _, tensors = golden_a
    expected = one_pass(reference, tensors)
    model = InstructSAMModel.from_pretrained(folder, dtype=dtype).to(device)
    features = model.detector.encode_image(tensors["detector_pixel_values"].to(device))
    assert {level.dtype for level in features.maps} == {dtype}
    bridge = expected.bridge
    detections = model.detector(
        features,
        bridge.phrase_image_P.to(device),
        bridge.queries_PNC.to(device, dtype),
        bridge.phrase_features_PTC.to(device, dtype),
        bridge.phrase_mask_PT.to(device),
    )
    assert detections.pred_boxes.dtype == torch.float32, "boxes are refined in float32"
    bounds = BOUNDS[dtype]
    check(
        errors(expected.language, detections, expected.language, expected.detections),
        Bounds(bounds.hidden, bounds.masks, bounds.scores, bounds.boxes / 2, bounds.flipped),
    )


@dtypes
def test_the_bounds_notice_coarse_weights(golden_a, folder, dtype):
    """Weights of three mantissa bits in place of bfloat16's seven, or seven for float16's ten: beyond the bounds."""
    reference, _, tensors = golden_a
    model = InstructSAMModel.from_pretrained(folder, dtype=dtype)
    coarse = {torch.bfloat16: torch.float8_e4m3fn, torch.float16: torch.bfloat16}[dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(coarse).to(dtype)
    output, expected = one_pass(model, tensors), one_pass(reference, tensors)
    found = errors(output.language, output.detections, expected.language, expected.detections)
    within = {name: value for name, value in found.items() if value <= getattr(BOUNDS[dtype], name)}
    assert not within


# ---- training -------------------------------------------------------------------------------------------------------


def losses_and_gradients(model, meta, tensors, device, autocast: torch.dtype | None):
    """Loss terms and, part by part, the gradient of their sum as one vector."""
    model.zero_grad(set_to_none=True)
    objective = InstructionObjective(model, SetCriterion())
    batch = {name: value.to(device) for name, value in golden_batch(meta, tensors, model.config.mask_size).items()}
    counts = {name: torch.tensor(value, device=device) for name, value in objective.count_units(batch).items()}
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        terms = objective(batch, counts)
    sum(terms.values()).backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), name
            depth = 2 if name.startswith(("vlm.", "detector.")) else 1
            parts.setdefault(".".join(name.split(".")[:depth]), []).append(parameter.grad.flatten().cpu())
    return {name: float(term.detach()) for name, term in terms.items()}, {k: torch.cat(v) for k, v in parts.items()}


@devices
def test_training_under_autocast(device):
    model, meta, tensors = load_golden(GOLDEN_ROOT / "a")
    model.to(device)
    expected_terms, expected = losses_and_gradients(model, meta, tensors, device, None)
    seen = watch(model)
    terms, gradients = losses_and_gradients(model, meta, tensors, device, torch.bfloat16)
    assert seen == dict.fromkeys(BLOCKS, torch.bfloat16)
    assert terms == pytest.approx(expected_terms, rel=0.005)
    assert {"vlm.visual", "vlm.language_model", "query_bank", "query_projector", "phrase_projector"} <= set(gradients)
    assert {"detector.detr_encoder", "detector.detr_decoder", "detector.mask_decoder"} <= set(gradients)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        cosine = float(torch.nn.functional.cosine_similarity(gradient, expected[name], dim=0))
        assert cosine > 0.99, f"{name}: the gradient's cosine with float32's is {cosine:.3f}"
        assert float(gradient.norm()) == pytest.approx(float(expected[name].norm()), rel=0.05), name


@torch.no_grad()
def test_decoding_under_autocast():
    """As an evaluation during training runs: the residual stream of written steps is in the lower precision too."""
    model, _, tensors = load_golden(GOLDEN_ROOT / "a")
    start = int((tensors["labels"][0] != -100).nonzero()[0])
    prompt, grid = tensors["input_ids"][:1, :start], tensors["image_grid_thw"][:1]
    pixels = tensors["pixel_values"][: int(grid.prod())]
    seen: list[tuple[int, torch.dtype]] = []
    model.vlm.language_model.layers[-1].register_forward_hook(
        lambda module, args, output: seen.append((args[0].shape[1], args[0].dtype))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode(model, prompt, torch.ones_like(prompt, dtype=torch.bool), pixels, grid, max_new_tokens=4)
    assert len(seen) > 1 and seen[0] == (start, torch.bfloat16)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
