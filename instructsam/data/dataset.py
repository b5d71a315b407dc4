"""Training data: samples composed, worded and encoded, everything random drawn from (seed, epoch, index).

Items are indexed by the sampler's keys (epoch, index), so that no random state has to be saved: a run that resumes
anywhere, with any number of workers, sees the same items.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from instructsam.data.augmentation import Augmentation, PictureChange, flip_sample
from instructsam.data.composition import Composition
from instructsam.data.limits import Limits
from instructsam.data.samples import Samples
from instructsam.data.wording import word, word_joint
from instructsam.errors import DataError, at
from instructsam.processing.images import load_image
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample

logger = logging.getLogger(__name__)

_LOGGED = 20
"""So many skipped samples are logged by each worker; the batches name all of them."""


class InstructionDataset(Dataset):
    """Samples with some of their turns, newly drawn in every epoch.

    Args:
        samples: by number, from memory or from disk; those left out are never seen, see ``rows``.
        processor: encodes them.
        turns_per_image: how many instructions are asked about an image at once (all, if there are fewer).
        independent_turns: turns see the image and themselves only (several instructions share one image's tokens), else
            they form one conversation.
        seed: of the draws.
        too_many_instances: what becomes of a phrase with more instances than the processor has queries: "drop" leaves
            it out, "truncate" keeps the first instances, "raise" takes it for a bad record.
        on_bad: bad records are an error ("raise") or left out ("skip"). When the data set is opened: turns with such a
            phrase, or that do not fit the processor's max_length or the composition's limits by themselves. When it is
            drawn: a sample that cannot be encoded (its picture is missing, for instance); the processor's
            `neutral_item` takes its place, the first ones are logged, and the batch lists it under ``skipped_ids``.
        composition: how turns become what is asked, or settings of one.
        augmentation: how pictures are changed, or settings of one; not at all by default.

    What is left out at opening is counted and logged in one line. Turns that fit alone but not together are no bad
    records: the last of a draw are left out until the rest fits.

    Attributes:
        rows: (len,) int64, the samples that have something to ask.
        left_out: counts of what is left out.

    Raises:
        ValueError: wrong settings, a bad record (names the sample), nothing is left to train on.
    """

    def __init__(
        self,
        samples: Samples,
        processor: InstructSAMProcessor,
        turns_per_image: int = 1,
        independent_turns: bool = True,
        seed: int = 0,
        too_many_instances: str = "raise",
        on_bad: str = "raise",
        composition: Composition | Mapping[str, Any] | None = None,
        augmentation: Augmentation | Mapping[str, Any] | None = None,
    ):
        if turns_per_image < 1:
            raise ValueError(f"turns_per_image={turns_per_image}: must be at least 1")
        if not isinstance(composition, Composition):
            composition = Composition.from_mapping(composition or {})
        if not isinstance(augmentation, Augmentation):
            augmentation = Augmentation.from_mapping(augmentation or {})
        self.samples = samples
        self.processor = processor
        self.turns_per_image = turns_per_image
        self.independent_turns = independent_turns
        self.seed = seed
        self.on_bad = on_bad
        self.composition = composition
        self.augmentation = augmentation
        self.limits = Limits(processor, composition, too_many_instances, on_bad, turns_per_image, independent_turns)
        usable = self.limits.select(samples)
        self.rows, self._limited, self.left_out = usable.rows, usable.limited, usable.left_out
        self._skipped = 0
        if not len(self.rows):
            raise ValueError("no sample has a turn to train on")

    def __len__(self) -> int:
        return len(self.rows)

    def num_masks(self) -> NDArray[np.float64]:
        """(len,) how many masks each item has to match, on average over what `draw` may ask: sizes for the sampler.

        Exact for samples that are asked turn by turn and within all limits. Else an estimate, as it comes from the
        samples' sizes: of too large phrases the largest alone is taken off, turns are taken to be alike, those asked
        together count as if asked one by one, and what max_length and ``no_target`` leave out is not considered.
        """
        sizes = self.samples.sizes.take(self.rows)
        most = self.processor.num_queries
        gone = sizes.most if self.limits.too_many_instances == "drop" else sizes.most - most
        masks = np.where(sizes.most > most, sizes.masks - gone, sizes.masks).astype(np.float64)
        asked = self.turns_per_image / np.maximum(sizes.turns, 1)
        if self.composition.max_phrases is not None:
            asked = np.minimum(asked, self.composition.max_phrases / np.maximum(sizes.phrases, 1))
        return np.minimum(masks * np.minimum(asked, 1.0), self.composition.max_instances or np.inf)

    def generator(self, key: tuple[int, int]) -> np.random.Generator:
        """The random generator of one item of one epoch."""
        return np.random.default_rng((self.seed, *key))

    def usable(self, index: int) -> Sample:
        """A sample with everything that may be asked of it, in the source's own words and order."""
        return self._within_limits(self.samples[int(self.rows[index])], index)

    def draw(self, key: tuple[int, int]) -> Sample:
        """The sample with the turns that this epoch asks, as they are asked; flipped if its picture is to be."""
        return self._ask(self.usable(key[1]), key)[0]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        sample = self.samples[int(self.rows[key[1]])]
        try:
            asked, change = self._ask(self._within_limits(sample, key[1]), key)
            return self._encode(asked, _changed_picture(asked, change) if change else None)
        except DataError as error:
            if self.on_bad == "raise":
                raise
            return self._neutral(sample.id, error)

    def _within_limits(self, sample: Sample, index: int) -> Sample:
        if not self._limited[index]:
            return sample
        return dataclasses.replace(sample, turns=self.limits.usable(sample))

    def _ask(self, sample: Sample, key: tuple[int, int]) -> tuple[Sample, PictureChange]:
        """What is asked of a usable sample, and what has to be done to its picture for that."""
        rng = self.generator(key)
        groups = self.composition.draw(sample, rng)[: self.turns_per_image]
        if self._limited[key[1]]:
            groups = self.limits.fit(sample, groups)
        assert groups, f"sample {sample.id} has nothing to ask"
        asked = dataclasses.replace(sample, turns=tuple(turn for group in groups for turn in group))
        change = self.augmentation.draw(asked, rng)
        if change.flip:
            asked = flip_sample(asked)
        turns = iter(asked.turns)
        together = [list(islice(turns, len(group))) for group in groups]
        worded = tuple(word(group[0], rng) if len(group) == 1 else word_joint(group, rng) for group in together)
        return dataclasses.replace(asked, turns=worded), change

    def _encode(self, asked: Sample, picture: Image.Image | None) -> dict[str, Any]:
        return self.processor.encode_sample(asked, self.independent_turns, picture)

    def _neutral(self, sample_id: str, error: DataError) -> dict[str, Any]:
        """What stands for a sample that cannot be encoded."""
        self._skipped += 1
        if self._skipped <= _LOGGED:
            logger.warning("skipped: %s", error)
        return self.processor.neutral_item(sample_id)


def _changed_picture(sample: Sample, change: PictureChange) -> Image.Image:
    assert sample.image is not None
    try:
        return change.apply(load_image(sample.image))
    except ValueError as error:
        raise at(f"sample {sample.id}", error) from error
