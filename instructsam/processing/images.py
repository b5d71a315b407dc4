"""Images in, pixel tensors out: the transforms of both vision towers (DESIGN section 4).

Only Pillow and torch are needed. Resizing is done by torch on uint8, which gives the same pixels as torchvision's
backend of the original image processors.

Shapes: H W pixels of the picture, T patches, C channels (3), S side of the detector's square input.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from instructsam.processing.image_files import MAX_ASPECT_RATIO
from instructsam.processing.preprocessor_config import config_of, read_preprocessor_config, settings_of


@dataclass(frozen=True)
class VLMImageTransform:
    """Picture → patches for Qwen3-VL's vision tower, at native aspect ratio.

    The picture is resized to the nearest multiples of ``patch_size * merge_size`` whose area lies between
    ``min_pixels`` and ``max_pixels`` (the upper default is the training limit of 8,192 visual tokens of 32x32 pixels,
    DESIGN section 8), normalised with one ``mean`` and ``std`` for all channels, and cut into patches that are ordered
    merge window by merge window. A still picture is repeated ``temporal_patch_size`` times.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 256 * 256
    max_pixels: int = 8192 * 32 * 32
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if min(self.patch_size, self.merge_size, self.temporal_patch_size) < 1:
            raise ValueError("patch_size, merge_size and temporal_patch_size must be at least 1")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}")
        if self.max_pixels < self.factor**2:
            raise ValueError(
                f"max_pixels {self.max_pixels} is less than one token of {self.factor}x{self.factor} pixels"
            )

    @classmethod
    def from_preprocessor_config(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any
    ) -> VLMImageTransform:
        """The transform that a Qwen-VL folder asks for in its preprocessor_config.json.

        Args:
            source: folder, or the configuration itself.
            overrides: arguments of this class that go before the configuration's (``max_pixels`` for instance).

        Raises:
            ValueError: no such file, an entry is missing or asks for something that this transform does not do
                (names it).
        """
        values, where = (
            (source, "preprocessor config") if isinstance(source, Mapping) else read_preprocessor_config(source)
        )
        return cls(**{**settings_of(values, where), **overrides})

    def to_preprocessor_config(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that lets Qwen-VL's own image processor do the same."""
        return config_of(asdict(self))

    @property
    def factor(self) -> int:
        """Pixels along the side of one visual token."""
        return self.patch_size * self.merge_size

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size is resized to; multiples of ``factor``.

        Raises:
            ValueError: if the picture has no pixels or is thinner than 1:200.
        """
        if min(height, width) < 1:
            raise ValueError(f"a picture of {height}x{width} pixels is empty")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"a picture of {height}x{width} pixels is thinner than 1:{MAX_ASPECT_RATIO}, crop it first"
            )
        factor = self.factor
        new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
        if new_h * new_w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_h = max(factor, math.floor(height / shrink / factor) * factor)
            new_w = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_h * new_w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_h = math.ceil(height * grow / factor) * factor
            new_w = math.ceil(width * grow / factor) * factor
        return new_h, new_w

    def grid_thw(self, height: int, width: int) -> torch.Tensor:
        """(3,) int64: frames (1), rows and columns of patches that a picture of this size is cut into."""
        new_h, new_w = self.target_size(height, width)
        return torch.tensor([1, new_h // self.patch_size, new_w // self.patch_size])

    def num_tokens(self, height: int, width: int) -> int:
        """Positions that a picture of this size takes in the language model's sequence."""
        return int(self.grid_thw(height, width).prod()) // self.merge_size**2

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """RGB picture → ``pixel_values`` (T, 3 * temporal * patch * patch) float32 and ``grid_thw`` (3,) int64.

        T = grid_thw.prod(), counted before merging.
        """
        pixels_CHW = _resize(_pixels(image), self.target_size(image.height, image.width), mode="bicubic")
        normalised_CHW = (pixels_CHW.float() - 255 * self.mean) / (255 * self.std)
        patch, merge, time = self.patch_size, self.merge_size, self.temporal_patch_size
        rows, columns = pixels_CHW.shape[1] // patch, pixels_CHW.shape[2] // patch
        windows = normalised_CHW.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        # → window row, window column, row and column inside the window, channel, pixel row, pixel column
        patches = windows.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        patches = patches.expand(*patches.shape[:5], time, patch, patch)
        return patches.reshape(rows * columns, 3 * time * patch * patch), self.grid_thw(image.height, image.width)


@dataclass(frozen=True)
class DetectorImageTransform:
    """Picture → (3, S, S) float32 in -1…1 for SAM 3's vision encoder: squashed to a square, aspect ratio not kept."""

    size: int = 1008

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB picture of any size → (3, S, S) float32."""
        pixels_CHW = _resize(_pixels(image), (self.size, self.size), mode="bilinear")
        return (pixels_CHW.float() - 127.5) / 127.5


def _pixels(image: Image.Image) -> torch.Tensor:
    """RGB picture → (3, H, W) uint8."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, got mode {image.mode}: pass it through load_image first")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # np.array copies: torch wants writable memory


def _resize(pixels_CHW: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Antialiased resize on uint8; a picture that already has this (height, width) comes back untouched."""
    if tuple(pixels_CHW.shape[1:]) == size:
        return pixels_CHW
    return F.interpolate(pixels_CHW[None], size=size, mode=mode, antialias=True, align_corners=False)[0]
