"""Flipped and tinted pictures, only where what is said about them stays true.

*Flip.* A picture, its masks and boxes are mirrored, and left and right change places in all words: left, leftmost,
left-hand, lefthand, upper-left, leftwards, LEFT and so on. There is no flip where the words would become false or
doubtful:

- something to be read: instructions of the form "ocr", quoted strings, numbers in digits ("number 10", but not "2nd"),
  talk of letters, words, text, numbers, labels or of what something says, clocks and their directions, east and west;
- "right" or "left" that may be no direction: "right behind", "right next to", "right now", "all right", "what is left",
  "left over", "left behind", before or after the flip ("left in front" would become "right in front");
- places in an order, which counts from the left where nothing else is said ("second zebra", "the last elephant in the
  row", "the next dog"), but for those that say where it begins ("2nd from right", "third row from the top");
- abbreviations and misspellings of the two ("guy on L", "rigth"), and words unknown to this file that contain them;
- answers in plain words, which may say more than the picture does.

*Jitter.* Brightness, contrast and saturation are each multiplied by a factor from 1 - strength to 1 + strength. There
is none where a text names a colour or how light or dark something is. Hues are never changed.

Words are English; both are off by default and then draw nothing from the random generator.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from instructsam import masks
from instructsam.data.checks import is_probability
from instructsam.data.reader_options import from_settings
from instructsam.structures import RLE, PhraseTarget, Sample


@dataclass(frozen=True)
class PictureChange:
    """What is done to a picture: mirrored, then its brightness, contrast and saturation multiplied by these factors."""

    flip: bool = False
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __bool__(self) -> bool:
        return self != PictureChange()

    def apply(self, image: Image.Image) -> Image.Image:
        """A changed RGB picture of the same size; the given one is left as it was."""
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, self.factors, strict=True):
            if factor != 1.0:
                image = enhancer(image).enhance(factor)
        return image


@dataclass(frozen=True)
class Augmentation:
    """How often and how much pictures are changed.

    Args:
        flip: probability of mirroring a picture that may be mirrored.
        jitter: strength of the change of brightness, contrast and saturation, 0 to below 1; 0.4 is usual.

    Raises:
        ValueError: values out of range.
    """

    flip: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("flip", self.flip), ("jitter", self.jitter)):
            if not is_probability(value):
                raise ValueError(f"augmentation.{name}={value!r}: must be between 0 and 1")
        if self.jitter == 1:
            raise ValueError("augmentation.jitter=1: would turn pictures black, must be below 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Augmentation:
        """From a configuration. Raises ValueError for an unknown name or a value out of range."""
        return from_settings(cls, "augmentation", values)

    def draw(self, sample: Sample, rng: np.random.Generator) -> PictureChange:
        """What is done to the sample's picture this time; its turns are those that will be asked, not worded yet."""
        if sample.image is None:
            return PictureChange()
        change = PictureChange()
        if self.flip and rng.random() < self.flip and may_be_flipped(sample):
            change = dataclasses.replace(change, flip=True)
        if self.jitter:
            factors = rng.uniform(1 - self.jitter, 1 + self.jitter, 3).tolist()
            if not any(names_colour(text) for turn in sample.turns for text in turn.texts):
                change = dataclasses.replace(change, factors=tuple(factors))
        return change


def may_be_flipped(sample: Sample) -> bool:
    """Does everything said about the sample's picture stay true of the mirrored one, with left and right swapped?"""
    for turn in sample.turns:
        if turn.form == "ocr" or not turn.phrases:
            return False
        if not all(map(sides_are_clear, turn.texts)):
            return False
    return True


