"""Scenes of the tiny world: what is drawn, what the masks say and what is claimed about the shapes must agree."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from instructsam.data.shapes import ATTRIBUTES, COLORS, KINDS, MIN_VISIBLE, RADII, Scene, odd_ones, sample_scene


def scenes(count: int, image_size: int = 96, odd: bool = False) -> list[Scene]:
    return [sample_scene(random.Random(f"test/{i}"), image_size, odd) for i in range(count)]


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return scenes(120)


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Mask with every pixel within so many steps (diagonal ones count) of it."""
    padded = np.pad(mask, pixels)
    h, w = mask.shape
    shifts = range(2 * pixels + 1)
    return np.any([padded[dy : dy + h, dx : dx + w] for dy in shifts for dx in shifts], axis=0)


def test_a_scene_depends_on_its_generator_alone():
    first, again = scenes(5), list(reversed([sample_scene(random.Random(f"test/{i}")) for i in reversed(range(5))]))
    for a, b in zip(first, again, strict=True):
        assert a.shapes == b.shapes
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.masks, b.masks)


def test_counts_types_and_disjoint_masks(many):
    assert {len(scene.shapes) for scene in many} == {3, 4, 5, 6}
    for scene in many:
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.shapes), 96, 96) and scene.masks.dtype == np.bool_
        assert scene.masks.sum(axis=0).max() == 1


def test_every_value_of_every_attribute_occurs(many):
    for name in ATTRIBUTES:
        values = {getattr(shape, name) for scene in many for shape in scene.shapes}
        assert len(values) == {"kind": 5, "color": 6, "size": 2, "texture": 2}[name]


def test_measures_are_those_of_the_mask(many):
    for scene in many:
        for shape, mask in zip(scene.shapes, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            assert shape.area == len(xs)
            assert (shape.x, shape.y) == pytest.approx((xs.mean(), ys.mean()))


def test_enough_of_each_shape_is_visible(many):
    for scene in many:
        for shape in scene.shapes:
            # the full area is that of the antialiased drawing, hence a little slack
            assert shape.area >= MIN_VISIBLE * shape.full_area - 12


def test_shapes_of_one_colour_do_not_touch(many):
    pairs = 0
    for scene in many:
        for i, shape in enumerate(scene.shapes):
            rows, columns = np.pad(scene.masks[i], ((1, 1), (0, 0))), np.pad(scene.masks[i], ((0, 0), (1, 1)))
            near = rows[:-2] | rows[2:] | columns[:, :-2] | columns[:, 2:]
            for other, mask in zip(scene.shapes[:i], scene.masks[:i], strict=True):
                if other.color == shape.color:
                    pairs += 1
                    assert not (near & mask).any()
    assert pairs > 100


@pytest.mark.parametrize("kind", KINDS)
def test_equal_radius_means_equal_area_for_every_kind(many, kind):
    ratios = []
    for scene in many:
        for shape, mask in zip(scene.shapes, scene.masks, strict=True):
            inside = not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
            uncovered = abs(shape.area - shape.full_area) < 0.05 * shape.full_area
            if shape.kind == kind and inside and uncovered:
                ratios.append(shape.full_area / (math.pi * shape.radius**2))
    assert len(ratios) >= 10
    assert np.median(ratios) == pytest.approx(1, abs=0.04)


def test_sizes_have_a_clear_gap(many):
    small = [shape.radius for scene in many for shape in scene.shapes if shape.size == "small"]
    large = [shape.radius for scene in many for shape in scene.shapes if shape.size == "large"]
    assert RADII["small"][0] <= min(small) and max(large) <= RADII["large"][1]
    assert min(large) ** 2 > 1.5 * max(small) ** 2


def test_pixels_have_the_colour_that_is_claimed(many):
    palette = np.array(list(COLORS.values()), dtype=float)
    for scene in many:
        for shape, mask in zip(scene.shapes, scene.masks, strict=True):
            inner = ~grown(~mask, 1)
            pixels = scene.image[inner].astype(float)
            brightness = pixels.sum(axis=1)
            bright = pixels[brightness >= np.quantile(brightness, 0.7)]  # dark stripes aside
            nearest = np.linalg.norm(palette - np.median(bright, axis=0), axis=1).argmin()
            assert list(COLORS)[nearest] == shape.color
            if shape.texture == "solid":
                # thin tips of shapes on top tint a few pixels without taking them
                assert np.quantile(np.abs(pixels - np.median(pixels, axis=0)), 0.9) <= 2
            elif inner.sum() > 60:
                assert brightness.min() < 0.6 * brightness.max()


def test_background_is_near_grey_and_is_all_that_no_mask_covers(many):
    for scene in many:
        outside = scene.image[~grown(scene.masks.any(axis=0), 1)].astype(int)
        assert np.ptp(outside, axis=1).max() <= 40


def test_scenes_are_mostly_ambiguous(many):
    def shared(scene: Scene, name: str) -> bool:
        return len({getattr(shape, name) for shape in scene.shapes}) < len(scene.shapes)

    assert np.mean([shared(scene, "kind") and shared(scene, "color") for scene in many]) > 0.7


def test_odd_scenes_have_exactly_one_odd_shape():
    attributes = set()
    for scene in scenes(60, odd=True):
        odd = {name: odd_ones(scene.shapes, name) for name in ("kind", "color", "texture")}
        assert len(set(odd.values()) - {None}) == 1
        attributes |= {name for name, index in odd.items() if index is not None}
    assert attributes == {"kind", "color", "texture"}


def test_odd_ones():
    def shapes(*colors: str) -> list[dict[str, str]]:
        return [{"color": color} for color in colors]

    assert odd_ones(shapes("red", "red", "blue", "red"), "color") == 2
    assert odd_ones(shapes("red", "red", "blue"), "color") is None
    assert odd_ones(shapes("red", "red", "blue", "blue"), "color") is None
    assert odd_ones(shapes("red", "red", "red", "red"), "color") is None
    assert odd_ones(shapes("red", "red", "red", "blue", "green"), "color") is None


def test_lengths_scale_with_the_picture():
    for scene in scenes(10, image_size=192):
        assert scene.image_size == 192
        for shape in scene.shapes:
            low, high = RADII[shape.size]
            assert 2 * low <= shape.radius <= 2 * high
    assert all(scene.masks.any(axis=(1, 2)).all() for scene in scenes(10, image_size=48))


def test_too_small_pictures_are_refused():
    with pytest.raises(ValueError, match="image_size=32"):
        sample_scene(random.Random(0), 32)
