"""Overlays and galleries: what is drawn where, and that files stay small."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instructsam.masks import encode
from instructsam.structures import Instance
from instructsam.visualization import GalleryRow, gallery, grid, instance_colors, overlay, overlay_pair, save_png

GREY = Image.new("RGB", (96, 64), (128, 128, 128))


def box_mask(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def instance(mask: np.ndarray, phrase: str = "grey box", score: float = 0.5) -> Instance:
    return Instance(encode(mask), score, (0, 0, 1, 1), phrase, 0)


def has_color(image: Image.Image, color: tuple[int, int, int], region: tuple[int, int, int, int] | None = None) -> bool:
    pixels = np.asarray(image.crop(region) if region else image)
    return bool((pixels == color).all(axis=-1).any())


class TestColors:
    @pytest.mark.parametrize("count", [0, 1, 12, 40])
    def test_one_each_and_told_apart(self, count: int):
        colors = instance_colors(count)
        assert len(colors) == count
        assert all(0 <= channel <= 255 for color in colors for channel in color)
        for a, b in itertools.combinations(colors, 2):
            assert np.abs(np.subtract(a, b)).sum() >= 25, (a, b)


class TestOverlay:
    def test_small_images_are_enlarged_and_large_ones_limited(self):
        assert overlay(GREY, []).size == (480, 320)
        assert overlay(Image.new("RGB", (500, 100)), []).size == (500, 100)
        assert overlay(Image.new("RGB", (1000, 3200)), []).size == (500, 1600)
        assert overlay(GREY, [], min_side=1, max_side=48).size == (48, 32)

    def test_without_masks_the_image_is_untouched(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8))
        assert np.array_equal(np.asarray(overlay(image, [])), np.asarray(image))

    def test_masks_are_tinted_where_they_are(self):
        image = Image.new("RGB", (600, 400), (128, 128, 128))
        mask = box_mask(100, 200, 300, 400, (400, 600))
        drawn = np.asarray(overlay(image, [mask], colors=[(255, 0, 0)], alpha=0.5, fade=0.0)).astype(int)
        np.testing.assert_allclose(drawn[200, 300], [191, 64, 64], atol=1)
        np.testing.assert_array_equal(drawn[100, 300], [255, 0, 0])  # the outline lies inside the mask
        assert (drawn[~mask] == 128).all()

    def test_the_pictures_border_is_an_edge_too(self):
        image, full = Image.new("RGB", (500, 500)), np.ones((500, 500), dtype=bool)
        drawn = np.asarray(overlay(image, [full], colors=[(255, 0, 0)], alpha=0.5))
        line, rim, inside = [(255, 0, 0)] * 2, [(255, 255, 255)], [(128, 0, 0)]
        for inwards in (drawn[250], drawn[250, ::-1], drawn[:, 250], drawn[::-1, 250]):
            assert [tuple(pixel) for pixel in inwards[:4].tolist()] == line + rim + inside

    def test_the_background_fades(self):
        image = Image.new("RGB", (600, 400), (0, 0, 255))
        mask = box_mask(100, 200, 300, 400, (400, 600))
        drawn = np.asarray(overlay(image, [mask], colors=[(0, 0, 255)], fade=0.5)).astype(int)
        assert np.ptp(drawn[10, 10]) < 140
        assert drawn[200, 300].tolist() == [0, 0, 255]

    def test_every_kind_of_mask(self):
        mask = box_mask(10, 10, 30, 30)
        pictures = [overlay(GREY, [kind], [""]) for kind in (mask, mask.astype(np.uint8), encode(mask), instance(mask))]
        for picture in pictures[1:]:
            assert np.array_equal(np.asarray(picture), np.asarray(pictures[0]))

    def test_instances_are_labelled_and_bare_masks_are_not(self):
        mask = box_mask(40, 10, 60, 30)
        colors = [(10, 200, 30)]
        bare, labelled = overlay(GREY, [mask], colors=colors), overlay(GREY, [instance(mask)], colors=colors)
        above = (0, 0, 480, 5 * 40 - 4)  # pixels above the enlarged mask
        assert not has_color(bare, colors[0], above)
        assert has_color(labelled, colors[0], above)

    def test_labels_do_not_cover_each_other(self):
        """Four instances in one place: every label's background must still show a whole line of its colour."""
        mask = box_mask(20, 40, 40, 60)
        colors = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)]
        drawn = np.asarray(overlay(GREY, [mask] * 4, ["first", "second", "third", "fourth"], colors=colors, fade=0))
        for color, others in zip(colors, ("234", "134", "124", "123"), strict=True):
            rows = np.flatnonzero((drawn == color).all(axis=-1).sum(axis=1) > 25)
            assert len(rows) >= 6, f"label {color} is hidden by {others}"

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
    def test_extreme_sizes_and_long_labels(self, size: tuple[int, int]):
        image = Image.new("RGB", size)
        mask = np.ones((size[1], size[0]), dtype=bool)
        drawn = overlay(image, [instance(mask, "a phrase that is much too long " * 20)] * 30)
        assert max(drawn.size) == 480

    def test_empty_masks_get_no_label(self):
        drawn = overlay(GREY, [instance(box_mask(0, 0, 0, 0))], colors=[(1, 2, 3)])
        assert not has_color(drawn, (1, 2, 3))

    def test_the_input_is_not_drawn_upon(self):
        image = Image.new("RGB", (480, 480), (128, 128, 128))
        overlay(image, [np.ones((480, 480), dtype=bool)])
        assert image.getcolors() == [(480 * 480, (128, 128, 128))]

    def test_errors_name_the_mask(self):
        with pytest.raises(ValueError, match=r"mask 1 has shape \(96, 64\), the image \(64, 96\)"):
            overlay(GREY, [box_mask(0, 0, 1, 1), box_mask(0, 0, 1, 1).T])
        with pytest.raises(ValueError, match="2 masks, 1 labels"):
            overlay(GREY, [box_mask(0, 0, 1, 1)] * 2, ["one"])


