"""How gradients travel, are clipped and applied, and where whole tensors come from, under each engine of accelerate.

    plain, ddp            every process holds everything
    zero1, zero2, zero3   DeepSpeed splits optimizer state, then gradients, then parameters over the processes
    fsdp2                 PyTorch splits all three

Trainer and checkpoints speak to an `Engine` only. Precision is the same under all of them: what trains is float32 and
autocast computes in half precision. (DeepSpeed's own bf16 mode would round the model's weights and its inputs.)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn

from instructsam.models.placement import as_dtype
from instructsam.training.precision import AUTOCAST

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: while one writes a large checkpoint to a slow disk, for instance."""

OptimizerState = dict[str, dict[str, Any]]
"""Parameter name → key of its state ("exp_avg", "step", …) → tensor of the parameter's full shape, or number."""


class Engine:
    """Plain or DDP; and what the other engines have in common with these.

    Attributes:
        name: as in the table above.
        model: the objective as it must be called in training.
        optimizer: what has the parameter groups.
        clips_in_step: the norm of the gradients is not known before the step is taken.
        splits_parameters: no process has whole parameters.
    """

    clips_in_step = False
    splits_parameters = False

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self.name = "plain" if accelerator.distributed_type == DistributedType.NO else "ddp"

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, evaluates: bool = False
    ) -> None:
        """Take over objective and optimizer; before this, they are as in a single process."""
        self._copy = copy.deepcopy(objective) if evaluates and self.splits_parameters else None
        self.objective = objective
        self.clip_norm = clip_norm
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)

    # ------------------------------------------------------------------ a step

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro batch: gradients travel once a step, with the last one."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def forward(self, batch: dict[str, Any], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objective's terms."""
        return self.model(batch, counts)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a sum over this process's share; all shares are added up, not averaged."""
        # Every engine divides by the number of processes, terms are divided by global counts already.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self) -> Tensor | None:
        """Clip the gradients; returns their norm before that, or None where only `step` knows it."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm or float("inf"))
        return _whole(torch.as_tensor(norm))

    def step(self) -> float:
        """Move the parameters, drop the gradients; returns the norm of these where `clip` cannot."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float("nan")

    @property
    def left_out(self) -> bool:
        """Whether the last step was left out, as fp16's scaler and DeepSpeed do with gradients that are not finite."""
        return bool(self.optimizer.step_was_skipped)

    def skip(self) -> None:
        """Drop the gradients of a step that must not be taken."""
        self.optimizer.zero_grad()
        if self.accelerator.scaler is not None and self.precision == "fp16":
            self.accelerator.scaler.update()  # forgets that gradients were unscaled

    # ------------------------------------------------------------------ whole tensors

    def weights(self, frozen: bool) -> dict[str, Tensor]:
        """On the main process: parameters that train (or all of them) and stored buffers, whole, on the CPU.

        Called by all processes; the others get an empty mapping. A tied parameter has its first name only.
        """
        trained = [name for name, p in self.objective.named_parameters() if frozen or p.requires_grad]
        return self._gather([*trained, *stored_buffers(self.objective)])

    def state_dict(self) -> dict[str, Tensor]:
        """On the main process: the objective's state dict, whole, on the CPU. Called by all; the others get {}."""
        return self._gather(self.objective.state_dict())

    def _gather(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers of these names, one after another: whole they are large."""
        parameters = dict(self.objective.named_parameters(remove_duplicate=False))
        buffers = dict(self.objective.named_buffers(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        for name in names:
            tensor = self.whole(parameters[name]) if name in parameters else buffers[name]
            if self.accelerator.is_main_process:
                found |= _to_cpu({name: tensor})
        return found

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter in full; called by all processes."""
        return _whole(parameter.detach())

    def optimizer_state(self) -> OptimizerState:
        """On the main process: the state of every parameter that has one, whole, on the CPU. Called by all."""
        state = self.optimizer.optimizer.state
        found: OptimizerState = {}
        for name, parameter in self._trainable():
            for key, value in state.get(parameter, {}).items():
                whole = _whole(value) if isinstance(value, Tensor) else value  # one at a time: they are large
                if self.accelerator.is_main_process:
                    found.setdefault(name, {}).update(_to_cpu({key: whole}))
        return found

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Undo `optimizer_state`; `state` is whole on every process."""
        optimizer = self.optimizer.optimizer
        names = {id(parameter): name for name, parameter in self._trainable()}
        groups = optimizer.state_dict()["param_groups"]
        order = [p for group in optimizer.param_groups for p in group["params"]]
        by_index = {index: state[names[id(p)]] for index, p in enumerate(order) if names[id(p)] in state}
        optimizer.load_state_dict({"state": by_index, "param_groups": groups})

    def parameters_changed(self) -> None:
        """To be told when parameters have been changed other than by `step`."""

    @contextmanager
    def plain_objective(self) -> Iterator[nn.Module]:
        """The objective with whole parameters, free of the engine, on this process's device: to evaluate.

        Where parameters are split it is a copy, which lies in the host's memory between evaluations. Called by all.
        """
        if self._copy is None:
            yield self.objective
            return
        tensors = dict(self._copy.named_parameters()) | dict(self._copy.named_buffers())
        with torch.no_grad():
            for name, parameter in self.objective.named_parameters():
                tensors[name].copy_(self.whole(parameter))
            for name, buffer in self.objective.named_buffers():
                tensors[name].copy_(buffer)
        try:
            yield self._copy.to(self.accelerator.device)
        finally:
            self._copy.to("cpu")

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.objective.named_parameters() if p.requires_grad)


class FSDP2Engine(Engine):
    """PyTorch's fully_shard: parameters, gradients and optimizer state are DTensors."""

    splits_parameters = True

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        super().__init__(accelerator, precision)
        self.name = "fsdp2"
        if not accelerator.is_fsdp2:
            raise ValueError("the launcher asks for FSDP 1; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, evaluates: bool = False
    ) -> None:
        _refuse_other_optimizers(optimizer, self.name)
        super().prepare(objective, optimizer, clip_norm, evaluates)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        # Gradients travel with every micro batch: kept until the last one they would be whole on every process.
        del last
        return nullcontext()

    def forward(self, batch: dict[str, Any], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        # FSDP's own mixed precision would round inputs, targets and counts.
        if self.precision == "no":
            return self.model(batch, counts)
        dtype = as_dtype(AUTOCAST[self.precision], "precision", auto=False)
        with torch.autocast(self.accelerator.device.type, dtype=dtype):
            return self.model(batch, counts)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, parameter in self._trainable():
            assert isinstance(parameter, DTensor), name

            def split(value: Any, like: DTensor = parameter) -> Any:
                if not isinstance(value, Tensor) or value.shape != like.shape:
                    return value
                return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

            if name in state:
                values = {key: split(value) for key, value in state[name].items()}
                self.optimizer.optimizer.state[parameter] = values

    def parameters_changed(self) -> None:
        self.model.reshard()  # the root keeps its gathered parameters after a forward pass without backward


class ZeroEngine(Engine):
    """DeepSpeed. It clips while it takes the step, and by itself leaves out a step whose gradients are not finite."""

    clips_in_step = True

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        super().__init__(accelerator, precision)
        plugin = accelerator.deepspeed_plugin
        assert plugin is not None
        self.stage = int(plugin.deepspeed_config["zero_optimization"]["stage"])
        self.name = f"zero{self.stage}"
        self.splits_parameters = self.stage == 3
        if self.stage not in (1, 2, 3):
            raise ValueError(f"DeepSpeed without ZeRO (stage {self.stage}) gives nothing over DDP: take ddp.yaml")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, evaluates: bool = False
    ) -> None:
        _refuse_other_optimizers(optimizer, self.name)
        config = self.accelerator.deepspeed_plugin.deepspeed_config  # type: ignore[union-attr]
        # Batches are the sampler's business; DeepSpeed must not scale the loss by any number of its own.
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": clip_norm, "steps_per_print": 10**9}
        if self.precision != "no":
            # Gradients travel in float32, as under DDP: no module is named whose gradients may be rounded.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": AUTOCAST[self.precision],
                "lower_precision_safe_modules": [],
            }
        super().prepare(objective, optimizer, clip_norm, evaluates)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def clip(self) -> Tensor | None:
        return None

    def step(self) -> float:
        self.model.step()
        norm = self.model.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        if not math.isfinite(norm) and self.model.was_step_applied():
            raise RuntimeError(
                "the gradients were not finite, but DeepSpeed has taken the step: start from a checkpoint"
            )
        return norm

    def skip(self) -> None:
        # Gradients live in DeepSpeed's buckets. They are not finite, so it drops them instead of taking the step.
        self.model.step()
        if self.model.was_step_applied():
            raise RuntimeError("the loss was not finite but its gradients were: DeepSpeed has taken the step already")

    def whole(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self.model.optimizer.optimizer
        steps = [float(values["step"]) for values in base.state.values() if "step" in values]
        if not steps:
            return {}
        self._link_moments()
        found: OptimizerState = {}
        for name, parameter in self._trainable():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            if self.accelerator.is_main_process:
                found[name] = _to_cpu({"step": torch.tensor(max(steps)), **moments})
        return found

    def load_optimizer_state(self, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero = self.model.optimizer
        flat = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        if not state:
            return
        step = max(float(values["step"]) for values in state.values())
        for partition in flat:
            moments = {key: torch.zeros_like(partition) for key in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[partition] = {"step": torch.tensor(step), **moments}
        self._link_moments()
        for name, parameter in self._trainable():
            for key in ("exp_avg", "exp_avg_sq"):
                value = state[name][key].to(self.accelerator.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    safe_set_local_optimizer_state(parameter, self._partition(value), key)

    def _link_moments(self) -> None:
        """Tell parameters where their moments are. DeepSpeed does so once, after the first of several groups."""
        if self.stage < 3:
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def _partition(self, value: Tensor) -> Tensor:
        """This process's part of a tensor as ZeRO-3 cuts it: even parts, the last one filled up with zeros."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = -(-value.numel() // world)
        padded = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
        return padded[rank * size : (rank + 1) * size]


def start_engine(precision: str, output_dir: str, trackers: list[str] | None = None) -> Engine:
    """The engine that the launcher asks for (configs/accelerate), on the processes that it started.

    On a CPU PyTorch computes deterministically from then on, with any number of threads.

    Raises:
        RuntimeError: the launcher's processes did not find each other.
        ValueError: an engine or a combination that is not supported.
    """
    wanted = next((name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"), None)
    if wanted and precision == "fp16":
        raise ValueError(f"trainer.precision=fp16 needs a gradient scaler, which {wanted} does without here: take bf16")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("trainer.precision=fp16 needs a GPU; a CPU computes in bf16 or float32")
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    # Without the view, gradients are held twice.
    handlers: list[Any] = [patience, DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if wanted and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        patience.backend = "gloo"
    accelerator = Accelerator(
        mixed_precision="no" if wanted else precision,  # how the others compute in bf16: their `forward` and `prepare`
        # A plugin rather than a number: a launcher's environment would override the number and rescale every loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=cast(Any, trackers or None),
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir),
        kwargs_handlers=handlers,
    )
    if accelerator.device.type == "cpu":
        # Else threads add gradients of indexed tensors up in any order, and no two runs are equal.
        torch.use_deterministic_algorithms(True)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes}: they would "
            "train independently. On CPU set ACCELERATE_USE_CPU=true and launch with torchrun or "
            "`accelerate launch --multi_gpu`."
        )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, precision)
    if kind == DistributedType.FSDP:
        return FSDP2Engine(accelerator, precision)
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"the trainer does not run under {kind.value}; see configs/accelerate")
    if wanted:
        raise ValueError(
            f"the launcher asks for {wanted}, but accelerate takes plain processes ({kind.value}) instead: FSDP2 needs "
            "GPUs; DeepSpeed on a CPU must not meet ACCELERATE_USE_CPU or use_cpu: true"
        )
    return Engine(accelerator, precision)


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict has, by name."""
    stored = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def _refuse_other_optimizers(optimizer: torch.optim.Optimizer, engine: str) -> None:
    if type(optimizer) is not torch.optim.AdamW:
        raise ValueError(
            f"{engine} splits the state of optim.optimizer=adamw only, not of {type(optimizer).__name__}: take "
            "configs/accelerate/ddp.yaml for the others"
        )


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor's full tensor (a collective), or the tensor."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def _to_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """Tensors as contiguous copies on the CPU."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