def flip_sample(sample: Sample) -> Sample:
    """The sample of the mirrored picture: masks, boxes (of `Sample.objects`) and words."""
    codes = {rle["counts"]: rle for turn in sample.turns for phrase in turn.phrases for rle in phrase.rles}
    codes |= {item["rle"]["counts"]: item["rle"] for item in sample.objects if "rle" in item}
    arrays = masks.decode_batch(codes.values(), sample.height, sample.width, checked=True)
    flipped = dict(zip(codes, masks.encode_batch(arrays[:, :, ::-1]) if codes else (), strict=True))

    def flip_phrase(phrase: PhraseTarget) -> PhraseTarget:
        rles = tuple(flipped[rle["counts"]] for rle in phrase.rles)
        return PhraseTarget(swap_sides(phrase.text), rles, phrase.box_only)

    turns = tuple(
        dataclasses.replace(
            turn,
            instruction=swap_sides(turn.instruction),
            phrases=tuple(map(flip_phrase, turn.phrases)),
            answer=tuple(map(swap_sides, turn.answer)),
        )
        for turn in sample.turns
    )
    objects = tuple(_flip_object(item, flipped, sample.width) for item in sample.objects)
    return dataclasses.replace(sample, turns=turns, objects=objects)


def _flip_object(item: dict[str, Any], flipped: Mapping[str, RLE], width: int) -> dict[str, Any]:
    changed = dict(item)
    if "rle" in item:
        changed["rle"] = flipped[item["rle"]["counts"]]
    if "bbox" in item:
        x, y, w, h = item["bbox"]
        changed["bbox"] = [width - x - w, y, w, h]
    return changed


# ---- left and right ---------------------------------------------------------------------------------------------

_PLACE = "top|upper|bottom|lower|far|mid|middle|center|centre|front|back"
_SIDE = re.compile(
    rf"(?<![^\W_])((?:{_PLACE})?)(left|right)((?:most|hand|handed|ward|wards|side)?)(?![^\W_])", re.IGNORECASE
)
_TOKEN = re.compile(r"[^\W\d_]*(?:left|right)[^\W\d_]*", re.IGNORECASE)
_NO_SIDE = re.compile(r"(up|down|out|forth|copy)?right|(up|down|copy|b|f)right\w*|cleft|wright", re.IGNORECASE)
"""Words that only look as if they named a side; "right" itself is found by `_SIDE` first."""
_OTHER = {"left": "right", "right": "left"}

_READ = (
    r"letters?|words?|texts?|numbers?|numbered|numerals?|digits?|reads?|reading|says?|saying|said|spell\w*|written|"
    r"writings?|writes?|labels?|labell?ed|captions?|inscription\w*|printed|clock\w*|o['’]clock|counterclock\w*|"
    r"anticlock\w*|east\w*|west\w*|starboard|port side|driving"
)
_SHORT = (
    r"l|r|lf|lt|lft|lef|leff|lefft|leftt|letf|lfet|elft|lhs|rhs|lh|rh|rt|rgt|rght|rigt|righ|rigth|rihgt|riht|righht|"
    r"rigjt|rightt|rite"
)
_DOUBTFUL = re.compile(
    "|".join(
        (
            r"[\"“”„«»`]|(?<!\w)['‘][^'’]+['’](?!\w)",  # quoted
            r"(?<!\w)#?\d+(?![^\W\d_])",  # 10, but not 2nd
            rf"\b(?:{_READ}|{_SHORT})\b",
            r"\b(?:all|human|civil|equal)[\s-]+(?:right|left)\b",
            # "is right", "was left", "who left"; but "is left of", "is right side"
            r"(?:\b(?:is|are|was|were|been|being|be|has|have|had|got|gets?|just|already|who|someone|somebody|nobody|he|she|"
            r"they|it|we|you|i|nothing|anything|something|everything|much|more|few|some|any|food|drink|time|space|room)|"
            r"['’](?:s|re|ve|d))\s+(?:left|right)\b(?![\s-]*(?:of|most|hand|side|half|edge|corner)\b)",
            # "right behind", "left over"
            r"\b(?:left|right)\s+(?:about|above|across|after|against|ahead|alone|along|amid|among|around|as|at|away|"
            r"before|behind|below|beneath|beside|between|beyond|by|down|for|from|here|home|in|inside|into|near|next|now|"
            r"off|on|open|out|outside|over|past|there|through|under|underneath|until|up|when|where|within|to(?!\s+(?:the\s+)?"
            r"(?:left|right)\b)|the|a|an|his|her|its|their|my|your|angles?|angled|answers?|choices?|equipment|"
            r"kind|moment|order|place|size|thing|things|time|tool|tools|triangles?|turns?|way|empty|unattended|unused|"
            r"untouched|unfinished|undone)\b",
            r"[,.]\s*(?:left|right)\s*\?",  # a tag: "this one, right?"
        )
    ),
    re.IGNORECASE,
)

