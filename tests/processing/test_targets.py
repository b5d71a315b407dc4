"""Masks at mask resolution: hard ones by single pixels, soft ones by covered area."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.losses.criterion import CriterionConfig, SetCriterion, count_targets
from instructsam.masks import encode
from instructsam.models.detector import DetectorOutput
from instructsam.processing.targets import collate_targets, covered_share, phrase_targets, resize_nearest
from instructsam.structures import PhraseTarget


def disc(size: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[0:size, 0:size] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


FROM, TO = (1, 2, 14, 26, 39, 50, 62, 112, 200), (1, 7, 22, 24, 33, 41, 46, 96)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_takes_the_pixels_that_torch_takes(mode):
    """Also where the float32 product of torch falls short of a whole number, or is rounded up to it."""
    pairs = [(length, size) for length in FROM for size in TO]
    number, half = (2, 1) if mode == "nearest-exact" else (1, 0)
    rounded = set()
    for (height, rows), (width, columns) in zip(pairs, pairs[::-1], strict=True):
        places = np.arange(height * width).reshape(height, width, 1)
        found = resize_nearest(places, (rows, columns), mode)[..., 0]
        floats = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, height, width)
        expected = F.interpolate(floats, size=(rows, columns), mode=mode)[0, 0].long().numpy()
        np.testing.assert_array_equal(found, expected)
        exact_rows = (number * np.arange(rows) + half) * height // (number * rows)
        exact_columns = (number * np.arange(columns) + half) * width // (number * columns)
        rounded |= {"rows"} if (expected[:, 0] // width != exact_rows).any() else set()
        rounded |= {"columns"} if (expected[0] % width != exact_columns).any() else set()
    assert rounded == {"rows", "columns"}, "exact arithmetic must be told apart, along both sides"


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_covered_shares_are_shares(height, width, rows, columns, seed):
    mask = np.random.default_rng(seed).random((height, width, 2)) < 0.5
    share = covered_share(mask.astype(np.uint8), (rows, columns))
    assert share.shape == (2, rows, columns) and share.min() >= 0 and share.max() <= 1
    if height % rows == 0 and width % columns == 0:
        cells = mask.reshape(rows, height // rows, columns, width // columns, 2).mean((1, 3))
        np.testing.assert_allclose(share.numpy(), cells.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("inside", [2.0, 9.0])
def test_soft_masks_come_back_in_their_size(inside):
    """Logits may be larger outside than inside, as models learn them: soft targets then shrink less than hard ones."""
    sizes, ious = {}, {}
    for mode in ("nearest-exact", "area"):
        areas, found = [], []
        for k in range(20):
            mask = disc(96, 40 + 0.7 * k, 50 - 0.3 * k, 9)
            (target,), _ = phrase_targets(PhraseTarget("disc", (encode(mask),)), (24, 24), mode)
            logits = torch.logit(target.float().clamp(1e-4, 1 - 1e-4)).clamp(-9, inside)
            up = F.interpolate(logits[None, None], size=(96, 96), mode="bilinear")[0, 0].numpy() > 0
            areas.append(up.sum() / mask.sum())
            found.append((up & mask).sum() / (up | mask).sum())
        sizes[mode], ious[mode] = np.mean(areas), np.mean(found)
    assert ious["area"] > ious["nearest-exact"] + 0.05
    if inside == 9:
        assert abs(sizes["area"] - 1) < 0.05 and ious["area"] > 0.9
    else:
        assert sizes["nearest-exact"] + 0.1 < sizes["area"] < 1


def test_soft_and_hard_targets_in_a_batch_and_in_the_losses():
    mask = disc(96, 40, 50, 12)
    soft, hard = (phrase_targets(PhraseTarget("d", (encode(mask),)), (24, 24), mode) for mode in ("area", "nearest"))
    none = phrase_targets(PhraseTarget("n"), (24, 24), "area")
    assert collate_targets([hard, none], [False, False], (24, 24))["target_masks"].dtype == torch.bool
    batch = collate_targets([soft, none], [False, False], (24, 24))
    assert batch["target_masks"].dtype == torch.float32 and batch["target_valid"].tolist() == [[True], [False]]
    best = torch.logit(batch["target_masks"].clamp(1e-4, 1 - 1e-4)).expand(2, 3, 24, 24)
    criterion = SetCriterion(CriterionConfig())
    losses = []
    for masks in (best, best.sign() * 9):
        output = DetectorOutput(masks, torch.zeros(2, 3), torch.full((2, 3, 4), 0.5))
        losses.append(criterion(output, batch, count_targets(batch))["mask_bce"].item())
    assert losses[0] < losses[1], "the share itself is what cross-entropy wants"
