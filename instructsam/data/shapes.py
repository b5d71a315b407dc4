"""Scenes of the tiny world: coloured shapes on a quiet background, drawn with exact masks.

A scene is a function of its random generator alone, so scene i of a split can be made again without the others
(DESIGN section 12). Lengths are given for a picture of 96 pixels and scaled with the picture.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 95, 225),
    "yellow": (242, 214, 30),
    "purple": (150, 55, 190),
    "orange": (245, 135, 20),
}
SIZES = ("small", "large")
TEXTURES = ("solid", "striped")
ATTRIBUTES = ("kind", "color", "size", "texture")

REFERENCE_SIZE = 96
"""Picture size that the lengths below are meant for."""
RADII = {"small": (8.5, 10.0), "large": (14.0, 17.5)}
"""Radius of the circle with the same area as the shape, so that areas compare across kinds."""
MIN_VISIBLE = 0.75
SUPERSAMPLE = 4
MAX_TILT = 8
"""Degrees that shapes are turned by: few, so that no square becomes a diamond and no cross an x."""
STRIPE_PERIOD = 6.0
STRIPE_RIM = 1.6
"""Pixels along the edge without stripes, which keep the outline of small shapes clear."""

# How far a kind reaches from its centre, for a shape with the area of the unit circle.
_STAR_INNER = 0.48
_CROSS_ARM = 0.36
_REACH = {
    "circle": 1.0,
    "square": math.sqrt(math.pi / 2),
    "triangle": math.sqrt(math.pi / (3 * math.sqrt(3) / 4)),
    "star": math.sqrt(math.pi / (5 * _STAR_INNER * math.sin(math.pi / 5))),
    "cross": math.sqrt(math.pi / (8 * _CROSS_ARM - 4 * _CROSS_ARM**2)),
}


@dataclass(frozen=True)
class Shape:
    """What is known about one shape. ``x``, ``y`` (pixels) and ``area`` (pixels) are those of its visible part.

    ``full_area`` is its area if nothing covered it, ``radius`` that of the circle with this area.
    """

    kind: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    area: int
    full_area: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A drawn scene: ``image`` (H, W, 3) uint8; ``masks`` (n, H, W) bool, the visible part of each of ``shapes``."""

    image: np.ndarray
    masks: np.ndarray
    shapes: tuple[Shape, ...]

    @property
    def image_size(self) -> int:
        return int(self.image.shape[0])


def odd_ones(shapes: list[dict[str, str]] | tuple[Shape, ...], attribute: str) -> int | None:
    """Index of the one shape whose ``attribute`` differs while all others share theirs; None if there is no such."""
    values = [shape[attribute] if isinstance(shape, dict) else getattr(shape, attribute) for shape in shapes]
    if len(values) < 4:  # two against one would be a matter of taste
        return None
    counts = Counter(values)
    if len(counts) != 2 or min(counts.values()) != 1:
        return None
    rare = min(counts, key=lambda value: counts[value])
    return values.index(rare)


def sample_scene(rng: random.Random, image_size: int = REFERENCE_SIZE, odd: bool = False) -> Scene:
    """Draw a random scene of 3 to 6 shapes; with ``odd`` one that has an odd one out (4 to 6 shapes)."""
    if image_size < 48:
        raise ValueError(f"image_size={image_size}: the shapes need at least 48 pixels")
    wanted = _odd_attributes(rng) if odd else _attributes(rng)
    return _draw(rng, wanted, image_size)


def _attributes(rng: random.Random) -> list[dict[str, str]]:
    """Attributes of every shape, mostly from few kinds and colours so that single words do not settle who is meant."""
    count = rng.choices((3, 4, 5, 6), weights=(2, 3, 2, 1))[0]
    if rng.random() < 0.75:
        kinds = rng.sample(KINDS, rng.choices((1, 2, 3), weights=(1, 3, 2))[0])
        colors = rng.sample(tuple(COLORS), rng.choices((1, 2, 3), weights=(1, 3, 2))[0])
    else:
        kinds, colors = list(KINDS), list(COLORS)
    striped = rng.choice((0.0, 0.4, 0.4, 0.4))
    return [
        {
            "kind": rng.choice(kinds),
            "color": rng.choice(colors),
            "size": rng.choice(SIZES),
            "texture": "striped" if rng.random() < striped else "solid",
        }
        for _ in range(count)
    ]


