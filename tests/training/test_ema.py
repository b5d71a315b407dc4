"""Averages of the parameters: exact values, in and out of the model without a trace, whole across ranks."""

from __future__ import annotations

import math

import pytest
import torch
from double_precision import CLOSE, difference, float32_is
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from instructsam.training.ema import EMA
from instructsam.training.leaving import leave


def one(value: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), value, dtype=dtype))


def values(parameter: torch.Tensor) -> list[float]:
    return parameter.detach().tolist()


def test_exact_values_with_the_warm_up():
    weight = one(0.0)
    ema = EMA({"weight": weight}, decay=0.2)
    seen = []
    for value in (1.0, 2.0, 4.0):
        weight.data.fill_(value)
        ema.update()
        seen.append(values(ema.state_dict()["weight"])[0])
    # decays min(0.2, 1/10, 2/11, 3/12): the last is the configured one
    first = 0.1 * 0.0 + 0.9 * 1.0
    second = 2 / 11 * first + 9 / 11 * 2.0
    assert seen == pytest.approx([first, second, 0.2 * second + 0.8 * 4.0])


@given(decay=st.floats(0.01, 0.9999), steps=st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_weights_of_the_past_add_up_to_one(decay, steps):
    """A constant stays what it is, and after many updates the start weighs the product of the decays."""
    constant, jump = one(3.0), one(0.0)
    ema = EMA({"constant": constant, "jump": jump}, decay)
    jump.data.fill_(1.0)
    for _ in range(steps):
        ema.update()
    left = math.prod(min(decay, (1 + t) / (10 + t)) for t in range(steps))
    state = ema.state_dict()
    assert values(state["constant"]) == pytest.approx([3.0, 3.0], rel=1e-5)
    assert values(state["jump"]) == pytest.approx([1 - left] * 2, abs=1e-5)
    assert int(state["num_updates"]) == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_leaves_no_trace(dtype):
    weight = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype))
    weight.grad = torch.ones_like(weight)
    before, place = weight.detach().clone(), weight.data_ptr()
    ema = EMA({"weight": weight}, decay=0.5)
    weight.data.add_(1.0)
    changed = weight.detach().clone()
    ema.update()
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32 and torch.allclose(average, 0.1 * before.float() + 0.9 * changed.float())
    calls = []
    ema._after_swap = lambda: calls.append(weight.detach().clone())
    with ema.swapped():
        assert torch.equal(weight, average.to(dtype)) and weight.requires_grad
        with pytest.raises(AssertionError), ema.swapped():
            pass
        with pytest.raises(AssertionError):
            ema.update()
    assert torch.equal(weight, changed) and weight.data_ptr() == place and bool((weight.grad == 1).all())
    assert torch.equal(ema.state_dict()["weight"], average)
    assert torch.equal(calls[0], average.to(dtype)) and torch.equal(calls[1], changed) and len(calls) == 2
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert torch.equal(weight, changed)


def test_gradients_flow_within_swapped():
    """Evaluation may be training of something else: the context switches no gradient off."""
    weight = one(1.0)
    with EMA({"weight": weight}, decay=0.5).swapped():
        (2 * weight).sum().backward()
    assert values(weight.grad) == [2.0, 2.0]


def train(ema: EMA, weight: nn.Parameter, steps: range) -> EMA:
    for step in steps:
        weight.data.fill_(step**0.5)
        ema.update()
    return ema


def test_going_on_from_saved_averages_is_exact():
    weight = one(0.0)
    ema = train(EMA({"weight": weight}, 0.9), weight, range(10))
    saved = ema.state_dict()
    whole = train(ema, weight, range(10, 20)).state_dict()
    resumed = EMA({"weight": weight}, 0.9)
    resumed.load_state_dict(saved)
    assert int(saved["num_updates"]) == 10  # the warm-up goes on, too
    for name, value in train(resumed, weight, range(10, 20)).state_dict().items():
        assert torch.equal(value, whole[name])
    assert not torch.equal(saved["weight"], whole["weight"])  # a copy, not a view


def test_saved_as_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Linear(3, 2)
    ema = EMA(dict(model.named_parameters()), 0.9)
    ema.update()
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    again = EMA(dict(nn.Linear(3, 2).named_parameters()), 0.9)
    again.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert again.num_updates == 1 and torch.equal(again.state_dict()["bias"], model.bias)


def test_mistakes_are_told():
    weight = one(1.0)
    for decay in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="ema_decay must lie between 0 and 1"):
            EMA({"weight": weight}, decay)
    with pytest.raises(ValueError, match="no parameter trains"):
        EMA({}, 0.9)
    ema = EMA({"weight": weight}, 0.9)
    state = ema.state_dict()
    with pytest.raises(ValueError, match="other parameters; without counterpart: bias"):
        ema.load_state_dict({**state, "bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="without counterpart: num_updates"):
        ema.load_state_dict({"weight": state["weight"]})
    with pytest.raises(ValueError, match=r"weight: saved average of shape \(3,\), here it is \(2,\)"):
        ema.load_state_dict({**state, "weight": torch.zeros(3)})
    for shape in ((), (1,), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match="weight: "):
            ema.load_state_dict({**state, "weight": torch.zeros(shape)})
    assert values(ema.state_dict()["weight"]) == [1.0, 1.0], "nothing was taken over"


def test_zero_3_is_refused():
    weight = one(1.0)
    weight.ds_id = 0  # as DeepSpeed marks a parameter that it partitions
    with pytest.raises(ValueError, match="use ZeRO-2, FSDP2 or DDP, or set trainer.ema_decay=0"):
        EMA({"weight": weight}, 0.9)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def step_and_average(model: nn.Module, ema: EMA, steps: int) -> None:
    inputs = torch.linspace(-1, 1, 10).view(2, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        ema.update()


@torch.no_grad()
def evaluate(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(1, 5))


@float32_is(torch.float64)
def _rank(rank: int, folder: str) -> None:
    """One of two FSDP2 ranks; what it works out, in float64, goes to a file."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)  # the last layer is the root's own, and stays gathered after an evaluation

    def reshard() -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    ema = EMA(dict(model.named_parameters()), 0.9, after_swap=reshard)
    step_and_average(model, ema, 3)
    seen = [evaluate(model)]
    with ema.swapped():
        seen.append(evaluate(model))
    seen.append(evaluate(model))
    saved = ema.state_dict()
    again = EMA(dict(model.named_parameters()), 0.9)
    again.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    torch.save({"seen": seen, "saved": saved}, f"{folder}/{rank}.pt")
    dist.barrier()
    leave()


@pytest.mark.multiprocess
@float32_is(torch.float64)
def test_shards_of_fsdp2_average_as_the_whole(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    model = make_model()
    ema = EMA(dict(model.named_parameters()), 0.9)
    step_and_average(model, ema, 3)
    expected = [evaluate(model)]
    with ema.swapped():
        expected.append(evaluate(model))
    expected.append(expected[0])
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert max(difference(a, b) for a, b in zip(found["seen"], expected, strict=True)) < CLOSE
        assert found["saved"].keys() == ema.state_dict().keys()
        averages = {name: value for name, value in ema.state_dict().items() if name != "num_updates"}
        assert all(difference(found["saved"][name], value) < CLOSE for name, value in averages.items())
        assert found["saved"]["num_updates"] == 3
