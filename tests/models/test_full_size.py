"""The full-size model, on the meta device, against the released checkpoint's names and shapes (DESIGN section 11)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from instructsam.models.full_size import full_size_config
from instructsam.models.layouts import QWEN3_VL, RELEASED, SAM3
from instructsam.models.loading import empty_model
from instructsam.models.modeling import InstructSAMModel

NAMES = Path(__file__).parents[1] / "golden" / "released_tensors.json"


@pytest.fixture(scope="module")
def released() -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in json.loads(NAMES.read_text()).items()}


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[int, ...]]:
    model = empty_model(InstructSAMModel, full_size_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_list_is_whole(released):
    assert len(released) == 1704


def test_export_gives_exactly_the_released_names_and_shapes(released, ours):
    assert {RELEASED.to_theirs(name): shape for name, shape in ours.items()} == released


def test_import_gives_exactly_our_names_and_shapes(released, ours):
    assert {RELEASED.to_ours(name): shape for name, shape in released.items()} == ours


def test_the_map_is_its_own_inverse(released, ours):
    assert all(RELEASED.to_theirs(RELEASED.to_ours(name) or "") == name for name in released)
    assert all(RELEASED.to_ours(RELEASED.to_theirs(name) or "") == name for name in ours)


def test_the_parts_cover_everything_but_the_bridge(ours):
    """What Qwen3-VL and SAM 3 do not bring is exactly what assembly may initialise."""
    new = {name for name in ours if QWEN3_VL.to_theirs(name) is None and SAM3.to_theirs(name) is None}
    layers = [f"{part}.{layer}.{kind}" for part in ("query_projector", "phrase_projector") for layer in (0, 2)
              for kind in ("weight", "bias")]  # fmt: skip
    assert new == {"query_bank.weight", *layers}


def test_qwen3_vl_and_sam3_themselves_have_these_names(ours):
    """Against transformers' own classes, whose names the hub's files carry."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
    from transformers.models.sam3_video.configuration_sam3_video import Sam3VideoConfig
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoModel

    with torch.device("meta"):
        vlm = Qwen3VLForConditionalGeneration(full_size_config().vlm_config)
        sam3 = Sam3VideoModel(Sam3VideoConfig())
    found: dict[str, tuple[int, ...]] = {}
    for model, layout in ((vlm, QWEN3_VL), (sam3, SAM3)):
        for name, tensor in model.state_dict().items():
            our_name = layout.to_ours(name)
            if our_name in ours:
                found[our_name] = tuple(tensor.shape)
            else:
                assert layout.ignored_by(name) is not None, name
    bridge = {name for name in ours if name.startswith(("query_", "phrase_"))}
    assert set(found) == set(ours) - bridge
    different = {name for name, shape in found.items() if shape != ours[name]}
    assert different == {f"detector.detr_decoder.{name}.weight" for name in ("query_embed", "reference_points")}
    assert all(found[name] == (200, *ours[name][1:]) for name in different)