def _odd_attributes(rng: random.Random) -> list[dict[str, str]]:
    """Attributes of 4 to 6 shapes of which exactly one stands out, by its kind, colour or texture."""
    values = {"kind": KINDS, "color": tuple(COLORS), "texture": TEXTURES}
    while True:
        count = rng.choice((4, 5, 6))
        odd_attribute = rng.choice(tuple(values))
        odd_index = rng.randrange(count)
        identical = rng.random() < 0.5  # half of these scenes differ in nothing else (but size)
        columns: dict[str, list[str]] = {"size": [rng.choice(SIZES) for _ in range(count)]}
        for name, options in values.items():
            if name == odd_attribute:
                common, rare = rng.sample(options, 2)
                columns[name] = [rare if i == odd_index else common for i in range(count)]
            elif identical:
                columns[name] = [rng.choice(options)] * count
            else:
                columns[name] = [rng.choice(options) for _ in range(count)]
        wanted = [{name: columns[name][i] for name in ATTRIBUTES} for i in range(count)]
        if {odd_ones(wanted, name) for name in ATTRIBUTES} - {None} == {odd_index}:
            return wanted


def _draw(rng: random.Random, wanted: list[dict[str, str]], image_size: int) -> Scene:
    """Place the wanted shapes one over the other, then paint them. Crowded layouts are thrown away and tried again."""
    scale = image_size / REFERENCE_SIZE
    for attempt in range(100):
        if attempt >= 4:  # too much for this picture: make one more of them small
            large = [attributes for attributes in wanted if attributes["size"] == "large"]
            if large:
                rng.choice(large)["size"] = "small"
        placed = _place(rng, wanted, image_size, scale)
        if placed is not None:
            break
    else:
        raise AssertionError("no layout found; this many small shapes always fit")
    canvas = _background(rng, image_size)
    shapes = []
    for attributes, spot in zip(wanted, placed, strict=True):
        ink = _ink(rng, attributes, spot, image_size, scale)
        canvas += spot.coverage[..., None] * (ink - canvas)
        ys, xs = np.nonzero(spot.visible)
        shapes.append(
            Shape(
                **attributes,
                x=float(xs.mean()),
                y=float(ys.mean()),
                area=len(xs),
                full_area=float(spot.coverage.sum()),
                radius=spot.radius,
            )
        )
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, np.stack([spot.visible for spot in placed]), tuple(shapes))


@dataclass
class _Spot:
    """Where a shape lies: ``coverage`` (H, W) float32 in 0…1 of the whole shape, ``visible`` (H, W) bool, ``full``
    pixels of it before anything was put on top."""

    x: float
    y: float
    radius: float
    angle: float
    coverage: np.ndarray
    visible: np.ndarray
    full: int


def _place(rng: random.Random, wanted: list[dict[str, str]], image_size: int, scale: float) -> list[_Spot] | None:
    """A spot for every shape, each on top of those before it; None when one of them found no room."""
    spots: list[_Spot] = []
    for attributes in wanted:
        for _ in range(20):
            radius = rng.uniform(*RADII[attributes["size"]]) * scale
            margin = 0.9 * radius * _REACH[attributes["kind"]]
            x, y = rng.uniform(margin, image_size - margin), rng.uniform(margin, image_size - margin)
            angle = rng.uniform(-1, 1) * math.radians(MAX_TILT)
            coverage = _coverage(attributes["kind"], x, y, radius, angle, image_size)
            mask = coverage >= 0.5
            if _fits(mask, attributes, wanted, spots):
                break
        else:
            return None
        for spot in spots:
            spot.visible = spot.visible & ~mask
        spots.append(_Spot(x, y, radius, angle, coverage, mask, int(mask.sum())))
    return spots


def _fits(mask: np.ndarray, attributes: dict[str, str], wanted: list[dict[str, str]], spots: list[_Spot]) -> bool:
    """Whether a new shape on top leaves enough of the others and touches none that it would blend into."""
    near = mask.copy()
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    for spot, others in zip(spots, wanted, strict=False):
        if others["color"] == attributes["color"] and (spot.visible & near).any():
            return False
        overlap = np.count_nonzero(spot.visible & mask)
        if np.count_nonzero(spot.visible) - overlap < MIN_VISIBLE * spot.full:
            return False
    return True


