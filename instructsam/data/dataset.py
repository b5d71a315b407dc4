"""Training data: samples composed, worded and encoded, everything random drawn from (seed, epoch, index).

Items are indexed by the sampler's keys (epoch, index), so that no random state has to be saved: a run that resumes
anywhere, with any number of workers, sees the same items.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from instructsam.data import item_sizes
from instructsam.data.asking import Asking
from instructsam.data.augmentation import Augmentation, PictureChange
from instructsam.data.composition import Composition
from instructsam.data.limits import Limits
from instructsam.data.samples import Mixture, Samples, SampleSizes
from instructsam.errors import DataError, at
from instructsam.processing.image_files import load_image
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample

logger = logging.getLogger(__name__)

_LOGGED = 20
"""So many skipped samples are logged by each worker; the batches name all of them."""


class InstructionDataset(Dataset):
    """Samples with some of their turns, newly drawn in every epoch.

    Args:
        samples: by number, from memory or from disk; those left out are never seen, see ``rows``. A `Mixture` says how
            often an epoch sees each of the others; else it is once.
        processor: encodes them.
        turns_per_image: how many instructions are asked about an image at once (all, if there are fewer).
        independent_turns: turns see the image and themselves only (several instructions share one image's tokens), else
            they form one conversation. Of a dialogue, only the first turn is asked then, as others refer to it.
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
        rows: (usable,) int64, the samples that have something to ask.
        draws: which of these the items of an epoch are.
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
        self.samples = samples if isinstance(samples, Mixture) else Mixture({"samples": samples})
        self.processor = processor
        self.independent_turns = independent_turns
        self.seed = seed
        self.on_bad = on_bad
        self.asking = Asking(composition, augmentation, turns_per_image, independent_turns)
        self.limits = Limits(processor, composition, too_many_instances, on_bad, turns_per_image, independent_turns)
        usable = self.limits.select(self.samples)
        self.rows, self._limited, self.left_out = usable.rows, usable.limited, usable.left_out
        self._skipped = 0
        if not len(self.rows):
            raise ValueError("no sample has a turn to train on")
        self.draws = self.samples.draws(self.rows, seed)

    def __len__(self) -> int:
        return len(self.draws)

    def num_masks(self, epoch: int = 0) -> NDArray[np.float64]:
        """(len,) how many masks each item of an epoch has to match; estimates, see `instructsam.data.item_sizes`."""
        return self._sizes_by(item_sizes.num_masks, epoch)

    def num_phrases(self, epoch: int = 0) -> NDArray[np.float64]:
        """(len,) how many phrases each item of an epoch asks for; see `num_masks`."""
        return self._sizes_by(item_sizes.num_phrases, epoch)

    def num_tokens(self, epoch: int = 0) -> NDArray[np.float64]:
        """(len,) how many tokens each item of an epoch has, its picture's included; see `num_masks`."""
        return self._sizes_by(item_sizes.num_tokens, epoch)

    def _sizes_by(self, measure: Callable[[SampleSizes, Limits], NDArray[Any]], epoch: int) -> NDArray[np.float64]:
        return measure(self.samples.sizes.take(self.rows), self.limits)[self.draws.of_epoch(epoch)]

    def generator(self, key: tuple[int, int]) -> np.random.Generator:
        """The random generator of one item of one epoch."""
        return np.random.default_rng((self.seed, *key))

    def usable(self, index: int, epoch: int = 0) -> Sample:
        """The sample of an item, with everything that may be asked of it, in the source's own words and order."""
        number = self.draws.at(epoch, index)
        return self._within_limits(self._sample(number), number)

    def draw(self, key: tuple[int, int]) -> Sample:
        """The sample with the turns that this epoch asks, as they are asked; flipped if its picture is to be."""
        number = self.draws.at(*key)
        return self._ask(self._sample(number), number, key)[0]

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        number = self.draws.at(*index)
        sample = self._sample(number)
        try:
            asked, change = self._ask(sample, number, index)
            return self._encode(asked, _changed_picture(asked, change) if change else None)
        except DataError as error:
            if self.on_bad == "raise":
                raise
            return self._neutral(sample.id, error)

    def _sample(self, number: int) -> Sample:
        """A usable sample as it was read."""
        return self.samples[int(self.rows[number])]

    def _within_limits(self, sample: Sample, number: int) -> Sample:
        if not self._limited[number]:
            return sample
        return dataclasses.replace(sample, turns=self.limits.usable(sample))

    def _ask(self, sample: Sample, number: int, key: tuple[int, int]) -> tuple[Sample, PictureChange]:
        """What is asked of the usable sample ``number``, and what has to be done to its picture for that."""
        sample, rng = self._within_limits(sample, number), self.generator(key)
        groups = self.asking.groups(sample, rng)
        if self._limited[number]:
            groups = self.limits.fit(sample, groups)
        assert groups, f"sample {sample.id} has nothing to ask"
        return self.asking.ask(sample, groups, rng)

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
