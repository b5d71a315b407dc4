"""How large training items are, from the sizes of their samples alone: for samplers and batches by budget.

An item asks some of its sample's turns, newly drawn in every epoch, so all of these are means over what may be asked.
Masks and phrases are exact for samples whose turns are all asked and within all limits; else turns are taken to be
alike, those asked together count as if asked one by one, and what max_length and ``no_target`` leave out, or the end of
a dialogue, is not considered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from instructsam.data.limits import Limits
from instructsam.data.samples import SampleSizes
from instructsam.processing.images import VLMImageTransform

BYTES_PER_TOKEN = 4
"""Of ordinary English, rounded down: better a sequence that is shorter than the estimate than a longer one."""
TEMPLATE_TOKENS = 8
"""Words that a template puts around bare ones, on average."""
PICTURE_TOKENS = 5
"""Markup before a picture, and behind."""
TURN_TOKENS = {True: 7, False: 10}
"""Markup of a turn, by whether turns are independent."""
PHRASE_TOKENS = 4
"""Markup of a phrase, and of its queries."""


def num_masks(sizes: SampleSizes, limits: Limits) -> NDArray[np.float64]:
    """(samples,) masks to match. Of too large phrases the largest alone is taken off."""
    most = limits.processor.num_queries
    gone = sizes.most if limits.too_many_instances == "drop" else sizes.most - most
    masks = np.where(sizes.most > most, sizes.masks - gone, sizes.masks).astype(np.float64)
    return np.minimum(masks * _asked(sizes, limits), limits.composition.max_instances or np.inf)


def num_phrases(sizes: SampleSizes, limits: Limits) -> NDArray[np.float64]:
    """(samples,) phrases, each with its queries. Too large ones that are dropped count."""
    return sizes.phrases * _asked(sizes, limits)


def num_tokens(sizes: SampleSizes, limits: Limits) -> NDArray[np.float64]:
    """(samples,) length of the sequence, max_length at most. The picture's part is exact, that of words an estimate
    from their bytes."""
    words = TURN_TOKENS[limits.independent_turns] * sizes.turns + TEMPLATE_TOKENS * sizes.bare
    words = words + sizes.text_bytes / BYTES_PER_TOKEN + np.maximum(sizes.phrases - sizes.turns, 0)  # and commas
    queries = (limits.processor.num_queries + PHRASE_TOKENS) * sizes.phrases.astype(np.float64)
    tokens = picture_tokens(sizes, limits.processor.vlm_image) + (words + queries) * _asked(sizes, limits)
    return np.minimum(tokens, limits.processor.max_length)


def picture_tokens(sizes: SampleSizes, transform: VLMImageTransform) -> NDArray[np.int64]:
    """(samples,) positions of the pictures, with their markup; 0 where there is none, or one too thin to be shown."""
    both, of = np.unique(sizes.height.astype(np.int64) << 32 | sizes.width, return_inverse=True)
    tokens = np.zeros(len(both), dtype=np.int64)
    for number, size in enumerate(both.tolist()):
        try:
            tokens[number] = PICTURE_TOKENS + transform.num_tokens(size >> 32, size & 0xFFFFFFFF)
        except ValueError:
            continue
    return tokens[of]


def _asked(sizes: SampleSizes, limits: Limits) -> NDArray[np.float64]:
    """(samples,) the part of a sample's turns that an item asks, on average."""
    asked = limits.turns_per_image / np.maximum(sizes.turns, 1)
    if limits.composition.max_phrases is not None:
        asked = np.minimum(asked, limits.composition.max_phrases / np.maximum(sizes.phrases, 1))
    return np.minimum(asked, 1.0)