_NUMERAL = (
    r"first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\d+(?:st|nd|rd|th)|last|final|"
    r"penultimate|next(?!\s+to\b)"
)
_ORDINAL = re.compile(rf"\b(?:{_NUMERAL})\b(?:(\s+(?:left|right)most)\b)?", re.IGNORECASE)
"""A place in an order; with a group where the word behind says in which."""
_BEGINNING = re.compile(
    r"\bfrom\s+(?:the\s+)?(?:(?:far|very)\s+)?(?:left|right|top|bottom|front|back|rear|above|below)\b", re.IGNORECASE
)


def _orders_are_clear(text: str) -> bool:
    """Does every place in an order come with where the order begins?"""
    open_ends = sum(not found[1] for found in _ORDINAL.finditer(text))
    return open_ends <= len(_BEGINNING.findall(text))


def sides_are_clear(text: str) -> bool:
    """Is nothing in the text to be read in the picture, and does every "left" or "right" in it mean a side?

    A place in an order must say where the order begins, as it is counted from the left else.

    The answer is the same for the text with its sides swapped: no pattern treats the two differently.
    """
    if _DOUBTFUL.search(text) or not _orders_are_clear(text):
        return False
    sides = list(_SIDE.finditer(text))
    known = {found.start(): found.group() for found in sides}
    for found in _TOKEN.finditer(text):
        if known.get(found.start()) != found.group() and not _NO_SIDE.fullmatch(found.group()):
            return False
    return all(found[2].islower() or found[2].isupper() or found[2].istitle() for found in sides)


def swap_sides(text: str) -> str:
    """The text with left and right in each other's place, in all their forms; doing it twice changes nothing."""
    return _SIDE.sub(lambda found: found[1] + _as_written(found[2]) + found[3], text)


def _as_written(side: str) -> str:
    other = _OTHER[side.lower()]
    if side.isupper():
        return other.upper()
    return other.title() if side.istitle() else other if side.islower() else side


# ---- colours ----------------------------------------------------------------------------------------------------

_COLOURS = (
    "red|redd|green|blu|blue|yellow|orang|orange|purpl|purple|violet|pink|brown|black|whit|white|grey|gray|silver|gold|"
    "golden|beige|tan|khaki|maroon|navy|teal|turquoise|cyan|magenta|crimson|scarlet|burgundy|lavender|lilac|indigo|olive|"
    "lime|ivory|cream|amber|bronze|copper|peach|salmon|mauve|fuchsia|blond|blonde|brunette|ginger|redhead|auburn|"
    "rust|charcoal|mustard|mint|aqua|azure|emerald|ruby|sepia|monochrome|multicolou?r|colou?r|tint|hue|shade|shad|tone|"
    "dark|bright|light|lit|pale|dim|dimm|vivid|fad|fade|dull|neon|pastel|shadow|glow|shin|shiny|sunlit|saturat"
)
_COLOUR = re.compile(
    rf"(?<![^\W_])(?:{_COLOURS})(?:ish|er|est|s|y|ly|en|ens|ened|ness|ed|d|ful|less|ing|i?er|i?est|haired|head|headed|"
    r"skinned|colou?red|coloring|colouring)?(?![^\W_])|\bb\s*&\s*w\b|\bb/w\b",
    re.IGNORECASE,
)


def names_colour(text: str) -> bool:
    """Does the text speak of a colour, or of how light or dark something is?"""
    return _COLOUR.search(text) is not None
