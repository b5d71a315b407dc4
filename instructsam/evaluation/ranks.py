"""The processes of one evaluation: who am I, which device is mine, what did the first one find.

Started by ``accelerate launch`` or ``torchrun``, which say all of it in the environment. They exchange no tensors, so
they talk through gloo on every machine. Torch is imported only where there are several.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Result = TypeVar("Result")

# One rank may wait for the slowest as long as that one takes; if one dies the launcher ends the others.
PATIENCE = timedelta(days=7)


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes, where there are any."""
    if launched() > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)


def leave() -> None:
    """Part from them again."""
    if launched() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) of the running process group; (0, 1) without one."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_device(device: str) -> str:
    """The device of this process: with several on NVIDIA GPUs, each its own.

    Raises:
        ValueError: several processes, and one GPU named for all of them.
    """
    if launched() == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ValueError(f"device={device}: {launched()} processes would share it; device=cuda gives each its own GPU")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def _others() -> Iterator[None]:
    """A process that ended is no error of those that wait for it: it has said itself what was wrong."""
    try:
        yield
    except RuntimeError as error:
        if "Connection" not in str(error):
            raise
        raise ValueError("another process of this evaluation stopped; it says why") from error


def on_first(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; its ValueError is every rank's. The others wait for it."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    import torch.distributed as dist

    shared: list[Any] = [None, None]  # result, reason why there is none
    if rank == 0:
        try:
            shared[0] = function()
        except ValueError as error:
            shared[1] = str(error)
    with _others():
        dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise ValueError(shared[1])
    return shared[0]


def wait_for_all() -> None:
    """Until every rank is here."""
    if rank_and_world()[1] > 1:
        import torch.distributed as dist

        with _others():
            dist.barrier()


def gather(mine: Result) -> list[Result]:
    """What each rank holds, on every rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world
    with _others():
        dist.all_gather_object(everyone, mine)
    return everyone