def _coverage(kind: str, x: float, y: float, radius: float, angle: float, image_size: int) -> np.ndarray:
    """Share of each pixel (H, W) float32 that the shape covers, by drawing it larger and averaging."""
    big = image_size * SUPERSAMPLE
    picture = Image.new("L", (big, big))
    draw = ImageDraw.Draw(picture)
    cx, cy, reach = x * SUPERSAMPLE, y * SUPERSAMPLE, radius * SUPERSAMPLE * _REACH[kind]
    if kind == "circle":
        draw.ellipse((cx - reach, cy - reach, cx + reach, cy + reach), fill=255)
    else:
        cos, sin = reach * math.cos(angle), reach * math.sin(angle)
        draw.polygon([(cx + u * cos - v * sin, cy + u * sin + v * cos) for u, v in _outline(kind)], fill=255)
    return np.asarray(picture.reduce(SUPERSAMPLE), dtype=np.float32) / 255


@lru_cache
def _outline(kind: str) -> tuple[tuple[float, float], ...]:
    """Corners of a kind, upright, reaching 1 from the centre (crosses and squares: their corners or arm ends)."""
    if kind == "square":
        return tuple((a * math.sqrt(0.5), b * math.sqrt(0.5)) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)))
    if kind == "triangle":
        return tuple((math.sin(2 * math.pi * i / 3), -math.cos(2 * math.pi * i / 3)) for i in range(3))
    if kind == "star":
        radii = (1.0, _STAR_INNER) * 5
        return tuple((r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii))
    arm = _CROSS_ARM
    quarter = ((-arm, -1.0), (arm, -1.0), (arm, -arm))
    corners = []
    for turn in range(4):
        for u, v in quarter:
            for _ in range(turn):
                u, v = -v, u
            corners.append((u, v))
    return tuple(corners)


@lru_cache(maxsize=4)
def _grid(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    ys, xs = np.mgrid[0:image_size, 0:image_size].astype(np.float32)
    return xs, ys


def _ink(rng: random.Random, attributes: dict[str, str], spot: _Spot, image_size: int, scale: float) -> np.ndarray:
    """Colour of the shape, (3,) or with stripes (H, W, 3) float32; slightly different every time."""
    base = np.array([channel + rng.uniform(-10, 10) for channel in COLORS[attributes["color"]]], dtype=np.float32)
    if attributes["texture"] == "solid":
        return base
    xs, ys = _grid(image_size)
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    turns = (xs * math.cos(angle) + ys * math.sin(angle)) * (2 * math.pi / (STRIPE_PERIOD * scale)) + phase
    inner = max(spot.radius - STRIPE_RIM * scale, 1.0)
    inside = _coverage(attributes["kind"], spot.x, spot.y, inner, spot.angle, image_size)
    stripe = (inside * np.clip(0.5 + 1.5 * np.sin(turns), 0, 1))[..., None]
    # Dark stripes keep the hue; white ones would turn red to pink.
    return base * (1 - 0.65 * stripe)


def _background(rng: random.Random, image_size: int) -> np.ndarray:
    """Plain colour, gradient or faint noise, (H, W, 3) float32, always near grey and away from the shapes' colours."""

    def near_grey() -> np.ndarray:
        level = rng.uniform(20, 90)
        return np.array([level + rng.uniform(-10, 10) for _ in range(3)], dtype=np.float32)

    style = rng.choice(("plain", "gradient", "noise"))
    canvas = np.empty((image_size, image_size, 3), dtype=np.float32)
    canvas[:] = first = near_grey()
    if style == "gradient":
        second = first + rng.choice((-1, 1)) * rng.uniform(15, 35)
        xs, ys = _grid(image_size)
        angle = rng.uniform(0, 2 * math.pi)
        along = (xs * math.cos(angle) + ys * math.sin(angle)) / image_size
        along = ((along - along.min()) / (along.max() - along.min()))[..., None]
        canvas += along * (second - first)
    elif style == "noise":
        noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(
            (image_size, image_size, 1), dtype=np.float32
        )
        canvas += noise * rng.uniform(3, 8)
    return canvas
