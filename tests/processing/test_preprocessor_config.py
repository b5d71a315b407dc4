"""Qwen's image processor settings: read, written, and the same pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from instructsam.processing.images import VLMImageTransform

GREY_LEVELS = 127.5  # one unit of the normalised range
HUB = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
"""The file of Qwen3-VL-2B-Instruct."""


def waves(height: int, width: int) -> Image.Image:
    """Smooth structure, which resampling filters agree about."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [127 + 100 * np.sin(x / 9) * np.cos(y / 7), 255 * x / width, 255 * y / height]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def both(folder: Path, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches by our transform and by transformers' processor, of the same folder."""
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt")
    ours, grid = VLMImageTransform.from_preprocessor_config(folder)(image)
    assert torch.equal(grid, theirs["image_grid_thw"][0])
    return ours, theirs["pixel_values"]


def test_settings_of_the_hub():
    assert VLMImageTransform.from_preprocessor_config(HUB) == VLMImageTransform(
        patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=65536, max_pixels=16777216, mean=0.5, std=0.5
    )
    limited = VLMImageTransform.from_preprocessor_config(HUB, max_pixels=8192 * 32 * 32)
    assert limited == VLMImageTransform()


def test_folder(qwen3_vl_dir: Path, tmp_path: Path):
    found = VLMImageTransform.from_preprocessor_config(qwen3_vl_dir)
    assert (found.patch_size, found.min_pixels, found.max_pixels) == (8, 64 * 64, 256 * 256)
    with pytest.raises(ValueError, match=f"{tmp_path}: no preprocessor_config.json there"):
        VLMImageTransform.from_preprocessor_config(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": HUB}))
    assert VLMImageTransform.from_preprocessor_config(str(tmp_path)).max_pixels == 16777216
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json: not valid JSON"):
        VLMImageTransform.from_preprocessor_config(tmp_path)


def test_a_folder_with_only_our_processor_has_no_such_settings(checkpoint: Path):
    with pytest.raises(ValueError, match="nor image settings in a processor_config.json"):
        VLMImageTransform.from_preprocessor_config(checkpoint)


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (240, 160)])
def test_pictures_that_fit_give_the_same_pixels(qwen3_vl_dir: Path, size: tuple[int, int]):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours, theirs = both(qwen3_vl_dir, Image.fromarray(noise))
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(100, 90), (500, 333), (40, 50)])
def test_resized_pictures_differ_by_rounding_only(qwen3_vl_dir: Path, size: tuple[int, int]):
    """Pillow's bicubic filter and torch's round differently: at most 3 grey levels, hardly ever more than 1."""
    ours, theirs = both(qwen3_vl_dir, waves(*size))
    difference = (ours - theirs).abs() * GREY_LEVELS
    assert difference.max() <= 3.01
    assert (difference > 1.01).float().mean() < 0.01


def test_older_files_with_pixel_limits():
    older = {key: value for key, value in HUB.items() if key != "size"}
    found = VLMImageTransform.from_preprocessor_config({**older, "min_pixels": 3136, "max_pixels": 12845056})
    assert (found.min_pixels, found.max_pixels) == (3136, 12845056)
    found = VLMImageTransform.from_preprocessor_config({**HUB, "min_pixels": None, "max_pixels": 5000000})
    assert (found.min_pixels, found.max_pixels) == (65536, 5000000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": [0.48, 0.45, 0.4]}, r"image_mean is \[0.48, 0.45, 0.4\], but .* one value for all channels"),
        ({"image_std": [0.2, 0.2, 0.3]}, "image_std is .* one value for all channels"),
        ({"image_std": None}, "image_std is None, but one number per channel"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784.* 1/255"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"patch_size": None}, "patch_size is None, but an integer"),
        ({"merge_size": 2.5}, "merge_size is 2.5"),
        ({"size": {"shortest_edge": 5}}, "longest_edge"),
        ({"size": {"height": 224, "width": 224}}, "shortest_edge"),
        ({"size": {"shortest_edge": 500, "longest_edge": 400}}, "min_pixels <= max_pixels"),
    ],
)
def test_what_cannot_be_expressed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VLMImageTransform.from_preprocessor_config({**HUB, **change})


def test_missing_entries_are_named():
    for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "size"):
        lacking = {name: value for name, value in HUB.items() if name != key}
        with pytest.raises(ValueError, match=f"preprocessor config: {key} is missing"):
            VLMImageTransform.from_preprocessor_config(lacking)


def test_round_trip_through_transformers_own_class(tmp_path: Path):
    transform = VLMImageTransform(8, 4, 1, min_pixels=2000, max_pixels=90000, mean=0.4, std=0.3)
    written = transform.to_preprocessor_config()
    assert VLMImageTransform.from_preprocessor_config(json.loads(json.dumps(written))) == transform
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    ours, theirs = both(tmp_path, waves(96, 64))
    assert (ours - theirs).abs().max() <= 1e-5
    Qwen2VLImageProcessorPil.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert VLMImageTransform.from_preprocessor_config(tmp_path / "again") == transform
