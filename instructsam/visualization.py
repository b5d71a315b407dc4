"""Pictures for people: instance masks drawn over an image, and galleries of truth beside prediction.

Only Pillow and numpy are needed. Text is set in Pillow's built-in font, which covers Latin script.
"""

from __future__ import annotations

import bisect
import colorsys
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from instructsam.masks import decode, encode_batch, pairwise_iou
from instructsam.processing.image_files import ImageSource, load_image
from instructsam.structures import RLE, Instance

Color: TypeAlias = tuple[int, int, int]
Mask: TypeAlias = "Instance | RLE | np.ndarray"

# Colours that stay apart on a picture and from each other; further instances get hues between them.
_PALETTE: tuple[Color, ...] = (
    (230, 25, 75),
    (60, 180, 75),
    (67, 99, 216),
    (255, 225, 25),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (191, 239, 69),
    (0, 128, 128),
    (128, 0, 0),
    (154, 99, 36),
)
INK: Color = (33, 37, 41)
FAINT: Color = (108, 117, 125)
PAPER: Color = (255, 255, 255)
_RULE: Color = (206, 212, 218)


def instance_colors(count: int) -> list[Color]:
    """One distinct RGB colour per instance."""
    colors = list(_PALETTE[:count])
    for i in range(count - len(colors)):
        hue = (0.03 + i * 0.618034) % 1  # golden ratio: the next hue falls into the widest gap
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.55, 0.9)[i % 2], (1.0, 0.75)[i // 2 % 2])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def overlay(
    image: ImageSource,
    masks: Sequence[Mask],
    labels: Sequence[str] | None = None,
    *,
    colors: Sequence[Color] | None = None,
    alpha: float = 0.35,
    fade: float = 0.55,
    min_side: int = 480,
    max_side: int = 1600,
) -> Image.Image:
    """Draw instances over an image: a tint, an outline and a label each, on a faded background.

    Args:
        image: path or picture of H x W pixels.
        masks: `Instance`s, RLEs or (H, W) arrays, all at the image's size.
        labels: a short text per mask; by default phrase and score of `Instance`s and nothing for bare masks.
        colors: RGB per mask, by default `instance_colors`.
        alpha: strength of the tint, 0…1.
        fade: how far pixels outside of all masks are drawn towards light grey, 0…1. An image without any mask keeps
            its colours.
        min_side, max_side: the result is scaled so that its longest side lies between the two, in pixels. Small
            images are thus enlarged before anything is drawn, and labels stay readable.

    Raises:
        ValueError: a mask that is not of the image's size, or lists of different lengths.
    """
    picture = load_image(image)
    if labels is None:
        labels = [_default_label(mask) for mask in masks]
    if colors is None:
        colors = instance_colors(len(masks))
    if not len(masks) == len(labels) == len(colors):
        raise ValueError(f"{len(masks)} masks, {len(labels)} labels and {len(colors)} colors: one of each is needed")
    longest = max(picture.size)
    scale = min(max(longest, min_side), max_side) / longest
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    arrays = []  # one after the other: at full size many of them would not fit into memory
    for i, mask in enumerate(masks):
        array = _array(mask, (picture.height, picture.width), i)
        arrays.append(array if size == picture.size else _resize_mask(array, size))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)

    pixels = np.asarray(picture).astype(np.float32)
    line = max(2, round(max(size) / 240))
    if arrays:
        outside = ~np.any(arrays, axis=0)
        grey = 96 + 0.6 * np.asarray(picture.convert("L")).astype(np.float32)[outside, None]
        pixels[outside] += fade * (grey - pixels[outside])
    for array, color in zip(arrays, colors, strict=True):
        pixels[array] += alpha * (np.array(color, dtype=np.float32) - pixels[array])
    for array, color in zip(arrays, colors, strict=True):  # after all tints, so that no outline is covered by one
        pixels[_outline(array, line + max(1, line // 2))] = PAPER
        pixels[_outline(array, line)] = color
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    _draw_labels(picture, arrays, labels, colors)
    return picture


@dataclass(frozen=True)
class GalleryRow:
    """One instruction in a gallery: the image, what was asked, true instances and predicted ones.

    ``note`` is set small behind the instruction (instruction kind, IoU, …).
    """

    image: ImageSource
    instruction: str
    truth: Sequence[Mask]
    prediction: Sequence[Mask]
    truth_labels: Sequence[str] | None = None
    prediction_labels: Sequence[str] | None = None
    note: str = ""

    @classmethod
    def from_record(
        cls, record: Mapping[str, Any], image: ImageSource, threshold: float = 0.0, note: str = ""
    ) -> GalleryRow:
        """The row of an evaluation record; predictions with score > ``threshold`` are shown."""
        scores = record["pred_scores"]
        kept = [i for i, score in enumerate(scores) if score > threshold]
        phrases, owners = record.get("pred_phrases") or [], record.get("pred_phrase_ids") or []
        names = [phrases[owners[i]] if owners else "" for i in kept]
        return cls(
            image=image,
            instruction=record["instruction"],
            truth=record["gt_rles"],
            prediction=[record["pred_rles"][i] for i in kept],
            prediction_labels=[_label(name, scores[i]) for name, i in zip(names, kept, strict=True)],
            note=note or record.get("kind", ""),
        )


def gallery(
    rows: Sequence[GalleryRow], *, cell: int = 320, columns: int = 1, titles: tuple[str, str] = ("truth", "prediction")
) -> Image.Image:
    """Truth beside prediction, one instruction after the other, each under its wrapped instruction.

    A predicted instance takes the colour of the true instance that it covers (IoU ≥ 0.5), so that hits, misses and
    extra masks can be told apart at a glance. Save the result with `save_png` to keep the file small.

    Args:
        rows: what to show.
        cell: longest side of each picture, in pixels.
        columns: instructions side by side.
        titles: what stands under the left and under the right picture.
    """
    if not rows:
        raise ValueError("a gallery needs at least one row")
    return grid([_gallery_tile(row, cell, titles) for row in rows], columns)


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows on white, aligned at their lower edges, with a rule between rows."""
    gap = 16
    width = max(tile.width for tile in tiles)
    lines = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in line) for line in lines]
    total_width = gap + min(columns, len(tiles)) * (width + gap)
    page = Image.new("RGB", (total_width, gap + sum(heights) + gap * len(lines)), PAPER)
    draw, y = ImageDraw.Draw(page), gap
    for number, (line, height) in enumerate(zip(lines, heights, strict=True)):
        if number:
            draw.line([(gap, y - gap // 2), (total_width - gap, y - gap // 2)], fill=_RULE)
        for i, tile in enumerate(line):
            page.paste(tile, (gap + i * (width + gap), y + height - tile.height))
        y += height + gap
    return page


def overlay_pair(row: GalleryRow, cell: int = 320) -> tuple[Image.Image, Image.Image]:
    """Truth and prediction of one instruction as two pictures of ``cell`` pixels on their longest side.

    A predicted instance takes the colour of the true instance that it covers (IoU ≥ 0.5).

    Raises:
        ValueError: a mask that is not of the image's size.
    """
    picture = load_image(row.image)
    size = (picture.height, picture.width)
    truth = [_array(mask, size, i) for i, mask in enumerate(row.truth)]
    prediction = [_array(mask, size, i) for i, mask in enumerate(row.prediction)]
    truth_labels = row.truth_labels or [_default_label(mask) for mask in row.truth]
    prediction_labels = row.prediction_labels or [_default_label(mask) for mask in row.prediction]
    truth_colors, prediction_colors = _matching_colors(truth, prediction)
    left, right = (
        overlay(picture, masks, labels, colors=colors, min_side=cell, max_side=cell)
        for masks, labels, colors in (
            (truth, truth_labels, truth_colors),
            (prediction, prediction_labels, prediction_colors),
        )
    )
    return left, right


def jpeg_bytes(image: Image.Image, max_bytes: int = 25_000) -> bytes:
    """A JPEG file of at most ``max_bytes``: first with less quality, then, if that is not enough, smaller."""
    while max(image.size) > 1:
        for quality in (85, 70, 50):
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=quality, optimize=True)
            if file.tell() <= max_bytes:
                return file.getvalue()
        smaller = (max(1, int(image.width * 0.75)), max(1, int(image.height * 0.75)))
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    raise ValueError(f"no JPEG fits into {max_bytes} bytes")


def save_png(image: Image.Image, path: str | os.PathLike[str], max_bytes: int = 300_000) -> None:
    """Write a PNG of at most ``max_bytes``: first with fewer colours, then, if that is not enough, smaller."""
    for count in (None, 256, 96):
        candidate = image if count is None else image.quantize(count, dither=Image.Dither.NONE)
        candidate.save(path, format="PNG", optimize=True)
        if os.path.getsize(path) <= max_bytes:
            return
    while max(image.size) > 1:
        shrink = min(0.9, 0.95 * (max_bytes / os.path.getsize(path)) ** 0.5)
        smaller = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
        image = image.resize(smaller, Image.Resampling.LANCZOS)
        image.quantize(96, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
        if os.path.getsize(path) <= max_bytes:
            return
    raise ValueError(f"{path}: no PNG fits into {max_bytes} bytes")


# ---- masks ----------------------------------------------------------------------------------------------------------


def _array(mask: Mask, size: tuple[int, int], index: int) -> np.ndarray:
    """(H, W) bool of any kind of mask."""
    if isinstance(mask, Instance):
        mask = mask.rle
    array = mask.astype(bool) if isinstance(mask, np.ndarray) else decode(mask)
    if array.shape != size:
        raise ValueError(f"mask {index} has shape {array.shape}, the image {size} (height, width)")
    return array


def _resize_mask(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarged masks get smooth edges: interpolate, then cut at one half."""
    grey = Image.fromarray(array.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) > 127


def _outline(array: np.ndarray, line: int) -> np.ndarray:
    """Pixels of the mask that are nearer than ``line`` to its edge (the picture's border counts as edge)."""
    inner = np.pad(array, 1)
    for _ in range(line):
        core = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = np.pad(core, 1)
    return array & ~inner[1:-1, 1:-1]


# ---- text -----------------------------------------------------------------------------------------------------------


def _label(phrase: str, score: float) -> str:
    return f"{phrase} {score:.2f}".strip()


def _default_label(mask: Mask) -> str:
    return _label(mask.phrase, mask.score) if isinstance(mask, Instance) else ""


def text_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font; ``size`` is its height in pixels."""
    return ImageFont.load_default(size)


def _shorten(text: str, font: Any, width: float) -> str:
    """Cut text at the end until it fits a width in pixels."""
    text = text[: max(1, int(width))]  # no letter is thinner than a pixel
    if font.getlength(text) <= width:
        return text
    keep = bisect.bisect_right(range(1, len(text)), width, key=lambda n: font.getlength(text[:n] + "…"))
    return text[:keep].rstrip() + "…"


def wrap_text(text: str, font: Any, width: float, max_lines: int = 4) -> list[str]:
    """Break text at spaces into lines of at most a width in pixels; the last line is shortened if words are left."""
    lines, words = [""], text.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == max_lines:
            lines[-1] = " ".join([lines[-1], *words[number:]])
            break
        else:
            lines.append(word)
    return [_shorten(line, font, width) for line in lines]


def _text_color(color: Color) -> Color:
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _draw_labels(
    picture: Image.Image, arrays: Sequence[np.ndarray], labels: Sequence[str], colors: Sequence[Color]
) -> None:
    """Put each label above its mask's top, inside the picture, and below labels that are already there."""
    font = text_font(max(13, round(max(picture.size) / 36)))
    draw = ImageDraw.Draw(picture)
    pad, taken = 3, list[tuple[float, float, float, float]]()
    for array, label, color in zip(arrays, labels, colors, strict=True):
        if not label or not array.any():
            continue
        text = _shorten(label, font, picture.width - 2 * pad)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * pad, bottom - top + 2 * pad
        rows, columns = np.flatnonzero(array.any(axis=1)), np.flatnonzero(array.any(axis=0))
        x = min(max(0, (columns[0] + columns[-1] - width) / 2), max(0, picture.width - width))
        y = _free_height(x, max(0, rows[0] - height), width, height, picture.height, taken)
        taken.append((x, y, x + width, y + height))
        draw.rectangle([x, y, x + width - 1, y + height - 1], fill=color)
        draw.text((x + pad - left, y + pad - top), text, font=font, fill=_text_color(color))


def _free_height(
    x: float, y: float, width: float, height: float, limit: int, taken: Sequence[tuple[float, float, float, float]]
) -> float:
    """The nearest y where a label covers no other: downwards from the wished one, else upwards, else the wished one."""

    def hits(at: float) -> list[tuple[float, float, float, float]]:
        return [box for box in taken if box[0] < x + width and x < box[2] and box[1] < at + height and at < box[3]]

    for down in (True, False):
        at = y
        while 0 <= at <= limit - height:
            others = hits(at)
            if not others:
                return at
            at = max(box[3] for box in others) if down else min(box[1] for box in others) - height
    return min(y, max(0, limit - height))


# ---- gallery --------------------------------------------------------------------------------------------------------


def _matching_colors(truth: Sequence[np.ndarray], prediction: Sequence[np.ndarray]) -> tuple[list[Color], list[Color]]:
    """Colours of both sides: a prediction shares that of the true instance it covers, every other one has its own."""
    colors = instance_colors(len(truth) + len(prediction))
    own, free = colors[: len(truth)], colors[len(truth) :]
    chosen: dict[int, Color] = {}
    if truth and prediction:
        iou = pairwise_iou(encode_batch(np.stack(truth)), encode_batch(np.stack(prediction)), checked=True)
        order = np.dstack(np.unravel_index(np.argsort(-iou, axis=None, kind="stable"), iou.shape))[0]
        used: set[int] = set()
        for g, n in order.tolist():
            if iou[g, n] >= 0.5 and g not in used and n not in chosen:
                used.add(g)
                chosen[n] = own[g]
    return own, [chosen.get(n) or free[n] for n in range(len(prediction))]


def _gallery_tile(row: GalleryRow, cell: int, titles: tuple[str, str]) -> Image.Image:
    sides = overlay_pair(row, cell)
    counts = [_count(row.truth, "no target"), _count(row.prediction, "nothing found")]

    gap, font, small = 8, text_font(16), text_font(13)
    width = 2 * cell + gap
    note_width = small.getlength(row.note) + 12 if row.note else 0
    lines = wrap_text(row.instruction, font, width - note_width)
    line_height, small_height = 21, 20
    top = len(lines) * line_height + 4
    tile = Image.new("RGB", (width, top + sides[0].height + small_height), PAPER)
    draw = ImageDraw.Draw(tile)
    for i, line in enumerate(lines):
        draw.text((0, i * line_height), line, font=font, fill=INK)
    if row.note:
        draw.text((width - note_width + 12, 3), row.note, font=small, fill=FAINT)
    for i, (side, title, count) in enumerate(zip(sides, titles, counts, strict=True)):
        x = i * (cell + gap)
        tile.paste(side, (x, top))
        draw.text((x, top + side.height + 2), f"{title}: {count}", font=small, fill=FAINT)
    return tile


def _count(masks: Sequence[Mask], none: str) -> str:
    return none if not masks else f"{len(masks)} instance{'s' if len(masks) > 1 else ''}"
