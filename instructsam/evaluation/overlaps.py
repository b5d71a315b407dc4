"""How the masks of many records overlap, in pixels: the only place where the metrics look at masks.

The run ends of all masks of a record are sorted once. Walking along them says which masks cover each stretch of
pixels, so the number of pixels of every combination of masks is a sum over stretches, and every intersection and
union is a sum over combinations. Records of the same numbers of masks are done together. Beyond ``MAX_COMBINED``
masks the combinations would be too many: such a record is measured mask by mask with pycocotools.

Shapes: R records of one group (the same numbers of masks), P predictions **in the order of their rank**, G ground
truths, M masks (predictions, then truths, then ignored ones), K combinations (2^M).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam import masks

MAX_COMBINED = 10
_MAX_BINS = 2**22  # combinations x records that are counted at once


@dataclass(frozen=True)
class Overlaps:
    """Pixel counts of R records, float64 (exact below 2^53).

    The last two say, for each prediction, what the union of it and of all that rank higher covers, without ignored
    pixels; ``truth_area_R`` is the union of the truths, without them as well.
    """

    pred_area_RP: NDArray[np.float64]
    truth_area_RG: NDArray[np.float64]
    pred_pred_RPP: NDArray[np.float64]
    pred_truth_RPG: NDArray[np.float64]
    truth_area_R: NDArray[np.float64]
    union_area_RP: NDArray[np.float64]
    union_truth_RP: NDArray[np.float64]

    @property
    def ious_RPP(self) -> NDArray[np.float64]:
        """IoU of predictions with each other; 0 for two empty masks, as `masks.pairwise_iou`."""
        return _iou(self.pred_pred_RPP, self.pred_area_RP, self.pred_area_RP)

    @property
    def ious_RPG(self) -> NDArray[np.float64]:
        """IoU of predictions with ground truths."""
        return _iou(self.pred_truth_RPG, self.pred_area_RP, self.truth_area_RG)


def _iou(
    shared_RAB: NDArray[np.float64], area_RA: NDArray[np.float64], area_RB: NDArray[np.float64]
) -> NDArray[np.float64]:
    union_RAB = area_RA[:, :, None] + area_RB[:, None, :] - shared_RAB
    return shared_RAB / np.maximum(union_RAB, 1.0)


def overlaps(
    counts_flat: NDArray[np.int64],
    starts: NDArray[np.int64],
    first_R: NDArray[np.int64],
    ranks_RP: NDArray[np.int64],
    sizes_R2: NDArray[np.int64],
    num_truths: int,
    num_ignored: int,
) -> Overlaps:
    """Overlaps of records that all have P predictions, G truths and as many ignored masks.

    Args:
        counts_flat, starts: run lengths of checked masks, as `masks.check_runs` returns them.
        first_R: where each record's masks begin: predictions as listed, then truths, then ignored ones.
        ranks_RP: indices of each record's predictions in the order of their rank.
        sizes_R2: height and width of each record's image; its masks have that size.
    """
    num_records, num_predictions = ranks_RP.shape
    num_masks = num_predictions + num_truths + num_ignored
    # Which mask of its record stands where, in the order M above.
    others = np.arange(num_predictions, num_masks)
    order_RM = np.concatenate([ranks_RP, np.broadcast_to(others, (num_records, len(others)))], axis=1)
    if num_masks > MAX_COMBINED:
        members_RM = first_R[:, None] + order_RM
        return _mask_by_mask(counts_flat, starts, members_RM, sizes_R2, num_predictions, num_truths)
    bits_RM = np.argsort(order_RM, axis=1)
    sums_KF = _sums(num_masks, num_predictions, num_truths)
    parts = [np.zeros((0, sums_KF.shape[1]))]
    step = max(1, _MAX_BINS >> num_masks)
    for first in range(0, num_records, step):
        rows = slice(first, first + step)
        pixels_R = sizes_R2[rows].prod(axis=1)
        parts.append(_combinations(counts_flat, starts, first_R[rows], bits_RM[rows], pixels_R) @ sums_KF)
    return _named(np.concatenate(parts), num_predictions, num_truths)


def _combinations(
    counts_flat: NDArray[np.int64],
    starts: NDArray[np.int64],
    first_R: NDArray[np.int64],
    bits_RM: NDArray[np.int64],
    pixels_R: NDArray[np.int64],
) -> NDArray[np.float64]:
    """(R, K) pixels that exactly the masks of each combination cover; combination 0 is not counted.

    Masks come as listed, from ``first_R`` on; ``bits_RM`` are the bits that stand for them.
    """
    num_records, num_masks = bits_RM.shape
    if num_masks == 0:
        return np.zeros((num_records, 1))
    # One number an event: the pixel where a run ends, counted through all records, and which mask's run it is. The
    # numbers are small where the C code's are, and a 32-bit sort takes half the time.
    bits = num_masks.bit_length()
    stride = int(pixels_R.max()) + 1
    dtype: Any = np.uint32 if (stride * num_records) << bits < 2**32 else np.uint64
    begin_R, end_R = starts[first_R], starts[first_R + num_masks]
    lengths = np.diff(starts[first_R[:, None] + np.arange(num_masks + 1)], axis=1).ravel()
    if (begin_R[1:] == end_R[:-1]).all():  # nothing between them
        events = counts_flat[begin_R[0] : end_R[-1]]
    else:
        events = gather(counts_flat, begin_R, end_R - begin_R)
    ends = np.cumsum(events, dtype=dtype)
    lasts = np.cumsum(lengths) - 1
    before: NDArray[Any] = np.concatenate([np.zeros(1, dtype), ends[lasts[:-1]]])
    mask = bits_RM.ravel().astype(dtype)
    record: NDArray[Any] = np.repeat(np.arange(num_records, dtype=dtype), num_masks)
    shift = dtype(bits)
    # Unsigned, so that a negative offset wraps around and back.
    offsets = ((record * dtype(stride) - before) << shift) | mask
    keys = (ends << shift) + np.repeat(offsets, lengths)
    # The end of a mask that closes with background changes nothing.
    unchanged = np.flatnonzero(lengths % 2)
    keys[lasts[unchanged]] += dtype(num_masks) - mask[unchanged]
    keys.sort()

    # Bit M stands for those that change nothing.
    state = np.bitwise_xor.accumulate(np.left_shift(dtype(1), keys & dtype(2**bits - 1)))
    state &= dtype(2**num_masks - 1)
    keys >>= shift
    stretch = np.diff(keys, append=keys[-1:])
    bins = np.repeat(np.arange(num_records) << num_masks, end_R - begin_R)
    bins += state.astype(np.int64)
    pixels: NDArray[Any] = np.bincount(bins, weights=stretch, minlength=num_records << num_masks)
    return pixels.reshape(num_records, -1)


def gather(flat: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """``flat[start : start + length]`` of every pair, one after another."""
    first = np.cumsum(lengths) - lengths
    return flat[np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)]


@lru_cache(maxsize=256)
def _sums(num_masks: int, num_predictions: int, num_truths: int) -> NDArray[np.float64]:
    """(K, F) zeros and ones: which combinations add up to each figure, in the order that `_named` reads."""
    combination = np.arange(2**num_masks)
    covered = [(combination >> m) & 1 == 1 for m in range(num_masks)]
    predictions, truths = covered[:num_predictions], covered[num_predictions : num_predictions + num_truths]
    nothing = np.zeros(2**num_masks, dtype=np.bool_)
    valid = ~np.logical_or.reduce([nothing, *covered[num_predictions + num_truths :]])
    any_truth = np.logical_or.reduce([nothing, *truths])
    union = [np.logical_or.reduce(predictions[: p + 1]) for p in range(num_predictions)]
    columns = [*predictions, *truths]
    columns += [a & b for a in predictions for b in predictions]
    columns += [a & b for a in predictions for b in truths]
    columns += [any_truth & valid, *(part & valid for part in union), *(part & any_truth & valid for part in union)]
    return np.stack(columns, axis=1).astype(np.float64)


def _named(pixels_RF: NDArray[np.float64], num_predictions: int, num_truths: int) -> Overlaps:
    p, g, rows = num_predictions, num_truths, len(pixels_RF)
    widths = (p, g, p * p, p * g, 1, p, p)
    pred, truth, both, hit, area, union, shared = np.split(pixels_RF, np.cumsum(widths)[:-1], axis=1)
    return Overlaps(pred, truth, both.reshape(rows, p, p), hit.reshape(rows, p, g), area[:, 0], union, shared)


def _mask_by_mask(
    counts_flat: NDArray[np.int64],
    starts: NDArray[np.int64],
    members_RM: NDArray[np.int64],
    sizes_R2: NDArray[np.int64],
    num_predictions: int,
    num_truths: int,
) -> Overlaps:
    """The same for records of many masks."""
    rows = []
    for members, (height, width) in zip(members_RM.tolist(), sizes_R2.tolist(), strict=True):
        runs = [counts_flat[starts[index] : starts[index + 1]] for index in members]
        rles = masks.check_rles([{"size": [height, width], "counts": run} for run in runs])
        predictions, truths = rles[:num_predictions], rles[num_predictions : num_predictions + num_truths]
        ignored = rles[num_predictions + num_truths :]

        area_M = masks.areas(rles, checked=True).astype(np.float64)
        iou_PM = masks.pairwise_iou(predictions, predictions + truths, checked=True)
        # IoU i / (a + b - i) gives back the whole number i.
        total_PM = area_M[:num_predictions, None] + area_M[None, : num_predictions + num_truths]
        shared_PM = np.rint(iou_PM * total_PM / (1 + iou_PM))

        area_ignored = float(area_M[num_predictions + num_truths :].sum())
        truth_union = masks.union([*truths, *ignored], height, width, checked=True)
        unions, boths = [masks.union(ignored, height, width, checked=True)], []
        for prediction in predictions:
            unions.append(masks.union([unions[-1], prediction], height, width, checked=True))
            boths.append(masks.union([unions[-1], truth_union], height, width, checked=True))
        truth_area, *areas = masks.areas([truth_union, *unions[1:], *boths], checked=True) - area_ignored
        union_P, either_P = np.array(areas[:num_predictions]), np.array(areas[num_predictions:])
        rows.append(
            [
                area_M[: num_predictions + num_truths],
                shared_PM[:, :num_predictions].ravel(),
                shared_PM[:, num_predictions:].ravel(),
                [truth_area],
                union_P,
                union_P + truth_area - either_P,
            ]
        )
    return _named(np.array([np.concatenate(row) for row in rows]), num_predictions, num_truths)
