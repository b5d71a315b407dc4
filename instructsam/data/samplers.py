"""Which samples a training step sees: an endless, stateless and exactly resumable stream of (epoch, index) keys.

The stream is a pure function of (seed, data set length), the same for every rank: a permutation of each epoch, one
after the other. A step takes the next `global batch` keys, and every rank and micro batch its own slice of them, so
how the global batch is split over ranks and accumulation steps changes nothing, and starting at step s needs no
replay of the steps before.

With sizes to group by (DESIGN section 8: the number of masks) the samples of one step are of similar size, so that no
rank waits for another; the stream is then a function of the sizes and of the global batch too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]

MEGA_BATCH = 50  # steps whose samples are drawn together and sorted: more is more alike, less is more random


def steps_for_epochs(dataset_length: int, global_batch_size: int, epochs: float = 1.0) -> int:
    """Optimizer steps after which `epochs` passes over the data are done (rounded up, at least one)."""
    if dataset_length < 1 or global_batch_size < 1 or epochs <= 0:
        raise ValueError(
            f"dataset_length, global_batch_size and epochs must be positive, got {dataset_length}, "
            f"{global_batch_size}, {epochs}"
        )
    return max(1, int(np.ceil(dataset_length * epochs / global_batch_size)))


class StepSampler(Sampler[list[Key]]):
    """Endless batch sampler of keys (epoch, index); yields one micro batch of this rank at a time.

    Step s (counted from 0) consumes `per_device_batch_size * world_size * accumulation` consecutive keys of the
    stream; micro batch m of rank r is the slice number m * world_size + r of these. An epoch may end in the middle
    of a step.

    group_by: a size for every sample; see `grouped_permutation`. None: plain permutations.

    Raises ValueError for an empty data set, batch sizes below one, a rank outside the world, or sizes that are not
    one finite number a sample.
    """

    def __init__(
        self,
        dataset_length: int,
        per_device_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        start_step: int = 0,
        group_by: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if dataset_length < 1:
            raise ValueError("the training set is empty: nothing to sample from")
        for name, value in [
            ("per_device_batch_size", per_device_batch_size),
            ("world_size", world_size),
            ("accumulation", accumulation),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size} processes")
        if seed < 0 or start_step < 0:
            raise ValueError(f"seed and start_step must not be negative, got {seed} and {start_step}")
        self.dataset_length = dataset_length
        self.per_device_batch_size = per_device_batch_size
        self.world_size = world_size
        self.rank = rank
        self.accumulation = accumulation
        self.seed = seed
        self.start_step = start_step
        self.sizes = None if group_by is None else np.asarray(group_by, dtype=np.float64)
        if self.sizes is not None and (self.sizes.shape != (dataset_length,) or not np.isfinite(self.sizes).all()):
            raise ValueError(
                f"group_by must hold one finite number for each of the {dataset_length} samples, got "
                f"{int(np.isfinite(self.sizes).sum())} in an array of shape {self.sizes.shape}"
            )
        self._orders: dict[int, np.ndarray] = {}

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all ranks and micro batches."""
        return self.per_device_batch_size * self.world_size * self.accumulation

    def epoch_of(self, step: int) -> float:
        """Passes over the data done after `step` optimizer steps."""
        return step * self.global_batch_size / self.dataset_length

    def keys_at(self, step: int, micro: int = 0) -> list[Key]:
        """Keys of micro batch `micro` of step `step` (from 0) on this rank."""
        first = step * self.global_batch_size + (micro * self.world_size + self.rank) * self.per_device_batch_size
        return [self._key(position) for position in range(first, first + self.per_device_batch_size)]

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.start_step
        while True:
            for micro in range(self.accumulation):
                yield self.keys_at(step, micro)
            step += 1

    def _key(self, position: int) -> Key:
        epoch, offset = divmod(position, self.dataset_length)
        return epoch, int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> np.ndarray:
        """Permutation of an epoch, kept only while the stream is near it (a step may touch two epochs)."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            generator = np.random.default_rng([self.seed, epoch])
            if self.sizes is None:
                self._orders[epoch] = generator.permutation(self.dataset_length)
            else:
                head = -epoch * self.dataset_length % self.global_batch_size
                self._orders[epoch] = grouped_permutation(generator, self.sizes, self.global_batch_size, head)
        return self._orders[epoch]


def grouped_permutation(
    generator: np.random.Generator, sizes: np.ndarray, group: int, head: int = 0, mega_batch: int = MEGA_BATCH
) -> np.ndarray:
    """A random permutation whose steps hold samples of similar size.

    The shuffled samples are cut into mega batches of `mega_batch` groups; each is sorted by size (equal ones stay
    shuffled) and cut into groups; the groups of all mega batches are shuffled. Inside a group, sizes rise, so that
    the micro batches that run side by side are the most alike.

    Args:
        sizes: (samples,).
        group: samples of one step.
        head: samples that still belong to the last step of the epoch before. These and the ones left over at the
            end, which share a step with the next epoch's head, are the smallest of the first mega batch.
    """
    order = generator.permutation(len(sizes))
    head = min(head, len(order))
    short = head + (len(order) - head) % group
    first = order[: max(short, group * mega_batch)]
    first = first[np.argsort(sizes[first], kind="stable")]
    rest = np.concatenate([first[short:], order[len(first) :]])
    megas = [rest[start : start + group * mega_batch] for start in range(0, len(rest), group * mega_batch)]
    rows = [mega[np.argsort(sizes[mega], kind="stable")].reshape(-1, group) for mega in megas]
    groups = np.concatenate(rows) if rows else np.empty((0, group), dtype=order.dtype)
    return np.concatenate([first[:head], generator.permutation(groups).reshape(-1), first[head:short]])
