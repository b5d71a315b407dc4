"""Speed and size of a run: where the time goes, throughput, floating-point operations, memory, gradient norms.

All of it is cheap: clocks of the host, no waiting for the device. On a GPU kernels run behind the host, so of the
phases only the wait for data means something there; `profiling.Profiler` waits for the device and so times the rest.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from instructsam.files import replace_text

OTHER = "other"
FLOPS_FILE = "flops.json"
NOT_TRAINING = ("evaluation", "checkpoint")  # phases that do not count for the speed


class PhaseTimer:
    """Seconds of the host's clock by phase. Every moment belongs to one phase: the innermost open one, or "other"."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open = [OTHER]
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside under `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call (all time that has passed, whatever it went to)."""
        self._book()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _book(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        return time.perf_counter()


def count_inputs(batch: Mapping[str, Any]) -> dict[str, float]:
    """samples, tokens (input tokens without padding) and phrases of a micro batch; 0 for what it does not have.

    To be called before the batch goes to the device, or else it waits for the device.
    """
    mask, valid = batch.get("attention_mask"), batch.get("target_valid")
    return {
        "samples": float(len(batch.get("sample_ids", ()))),
        "tokens": 0.0 if mask is None else float(mask.sum()),
        "phrases": 0.0 if valid is None else float(len(valid)),
    }


@dataclass(frozen=True)
class Work:
    """What an optimizer step took in and spent.

    samples, tokens, phrases: over all ranks. flops: floating-point operations over all ranks, 0 for unknown.
    data_seconds: waited for batches, mean over ranks. idle_seconds: since the step before on what is not training.
    """

    samples: float
    tokens: float = 0.0
    phrases: float = 0.0
    flops: float = 0.0
    data_seconds: float = 0.0
    idle_seconds: float = 0.0


class Meter:
    """Sums up the steps of a logging interval.

    Args:
        num_processes: ranks, one device each.
        peak_flops: what a device could do a second; None: unknown, no model FLOPs utilisation.
    """

    def __init__(self, num_processes: int = 1, peak_flops: float | None = None) -> None:
        self.num_processes = num_processes
        self.peak_flops = peak_flops
        self.start()

    def start(self) -> None:
        """Begin an interval now."""
        self._since = time.perf_counter()
        self._steps: list[Work] = []

    def add(self, work: Work) -> None:
        """Take in one optimizer step that has just ended."""
        self._steps.append(work)

    def read(self) -> dict[str, float]:
        """Figures of the interval, and begin the next.

        seconds_per_step; samples, tokens and phrases _per_second over all ranks; data_wait, the part of the time spent
        waiting for batches (0 to 1); tflops_per_device achieved, and mfu, that over the peak; memory of this rank (see
        `memory`). Evaluations and checkpoints are left out of the time. What is unknown is left out.
        """

        def total(name: str) -> float:
            return math.fsum(getattr(work, name) for work in self._steps)

        seconds = max(time.perf_counter() - self._since - total("idle_seconds"), 1e-9)
        figures = {
            "seconds_per_step": seconds / max(len(self._steps), 1),
            "samples_per_second": total("samples") / seconds,
            "data_wait": min(total("data_seconds") / seconds, 1.0),
        }
        figures |= {f"{name}_per_second": total(name) / seconds for name in ("tokens", "phrases") if total(name)}
        if all(work.flops for work in self._steps) and (flops := total("flops")):
            achieved = flops / seconds / self.num_processes
            figures["tflops_per_device"] = achieved / 1e12
            if self.peak_flops:
                figures["mfu"] = achieved / self.peak_flops
        self.start()
        return figures | memory()


def memory() -> dict[str, float]:
    """GiB: peak of tensors and of what PyTorch reserved on this rank's GPU, or else the process's peak resident size
    (without data workers), since the process began."""
    if torch.cuda.is_available():
        return {
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_resident_gib": peak * (1 if sys.platform == "darwin" else 1024) / 2**30}


# ---- floating-point operations --------------------------------------------------------------------------------------


class FlopEstimate:
    """Floating-point operations of forward and backward, counted in the first step of a run and scaled by tokens.

    Counts what is executed (matrix products, convolutions, attention; a multiply-add is two operations): what gradient
    checkpointing computes again is in, and attention counts in full under any mask. The utilisation made of it is
    therefore an upper estimate.

    Counting makes autograd add gradients up in another order, which changes their last bits. So that a resumed run
    does as an uninterrupted one, only a run's first step is counted; the result is kept in OUTPUT_DIR/flops.json.

    Compiled modules run uncompiled while counted. With FlexAttention, which would then hold all its scores in memory,
    nothing is counted.

    Args:
        objective: what is trained.
        output_dir: of the run.
        finished_steps: where the run is: 0 counts, more reads what was counted.
        micro_batches: of this rank in the first step; 0 on ranks that are not to count.
    """

    def __init__(
        self, objective: nn.Module, output_dir: str | Path, finished_steps: int = 0, micro_batches: int = 1
    ) -> None:
        self._objective = objective
        self._path = Path(output_dir) / FLOPS_FILE
        self._left = micro_batches if finished_steps == 0 and not _uses_flex_attention(objective) else 0
        self._counted = {"flops": 0.0, "size": 0.0}
        if finished_steps:
            self._counted = _read_count(self._path) or self._counted

    @contextmanager
    def counting(self, inputs: Mapping[str, float]) -> Iterator[None]:
        """Around forward and backward of one micro batch; `inputs` as of `count_inputs`."""
        if not self._left:
            yield
            return
        from torch.utils.flop_counter import FlopCounterMode

        # Without the stance, modules that are first called while counting would never be compiled.
        eager = torch.compiler.set_stance("force_eager") if _is_compiled(self._objective) else nullcontext()
        with eager, FlopCounterMode(display=False, custom_mapping=_attention_formulas()) as counter:
            yield
        self._left -= 1
        self._counted["flops"] += float(counter.get_total_flops())
        self._counted["size"] += _size(inputs)
        if not self._left:
            replace_text(self._path, json.dumps(self._counted) + "\n")

    def of(self, inputs: Mapping[str, float]) -> float:
        """Estimate for inputs of a given size; 0 where nothing is counted."""
        counted = self._counted
        return counted["flops"] / counted["size"] * _size(inputs) if counted["size"] else 0.0


def _read_count(path: Path) -> dict[str, float] | None:
    """What an earlier start has counted; None where there is nothing, or nothing sound."""
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(counted[name]) for name in ("flops", "size")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _size(inputs: Mapping[str, float]) -> float:
    return inputs["tokens"] or inputs["samples"]


def _uses_flex_attention(objective: nn.Module) -> bool:
    configs = (getattr(module, "config", None) for module in objective.modules())
    return any(getattr(config, "_attn_implementation", None) == "flex_attention" for config in configs)


def _is_compiled(objective: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in objective.modules()
    )


def _attention_formulas() -> dict[Any, Any]:
    """PyTorch's formulas miss the CPU's kernel, and some versions refuse grouped queries: ours serve all kernels."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        (batch, heads, length, size), (keys, out) = query, (key[-2], value[-1])
        return 2 * batch * heads * length * keys * (size + out)

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        (batch, heads, length, size), (keys, out) = query, (key[-2], value[-1])
        # Scores once more, then the gradients of query, key (size each), weights and value (out each).
        return 2 * batch * heads * length * keys * (3 * size + 2 * out)

    formulas = {}
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
        for suffix, formula in (("", forward), ("_backward", backward)):
            name = f"_scaled_dot_product_{kernel}{suffix}"
            if operator := getattr(torch.ops.aten, name, None):
                formulas[operator] = formula
    return formulas


# Dense peaks as published, in TFLOP/s: bfloat16 or float16 with float32 accumulation, TensorFloat-32, float32.
_PEAKS: dict[str, tuple[float, float, float]] = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": (312.0, 156.0, 19.5),
    r"NVIDIA H100 80GB HBM3": (989.4, 494.7, 66.9),
    r"NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    r"NVIDIA H200": (989.4, 494.7, 66.9),
    r"NVIDIA L40S": (362.0, 183.0, 91.6),
    r"NVIDIA L4": (121.0, 60.0, 30.3),
    r"NVIDIA A10": (125.0, 62.5, 31.2),
    r"NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    r"NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
}


def peak_flops(device_name: str, precision: str, tf32: bool = False) -> float | None:
    """Floating-point operations a second that a device could do at best; None for one not in the table.

    Args:
        device_name: as of torch.cuda.get_device_name.
        precision: "no" (float32), "bf16" or "fp16".
        tf32: matrix products of float32 may round to TensorFloat-32.
    """
    for pattern, (half, tensor_float, single) in _PEAKS.items():
        if re.fullmatch(pattern, device_name):
            return 1e12 * (half if precision != "no" else tensor_float if tf32 else single)
    return None


def peak_of(device: torch.device, precision: str, peak_tflops: float | None = None) -> float | None:
    """`peak_flops` of a device of this machine, or what the user gave in TFLOP/s; None where neither is known."""
    if peak_tflops is not None:
        if not math.isfinite(peak_tflops) or peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be a positive number of TFLOP/s or null, got {peak_tflops}")
        return 1e12 * peak_tflops
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision() != "highest")


# ---- gradients ------------------------------------------------------------------------------------------------------


def group_norms(
    optimizer: Optimizer, grad_norm: Tensor | float | None = None, max_norm: float = math.inf
) -> dict[str, Tensor]:
    """Norm of the gradient of each configured group, its parts (NAME/depth_1/no_decay) as one: float32 scalars.

    No waiting for the device. Groups without gradients are left out. Under plain, DDP and FSDP2 (DTensors: a small
    reduction a group, so call it on all ranks); under DeepSpeed, which keeps the gradients to itself, it gives {}.

    Args:
        optimizer: its groups have a `name`.
        grad_norm, max_norm: what `clip_grad_norm_` gave and was given, if the gradients are clipped already: the norms
            are those before.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        grads: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                grads[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
        for mesh, tensors in grads.items():
            norm: Any = get_total_norm(tensors)
            parts[group["name"].split("/")[0]].append(norm if mesh is None else norm.full_tensor())
    norms = {name: get_total_norm([part.float() for part in found]) for name, found in parts.items()}
    if norms and grad_norm is not None and math.isfinite(max_norm):
        # The inverse of the factor that torch clips with.
        unclip = ((torch.as_tensor(grad_norm) + 1e-6) / max_norm).clamp(min=1.0)
        norms = {name: norm * unclip.to(norm) for name, norm in norms.items()}
    return norms
