"""Which samples a training step sees: an endless and exactly resumable stream of (epoch, index) keys.

The stream is the same for every rank: an order of each epoch's samples, one epoch after the other, cut into micro
batches. An optimizer step takes the next `world_size * accumulation` of these, of which every rank has its own. How far
training has come is a single number, the samples consumed by all ranks: a run goes on from there with any number of
ranks and any accumulation, and no step before it is replayed.

With a fixed batch size an epoch is a random permutation and micro batches run on across its end. With sizes to group by
(DESIGN section 8: the number of masks) the samples of one step are of similar size, so that no rank waits for another.
With budgets (`instructsam.data.budgets`) micro batches have as many samples as fit, and end with the epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from instructsam.data.budgets import Budgets, Plan, Sizes, checked

logger = logging.getLogger(__name__)

Key = tuple[int, int]

MEGA_BATCH = 50  # steps whose samples are drawn together and sorted: more is more alike, less is more random
_PLANS_KEPT = 3
"""Of the last epochs asked for: reading runs ahead of training, and a step may touch two."""


class DistributedBatchSampler(Sampler[list[Key]]):
    """Endless batch sampler of keys (epoch, index); yields one micro batch of this rank at a time.

    The step that starts at a position takes `world_size * accumulation` micro batches from there; micro batch m of rank
    r is number m * world_size + r of these.

    Args:
        dataset_length: samples of an epoch.
        per_device_batch_size: samples of a micro batch; None with ``budgets``.
        seed: of all orders.
        group_by: a size of every sample, or a function of the epoch that gives them. See `grouped_permutation` and
            `Budgets.plan`. None: plain permutations.
        budgets: cut micro batches by what their samples cost. What epochs look like then depends on no rank or
            accumulation at all.

    Attributes:
        position: samples consumed by all ranks since the run began. Iteration starts here; the trainer moves it, by
            `samples_in_step`, when a step is done (what is read ahead does not).
        group: with sizes to group by and a fixed batch size, the samples that were grouped together: those of a step of
            the run's first start. `load_state_dict` keeps it, so that the orders stay what they were.

    Raises:
        ValueError: an empty data set, batch sizes below one, a rank outside the world, a batch size and budgets or
            neither, sizes that are not one finite number a sample.
    """

    def __init__(
        self,
        dataset_length: int,
        per_device_batch_size: int | None,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        group_by: Sequence[float] | NDArray[np.float64] | Sizes | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        if dataset_length < 1:
            raise ValueError("the training set is empty: nothing to sample from")
        if (per_device_batch_size is None) == (budgets is None):
            raise ValueError(
                "give either per_device_batch_size or budgets (tokens_per_batch, phrases_per_batch), got "
                f"per_device_batch_size={per_device_batch_size} and {'no ' if budgets is None else ''}budgets"
            )
        per_device = {} if per_device_batch_size is None else {"per_device_batch_size": per_device_batch_size}
        for name, value in {**per_device, "world_size": world_size, "accumulation": accumulation}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size} processes")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset_length = dataset_length
        self.per_device_batch_size = per_device_batch_size
        self.world_size = world_size
        self.rank = rank
        self.accumulation = accumulation
        self.seed = seed
        self.budgets = budgets
        self.position = 0
        self._group_by = (
            group_by if group_by is None or callable(group_by) else checked(group_by, dataset_length, "group_by")
        )
        self.group = self.global_batch_size if group_by is not None else None
        self._plans: dict[int, Plan] = {}
        self._batches: int | None = None
        self._warned = False

    @property
    def micro_batches_in_step(self) -> int:
        """Over all ranks."""
        return self.world_size * self.accumulation

    @property
    def global_batch_size(self) -> int | None:
        """Samples per optimizer step over all ranks and micro batches; None with budgets, where it varies."""
        return None if self.per_device_batch_size is None else self.per_device_batch_size * self.micro_batches_in_step

    # ---- how far, and how long --------------------------------------------------------------------------------------

    def samples_in_step(self, position: int) -> int:
        """Samples that the step starting at `position` takes over all ranks; the same on every rank.

        Raises:
            ValueError: with budgets, no micro batch starts there.
        """
        if self.global_batch_size is not None:
            return self.global_batch_size
        end = position
        for _ in range(self.micro_batches_in_step):
            end = self._end(end)
        return end - position

    def epoch_of(self, position: int) -> float:
        """Passes over the data done at a position."""
        return position / self.dataset_length

    def total_samples(self, epochs: float) -> int:
        """Samples of so many epochs, rounded up. Raises ValueError unless epochs is above 0."""
        if not epochs > 0:
            raise ValueError(f"epochs must be above 0, got {epochs}")
        return max(1, int(np.ceil(self.dataset_length * epochs)))

    @property
    def samples_per_step(self) -> float:
        """The global batch size; with budgets its mean, as if all epochs had as many batches as the first."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        if self._batches is None:  # planning takes seconds
            self._batches = len(self.plan(0).ends)
        return self.dataset_length * self.micro_batches_in_step / self._batches

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to go on from `position`; fit for JSON."""
        return {"samples": self.position, "group": self.group, "budgets": self._limits()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run was.

        Raises:
            ValueError: it had other budgets, or a batch size in place of them: its epochs were cut in other places.
        """
        if state["budgets"] != self._limits():
            raise ValueError(
                f"the run had [tokens_per_batch, phrases_per_batch] = {state['budgets']} and now has {self._limits()} "
                "(None: a fixed batch size): go on with what it had, or start a new run"
            )
        if (state["group"] is None) != (self.group is None):
            raise ValueError("the run grouped samples by size and now does not, or the other way round (data.group_by)")
        self.position, self.group = int(state["samples"]), state["group"]
        self._plans.clear()

    def _limits(self) -> list[int | None] | None:
        return None if self.budgets is None else [self.budgets.tokens_per_batch, self.budgets.phrases_per_batch]

    # ---- the stream -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[Key]]:
        start = self.position
        for number in count():
            end = self._end(start)
            if number % self.world_size == self.rank:
                yield self._keys(start, end)
            start = end

    def keys_at(self, position: int, micro: int = 0) -> list[Key]:
        """Keys of this rank's micro batch `micro` of the step that starts at `position`."""
        start = position
        for _ in range(micro * self.world_size + self.rank):
            start = self._end(start)
        return self._keys(start, self._end(start))

    def plan(self, epoch: int) -> Plan:
        """The order of an epoch, and with budgets its micro batches."""
        if epoch not in self._plans:
            self._plans = dict([*self._plans.items()][1 - _PLANS_KEPT :])
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        generator, length = np.random.default_rng([self.seed, epoch]), self.dataset_length
        sizes = checked(self._group_by(epoch), length, "group_by") if callable(self._group_by) else self._group_by
        if self.budgets is not None:
            plan = self.budgets.plan(generator, length, epoch, sizes)
            if plan.oversized and not self._warned and self.rank == 0:
                self._warned = True
                logger.warning(
                    "%d of %d samples are beyond tokens_per_batch=%s or phrases_per_batch=%s by themselves: each is a "
                    "micro batch of its own",
                    *(plan.oversized, length, *(self._limits() or ())),
                )
            return plan
        whole = np.array([length])
        if sizes is None:
            return Plan(generator.permutation(length), whole)
        assert self.group is not None
        return Plan(grouped_permutation(generator, sizes, self.group, -epoch * length % self.group), whole)

    def _end(self, start: int) -> int:
        """Where the micro batch that starts at a position ends."""
        if self.per_device_batch_size is not None:
            return start + self.per_device_batch_size
        epoch, offset = divmod(start, self.dataset_length)
        ends = self.plan(epoch).ends
        number = int(np.searchsorted(ends, offset, side="right"))
        if offset and ends[number - 1] != offset:
            raise ValueError(
                f"no micro batch starts at sample {start}: data or budgets are not those the run began with"
            )
        return epoch * self.dataset_length + int(ends[number])

    def _keys(self, start: int, end: int) -> list[Key]:
        keys = (divmod(position, self.dataset_length) for position in range(start, end))
        return [(epoch, int(self.plan(epoch).order[offset])) for epoch, offset in keys]


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
