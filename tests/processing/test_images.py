"""Reading pictures and the pixel transforms of both vision towers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from turned_pictures import STORED, save_turned

from instructsam.errors import DataError
from instructsam.processing.image_files import load_image
from instructsam.processing.images import DetectorImageTransform, VLMImageTransform

GREY_LEVELS = 127.5  # one unit of the normalised range


def smooth_picture(height: int, width: int) -> Image.Image:
    """Waves and ramps: what resampling filters agree about, unlike noise."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [127 + 100 * np.sin(x / 9) * np.cos(y / 7), 255 * x / width, 255 * y / height]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def noise_picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_patches(image: Image.Image, transform: VLMImageTransform) -> tuple[torch.Tensor, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil(
        patch_size=transform.patch_size,
        merge_size=transform.merge_size,
        temporal_patch_size=transform.temporal_patch_size,
        min_pixels=transform.min_pixels,
        max_pixels=transform.max_pixels,
        image_mean=[transform.mean] * 3,
        image_std=[transform.std] * 3,
    )
    output = processor(images=[image], return_tensors="pt")
    return output["pixel_values"], output["image_grid_thw"][0]


class TestLoadImage:
    @pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "P", "LA", "RGBA", "I;16"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str):
        path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
        if mode == "I;16":
            Image.fromarray(np.full((20, 30), 65535, dtype=np.uint16)).save(path)
        else:
            Image.new("RGB", (30, 20), "white").convert(mode).save(path)
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert np.asarray(image).min() >= 250  # white in every mode

    def test_sixteen_bit_grey_is_scaled_not_clipped(self):
        image = load_image(Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]

    @pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
    def test_sixteen_bit_grey_of_every_value(self, dtype: str):
        """Each of the 256 levels stands for 257 values, from its own multiple of 257 on; the last one is 65535."""
        values = np.arange(65536)
        shown = np.asarray(load_image(Image.fromarray(values.reshape(256, 256).astype(dtype)))).reshape(-1, 3)
        expected = np.repeat(np.arange(256), 257)[:65536]
        assert [expected[k] for k in (0, 256, 257, 65534, 65535)] == [0, 0, 1, 254, 255]
        np.testing.assert_array_equal(shown, expected[:, None].repeat(3, axis=1))

    def test_grey_beyond_sixteen_bit_is_clipped(self):
        image = load_image(Image.fromarray(np.array([[-1, -(2**31), 65536, 2**31 - 1]], dtype=np.int32)))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 255, 255]

    def test_transparent_pixels_become_white(self, tmp_path: Path):
        rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        rgba.putpixel((1, 0), (0, 0, 255, 0))
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([255, 0, 0, 0, 0, 255])
        palette.putpixel((1, 0), 1)
        palette.save(tmp_path / "palette.png", transparency=1)
        for source in (rgba, tmp_path / "palette.png"):
            assert np.asarray(load_image(source)).tolist() == [[[255, 0, 0], [255, 255, 255]]]

    @pytest.mark.parametrize("orientation", STORED)
    def test_exif_orientation_is_applied_once(self, tmp_path: Path, orientation: int):
        upright = noise_picture(8, 12)
        path = tmp_path / "photo.png"
        save_turned(upright, path, orientation)
        once = load_image(path)
        assert np.array_equal(np.asarray(once), np.asarray(upright))
        assert np.array_equal(np.asarray(load_image(once)), np.asarray(upright))
        once.save(tmp_path / "again.png")
        assert np.array_equal(np.asarray(load_image(tmp_path / "again.png")), np.asarray(upright))

    def test_an_image_in_memory_is_left_as_it_was(self):
        grey = Image.new("L", (3, 3), 7)
        load_image(grey)
        assert grey.mode == "L"

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"nowhere\.png: no such image file") as error:
            load_image(tmp_path / "nowhere.png")
        assert error.value.kind == "image missing"
        with pytest.raises(ValueError, match="no such image file"):
            load_image(tmp_path)

    def test_not_an_image(self, tmp_path: Path):
        path = tmp_path / "notes.png"
        path.write_text("no picture at all")
        with pytest.raises(DataError, match=r"notes\.png: not an image") as error:
            load_image(path)
        assert error.value.kind == "image broken"
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"notes\.png: not an image"):
            load_image(path)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp"])
    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
    def test_truncated_file(self, tmp_path: Path, suffix: str, kept: float):
        path = tmp_path / f"half.{suffix}"
        noise_picture(64, 64).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
        with pytest.raises(DataError, match=rf"half\.{suffix}: ") as error:
            load_image(path)
        assert error.value.kind == "image broken"

    @settings(deadline=None, max_examples=60)
    @given(position=st.integers(0, 10**6), value=st.integers(0, 255), suffix=st.sampled_from(["PNG", "JPEG", "GIF"]))
    def test_a_damaged_byte_never_raises_anything_else(self, tmp_path_factory, position: int, value: int, suffix: str):
        buffer = io.BytesIO()
        smooth_picture(40, 50).save(buffer, suffix)
        data = bytearray(buffer.getvalue())
        data[position % len(data)] = value
        path = tmp_path_factory.mktemp("damaged") / "picture"
        path.write_bytes(data)
        try:
            assert load_image(path).mode == "RGB"
        except DataError as error:
            assert str(path) in str(error) and error.kind == "image broken"

    def test_decompression_bomb(self, tmp_path: Path, monkeypatch):
        path = tmp_path / "bomb.png"
        Image.new("L", (100, 100)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match=r"bomb\.png: ") as error:
            load_image(path)
        assert error.value.kind == "image broken"

    def test_floating_point_pixels_are_refused(self):
        with pytest.raises(ValueError, match="floating-point"):
            load_image(Image.new("F", (4, 4)))


