"""Exponential moving average of the parameters that train, for evaluation and for the finished model.

Under plain, DDP, ZeRO-1 and ZeRO-2 every rank averages whole parameters, all alike. Under FSDP2 it averages its own
shards; make the EMA after the model is sharded, which puts new parameters in place. Under ZeRO-3 there is nothing on a
rank that could be averaged between the steps, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

COUNT = "num_updates"


class EMA:
    """Averages ``a ← d·a + (1 − d)·p`` of named parameters, float32, on the parameters' devices.

    In update t (from 0) d is ``min(decay, (1 + t) / (10 + t))``: the first weights, which say little, are forgotten
    soon.

    Args:
        parameters: name -> parameter, those that train; the averages start from their values.
        decay: in (0, 1).
        after_swap: called whenever `swapped` has changed the parameters. FSDP2 needs it: the root keeps its gathered
            weights after a forward pass without backward, and would not see the change until it is resharded.

    Raises:
        ValueError: a decay out of range, no parameter, parameters under ZeRO-3.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], decay: float, after_swap: Callable[[], None] | None = None
    ) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"trainer.ema_decay must lie between 0 and 1 (0: no averaging), got {decay}")
        if not parameters:
            raise ValueError("nothing to average: no parameter trains")
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):  # set where ZeRO-3 partitions it
            raise ValueError(
                "trainer.ema_decay does not work under DeepSpeed ZeRO-3, which keeps no whole parameter to average: "
                "use ZeRO-2, FSDP2 or DDP, or set trainer.ema_decay=0"
            )
        self.decay = decay
        self.num_updates = 0
        self._after_swap = after_swap or (lambda: None)
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._averages = [p.detach().to(torch.float32, copy=True) for p in self._parameters]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in; once after every optimizer step. Does not wait for the device."""
        assert not self._swapped, "the model holds the averages themselves"
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        present = [values.float() for values in _here(self._parameters)]  # no copy where it is float32
        torch._foreach_lerp_(_here(self._averages), present, 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Within it the parameters hold the averages, and after it their own values again, bit by bit.

        Takes a copy of the parameters, where between two steps there is room: their gradients' memory is free then.
        """
        assert not self._swapped, "the model holds the averages already"
        own = [values.clone() for values in _here(self._parameters)]
        self._swapped = True
        try:
            self._put(_here(self._averages))
            yield
        finally:
            self._put(own)
            self._swapped = False

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(_here(self._parameters), values)
        self._after_swap()

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """Whole averages by parameter name, float32 on the CPU, and ``num_updates``, int64 ().

        Under FSDP2 the shards are put together, so that another number of ranks can go on: every rank must call it.
        keep: false on the ranks that save nothing: they only take part, and get {}.
        """
        state: dict[str, Tensor] = {}
        for name, average in zip(self._names, self._averages, strict=True):
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if keep:
                state[name] = whole.detach().to("cpu", copy=True)
        return {**state, COUNT: torch.tensor(self.num_updates)} if keep else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`; under FSDP2 every rank must call it, with the whole of it.

        Raises:
            ValueError: averages of other parameters, or of other shapes.
        """
        if wrong := sorted({*self._names, COUNT} ^ set(state)):
            raise ValueError(f"the saved averages are of other parameters; without counterpart: {', '.join(wrong[:5])}")
        for name, average in zip(self._names, self._averages, strict=True):
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name}: saved average of shape {tuple(state[name].shape)}, here it is {tuple(average.shape)}"
                )
        for name, average in zip(self._names, self._averages, strict=True):
            value = state[name].to(average.device, torch.float32)
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)
        self.num_updates = int(state[COUNT])


def _here(tensors: list[Tensor]) -> list[Tensor]:
    """Views of what this rank holds of them: shards of DTensors, plain tensors whole."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]
