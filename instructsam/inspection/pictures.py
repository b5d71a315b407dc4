"""What an instruction asks for, drawn over its picture; and many of them on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from instructsam import masks
from instructsam.data.augmentation import PictureChange
from instructsam.errors import DataError
from instructsam.processing.image_files import load_image
from instructsam.structures import Sample, Turn
from instructsam.visualization import FAINT, INK, PAPER, grid, instance_colors, overlay, text_font, wrap_text

UNCHANGED = PictureChange()
GREY = (150, 150, 150)
LABELLED = 8
"""With more instances than this, labels would hide the picture."""
TINY = 8
"""An instance that is shown smaller than this, in pixels, gets a ring of twice the size."""
_LABEL = 16
_LINE = 20


@dataclass(frozen=True)
class Asked:
    """A turn of a sample as it is asked, the source it comes from, and what is done to its picture."""

    source: str
    sample: Sample
    turn: Turn
    change: PictureChange = UNCHANGED


def picture_of(sample: Sample, change: PictureChange = UNCHANGED) -> tuple[Image.Image | None, str]:
    """The sample's picture, changed as it is asked about; grey and with a reason where it cannot be shown.

    None for a sample about no picture.
    """
    if sample.image is None:
        return None, ""
    try:
        picture = load_image(sample.image)
    except DataError as error:
        return Image.new("RGB", (sample.width, sample.height), GREY), str(error)
    if (picture.height, picture.width) != (sample.height, sample.width):
        reason = f"{sample.image}: is {picture.height}x{picture.width} (height x width), not as its record says"
        return Image.new("RGB", (sample.width, sample.height), GREY), reason
    return (change.apply(picture) if change else picture), ""


def turn_overlay(picture: Image.Image, turn: Turn, cell: int) -> Image.Image:
    """The turn's instances over the picture, ``cell`` pixels on the longest side.

    They are labelled where there are several phrases. Those that are hard to see get a ring around them.
    """
    rles = [rle for phrase in turn.phrases for rle in phrase.rles]
    several = len(turn.phrases) > 1 and len(rles) <= LABELLED
    labels = [_short(phrase.text) if several else "" for phrase in turn.phrases for _ in phrase.rles]
    colors = instance_colors(len(rles))
    # No tint: whether the words name the right colour must be seen.
    drawn = overlay(picture, rles, labels, colors=colors, alpha=0.0, min_side=cell, max_side=cell)
    scale = cell / max(picture.size)
    draw = ImageDraw.Draw(drawn)
    for box, color in zip(masks.bboxes(rles, checked=True) * scale, colors, strict=True):
        x1, y1, x2, y2 = box.tolist()
        if max(x2 - x1, y2 - y1) < TINY:
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            draw.ellipse([x - TINY, y - TINY, x + TINY, y + TINY], outline=color, width=2)
    return drawn


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def describe_turn(turn: Turn) -> str:
    """What the answer holds, in a few words."""
    if not turn.phrases:
        return "text only"
    count = sum(len(phrase.rles) for phrase in turn.phrases)
    parts = [f"{count} instance{'s' if count != 1 else ''}" if count else "no target"]
    if len(turn.phrases) > 1:
        parts.append(f"{len(turn.phrases)} phrases")
    if any(phrase.box_only for phrase in turn.phrases):
        parts.append("boxes only")
    return ", ".join(parts)


def contact_sheet(asked: Sequence[Asked], columns: int = 4, cell: int = 300) -> Image.Image:
    """One tile a turn: the instruction, what it is, and its instances over the picture.

    Raises:
        ValueError: nothing to show.
    """
    if not asked:
        raise ValueError("a contact sheet needs at least one turn")
    return grid([_tile(one, cell) for one in asked], columns)


def _tile(one: Asked, cell: int) -> Image.Image:
    picture, reason = picture_of(one.sample, one.change)
    tile = Image.new("RGB", (cell, cell + 8 * _LINE), PAPER)
    end = _write(tile, one.turn.instruction, 0, 15, INK, 3)
    facts = [describe_turn(one.turn), one.turn.kind, one.source, "the picture cannot be shown" if reason else ""]
    end = _write(tile, " · ".join(filter(None, facts)), end, 12, FAINT, 2) + 4
    if picture is None:
        end = _write(tile, f"→ {' '.join(one.turn.answer)}", end, 13, FAINT, 4)
    else:
        shown = turn_overlay(picture, one.turn, cell)
        tile.paste(shown, ((cell - shown.width) // 2, end))
        end += shown.height
    return tile.crop((0, 0, cell, end))


def _write(tile: Image.Image, text: str, top: int, size: int, color: tuple[int, int, int], lines: int) -> int:
    """Wrapped text, line by line; returns where the next line begins."""
    font, draw = text_font(size), ImageDraw.Draw(tile)
    for line in wrap_text(text, font, tile.width, lines):
        draw.text((0, top), line, font=font, fill=color)
        top += _LINE if size > 13 else _LINE - 4
    return top