class TestVLMImageTransform:
    @pytest.mark.parametrize("size", [(256, 256), (320, 416), (64, 1024)])
    def test_equals_qwens_processor_where_nothing_is_resized(self, size: tuple[int, int]):
        transform = VLMImageTransform()
        image = noise_picture(*size)
        patches, grid = transform(image)
        expected, expected_grid = reference_patches(image, transform)
        assert patches.dtype == expected.dtype == torch.float32
        assert grid.dtype == torch.int64
        assert grid.tolist() == expected_grid.tolist() == [1, size[0] // 16, size[1] // 16]
        torch.testing.assert_close(patches, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [(300, 401), (20, 50), (1, 1), (700, 500), (17, 3000)])
    def test_stays_near_qwens_processor_where_it_resizes(self, size: tuple[int, int]):
        transform = VLMImageTransform(max_pixels=400 * 400)
        image = smooth_picture(*size)
        patches, grid = transform(image)
        expected, expected_grid = reference_patches(image, transform)
        assert grid.tolist() == expected_grid.tolist()
        assert (patches - expected).abs().max() * GREY_LEVELS <= 4

    @pytest.mark.parametrize(("patch", "merge", "time"), [(8, 1, 1), (8, 2, 2), (14, 2, 2), (4, 3, 1)])
    def test_other_patch_sizes(self, patch: int, merge: int, time: int):
        transform = VLMImageTransform(patch, merge, time, min_pixels=32 * 32, mean=0.4, std=0.3)
        side = 3 * patch * merge
        image = noise_picture(side, 2 * side)
        patches, grid = transform(image)
        expected, expected_grid = reference_patches(image, transform)
        assert grid.tolist() == expected_grid.tolist()
        torch.testing.assert_close(patches, expected, rtol=0, atol=2e-6)

    def test_patches_carry_the_pixels_of_their_place(self):
        """Second row of the second merge window: its top-left pixel is known by construction."""
        image = noise_picture(256, 256)
        patches, _ = VLMImageTransform()(image)
        window, inside = 1, 2  # second window of the first row of windows; first patch of its lower half
        patch = patches[4 * window + inside].reshape(3, 2, 16, 16)
        pixel = np.asarray(image)[16, 32].astype(np.float64)
        assert torch.equal(patch[:, 0], patch[:, 1])
        np.testing.assert_allclose(patch[:, 0, 0, 0], pixel / 127.5 - 1, atol=1e-6)

    @settings(deadline=None, max_examples=150)
    @given(height=st.integers(1, 5000), width=st.integers(1, 5000), largest=st.sampled_from([65536, 250000, 10**7]))
    def test_target_sizes(self, height: int, width: int, largest: int):
        transform = VLMImageTransform(min_pixels=65536, max_pixels=largest)
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(ValueError, match=f"{height}x{width} pixels is thinner"):
                transform.target_size(height, width)
            return
        new_h, new_w = transform.target_size(height, width)
        assert (new_h, new_w) == smart_resize(height, width, 32, transform.min_pixels, largest)
        assert transform.num_tokens(height, width) == new_h * new_w // 1024
        if 65536 <= new_h * new_w <= largest:  # a resized picture fits
            assert transform.target_size(new_h, new_w) == (new_h, new_w)
        if min(new_h, new_w) >= 320:  # where multiples of 32 are fine enough, the aspect ratio is kept
            assert new_h / new_w == pytest.approx(height / width, rel=0.12)

    def test_num_tokens_is_what_the_grid_says(self):
        transform = VLMImageTransform()
        image = smooth_picture(411, 777)
        patches, grid = transform(image)
        assert patches.shape == (grid.prod(), 3 * 2 * 16 * 16)
        assert transform.num_tokens(411, 777) == grid.prod() // 4

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="min_pixels"):
            VLMImageTransform(min_pixels=100_000, max_pixels=50_000)
        with pytest.raises(ValueError, match="less than one token"):
            VLMImageTransform(min_pixels=1, max_pixels=1000)
        with pytest.raises(ValueError, match="at least 1"):
            VLMImageTransform(merge_size=0)
        with pytest.raises(ValueError, match="is empty"):
            VLMImageTransform().target_size(0, 5)
        with pytest.raises(ValueError, match="load_image"):
            VLMImageTransform()(Image.new("L", (256, 256)))


class TestDetectorImageTransform:
    def test_fitting_picture_is_only_normalised(self):
        image = noise_picture(112, 112)
        pixels = DetectorImageTransform(112)(image)
        assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 112, 112))
        expected = (np.asarray(image).astype(np.float64) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1e-6)

    @pytest.mark.parametrize("size", [(480, 640), (1, 1), (30, 2), (10, 2500), (1500, 1007)])
    def test_squashes_any_size(self, size: tuple[int, int]):
        image = smooth_picture(*size)
        pixels = DetectorImageTransform()(image)
        assert pixels.shape == (3, 1008, 1008)
        assert -1 <= pixels.min() <= pixels.max() <= 1
        expected = np.asarray(image.resize((1008, 1008), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(pixels.numpy() - expected).max() * GREY_LEVELS <= 2

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="at least 1"):
            DetectorImageTransform(0)
        with pytest.raises(ValueError, match="load_image"):
            DetectorImageTransform()(Image.new("RGBA", (8, 8)))