def record(pred_scores: list[float]) -> dict:
    masks = [box_mask(10, 10, 30, 30), box_mask(40, 50, 60, 80)]
    return {
        "id": "a",
        "image": "a.png",
        "instruction": "the grey boxes",
        "kind": "category",
        "height": 64,
        "width": 96,
        "gt_rles": [encode(mask) for mask in masks],
        "pred_rles": [encode(mask) for mask in masks[::-1]][: len(pred_scores)],
        "pred_scores": pred_scores,
        "pred_phrase_ids": [0] * len(pred_scores),
        "pred_phrases": ["grey box"],
    }


class TestGallery:
    def test_row_of_a_record(self):
        row = GalleryRow.from_record(record([0.9, 0.31]), GREY, threshold=0.5)
        assert len(row.truth) == 2
        assert len(row.prediction) == 1
        assert row.prediction_labels == ["grey box 0.90"]
        assert row.note == "category"

    def test_a_prediction_at_the_threshold_is_not_shown(self):
        assert len(GalleryRow.from_record(record([0.9, 0.5]), GREY, threshold=0.5).prediction) == 1

    def test_half_of_a_truth_is_a_hit(self):
        truth, half, less = box_mask(10, 10, 30, 30), box_mask(10, 10, 30, 20), box_mask(10, 10, 30, 19)
        of_truth = instance_colors(1)[0]
        for prediction, hits in ((half, True), (less, False)):
            _, shown = overlay_pair(GalleryRow(GREY, "one box", [truth], [prediction]), 480)
            assert has_color(shown, of_truth) == hits

    def test_a_hit_takes_the_colour_of_its_truth(self):
        """The two predictions come in the opposite order of the truth, and still show the same colours."""
        page = gallery([GalleryRow.from_record(record([0.9, 0.8]), GREY)], cell=480)
        for color in instance_colors(2):
            columns = [
                np.flatnonzero((np.asarray(side) == color).all(axis=-1).any(axis=0))
                for side in (page.crop((16, 0, 496, page.height)), page.crop((504, 0, 984, page.height)))
            ]
            assert len(columns[0]), "truth is not drawn in its colour"
            assert abs(np.median(columns[0]) - np.median(columns[1])) < 20

    def test_extra_predictions_have_colours_of_their_own(self):
        mask, duplicate, extra = box_mask(10, 10, 30, 30), box_mask(9, 12, 29, 32), box_mask(40, 50, 60, 80)
        page = gallery([GalleryRow(GREY, "one box", [mask], [duplicate, extra, mask])], cell=480)
        left, right = page.crop((16, 0, 496, page.height)), page.crop((504, 0, 984, page.height))
        of_truth, of_duplicate, of_extra, unused = instance_colors(4)
        assert all(has_color(right, color) for color in (of_truth, of_duplicate, of_extra))
        assert not has_color(right, unused)
        assert has_color(left, of_truth)
        assert not any(has_color(left, color) for color in (of_duplicate, of_extra))

    def test_long_instructions_are_wrapped_into_the_page(self):
        short = gallery([GalleryRow(GREY, "grey boxes", [], [])])
        long = gallery([GalleryRow(GREY, "every grey box that stands left of another one " * 3, [], [])])
        endless = gallery([GalleryRow(GREY, "word " * 2000 + "x" * 3000, [], [])])
        assert short.width == long.width == endless.width
        assert short.height < long.height < endless.height < short.height + 100
        assert np.asarray(endless)[:, -8:].min() == 255  # nothing is written beyond the margin

    def test_columns(self):
        rows = [GalleryRow(GREY, f"instruction {i}", [], [], note="no-target") for i in range(3)]
        one, two = gallery(rows), gallery(rows, columns=2)
        assert two.width > 1.9 * one.width - 32
        assert two.height < one.height
        with pytest.raises(ValueError, match="at least one row"):
            gallery([])

    def test_tiles_of_a_line_end_at_the_same_height(self):
        tiles = [Image.new("RGB", size, color) for size, color in (((9, 5), (1, 2, 3)), ((7, 8), (4, 5, 6)))]
        page = np.asarray(grid(tiles, 2))
        rows = [np.flatnonzero((page == color).all(axis=-1).any(axis=1)) for color in ((1, 2, 3), (4, 5, 6))]
        assert [len(found) for found in rows] == [5, 8] and rows[0][-1] == rows[1][-1]

    @pytest.mark.slow
    def test_eight_rows_of_photographs_stay_small(self, tmp_path: Path):
        y, x = np.mgrid[:480, :640]
        noise = np.random.default_rng(0).normal(0, 14, (480, 640, 3))
        waves = np.stack([127 + 60 * np.sin(x / 40 + k) * np.cos(y / 33) for k in range(3)], axis=-1)
        photo = Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))
        mask = box_mask(100, 100, 300, 300, (480, 640))
        page = gallery([GalleryRow(photo, "the waves in the middle", [mask], [mask])] * 8)
        save_png(page, tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size <= 300_000
        assert Image.open(tmp_path / "page.png").width >= 400  # still readable

    def test_save_png_leaves_small_pictures_alone(self, tmp_path: Path):
        picture = overlay(GREY, [box_mask(10, 10, 30, 30)])
        save_png(picture, tmp_path / "small.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "small.png")), np.asarray(picture))
        with pytest.raises(ValueError, match="no PNG fits"):
            save_png(picture, tmp_path / "small.png", max_bytes=10)
