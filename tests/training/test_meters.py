"""Times by phase, rates, counted operations against hand calculations, norms of groups against direct ones."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from double_precision import CLOSE, difference, float64
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from instructsam.training import meters
from instructsam.training.meters import FlopEstimate, Meter, PhaseTimer, Work, count_inputs, group_norms, peak_flops


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now, self.asked = 100.0, 0

    def perf_counter(self) -> float:
        self.asked += 1
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


# ---- phases and rates -----------------------------------------------------------------------------------------------


def test_every_moment_belongs_to_the_innermost_phase(clock):
    timer = PhaseTimer()
    clock.pass_(1)
    with timer.phase("forward"):
        clock.pass_(2)
        with timer.phase("data"):
            clock.pass_(4)
        clock.pass_(8)
    with pytest.raises(KeyError), timer.phase("data"):
        clock.pass_(16)
        raise KeyError
    clock.pass_(32)
    assert timer.take() == {"other": 33, "forward": 10, "data": 20}
    clock.pass_(5)
    assert timer.take() == {"other": 5}


def test_a_phase_asks_for_the_time_twice(clock):
    """Once at either end: it costs next to nothing."""
    timer = PhaseTimer()
    before = clock.asked
    with timer.phase("data"):
        pass
    assert clock.asked - before == 2


def test_rates_of_an_interval(clock):
    meter = Meter(num_processes=2, peak_flops=1e12)
    for samples in (4, 8):
        clock.pass_(5)
        meter.add(Work(samples, tokens=100 * samples, phrases=2, flops=3e12, data_seconds=1, idle_seconds=3))
    figures = meter.read()
    memory = {key: figures.pop(key) for key in list(figures) if key.endswith("_gib")}
    assert figures == pytest.approx(
        {
            "seconds_per_step": 2.0,
            "samples_per_second": 3.0,
            "data_wait": 0.5,
            "tokens_per_second": 300.0,
            "phrases_per_second": 1.0,
            "tflops_per_device": 0.75,
            "mfu": 0.75,
        }
    )
    assert memory and all(0.01 < value < 1000 for value in memory.values())
    clock.pass_(1)
    meter.add(Work(5))
    again = meter.read()
    assert again["samples_per_second"] == 5.0 and again["data_wait"] == 0.0
    assert not {"tokens_per_second", "tflops_per_device", "mfu"} & set(again), "what is unknown is left out"


def test_a_step_of_unknown_operations_leaves_the_intervals_unknown(clock):
    meter = Meter(peak_flops=1e12)
    for flops in (4e12, 0.0):
        clock.pass_(1)
        meter.add(Work(1, flops=flops))
    assert not {"tflops_per_device", "mfu"} & set(meter.read())


def test_no_utilisation_without_a_peak(clock):
    meter = Meter()
    clock.pass_(2)
    meter.add(Work(1, flops=4e12))
    figures = meter.read()
    assert figures["tflops_per_device"] == 2.0 and "mfu" not in figures


def test_inputs_are_counted_without_padding():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    batch = {"sample_ids": ["a", "b"], "attention_mask": mask, "target_valid": torch.zeros(7, 2)}
    assert count_inputs(batch) == {"samples": 2, "tokens": 5, "phrases": 7}
    assert count_inputs({"sample_ids": ["a"], "x": torch.zeros(1)}) == {"samples": 1, "tokens": 0, "phrases": 0}


# ---- floating-point operations --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Linear to query, key and value, masked attention, linear out."""

    def __init__(self, heads: int = 2, size: int = 8, again: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.again = heads, size, again
        self.inner = nn.Linear(heads * size, 3 * heads * size)
        self.outer = nn.Linear(heads * size, heads * size)

    def attend(self, x_BLC):
        parts = self.inner(x_BLC).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        length = x_BLC.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        return self.outer(F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x_BLC):
        return recompute(self.attend, x_BLC, use_reentrant=False) if self.again else self.attend(x_BLC)


def count(model: nn.Module, x, folder) -> float:
    estimate = FlopEstimate(model, folder)
    inputs = {"samples": float(len(x)), "tokens": float(x.shape[0] * x.shape[1]), "phrases": 0.0}
    with estimate.counting(inputs):
        model(x).sum().backward()
    return estimate.of(inputs)


@pytest.mark.parametrize("again", [False, True])
def test_the_count_is_the_one_by_hand(again, tmp_path):
    B, L, heads, size = 3, 10, 2, 8
    C = heads * size
    x = torch.randn(B, L, C, requires_grad=True)
    linears = 2 * B * L * C * (3 * C + C)
    attention = 2 * B * heads * L * L * size * 2
    # Backward: two products for each of a linear's one; five for attention's two, of which one is done again.
    expected = 3 * linears + attention * (1 + 5 / 2)
    if again:
        expected += linears + attention  # the forward pass once more
        expected -= 2 * B * L * C * C  # nothing needs what the last linear gives
    assert count(Attention(heads, size, again), x, tmp_path) == expected


def test_grouped_queries_are_counted_with_all_query_heads(tmp_path):
    class Grouped(nn.Module):
        def forward(self, x):
            query = x.expand(1, 4, 6, 8)
            key = x.expand(1, 4, 6, 8)[:, :2]
            return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    x = torch.randn(1, 1, 6, 8)
    estimate = FlopEstimate(Grouped(), tmp_path)
    with estimate.counting({"samples": 1.0, "tokens": 0.0, "phrases": 0.0}), torch.no_grad():
        Grouped()(x)
    assert estimate.of({"samples": 1.0, "tokens": 0.0, "phrases": 0.0}) == 2 * 4 * 6 * 6 * 16


def test_values_of_another_width_than_keys_are_counted_by_theirs():
    query, key, value = (1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 3)
    pairs = 2 * 1 * 2 * 5 * 7  # a multiply-add is two operations
    formulas = meters._attention_formulas()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert formulas[kernel](query, key, value) == pairs * (8 + 3)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # Of width 8: the scores again, gradients of query and key; of width 3: gradients of weights and values.
    assert formulas[backward](value, query, key, value) == pairs * (3 * 8 + 2 * 3)


def test_the_estimate_scales_with_tokens_and_counts_only_the_first(tmp_path):
    model = nn.Linear(4, 4)
    estimate = FlopEstimate(model, tmp_path, micro_batches=2)
    for rows in (2, 6, 1000):
        with estimate.counting({"samples": 1.0, "tokens": float(rows), "phrases": 0.0}):
            out = model(torch.randn(rows, 4))
            (out if rows < 1000 else out @ torch.ones(4, 4)).sum().backward()
    per_row = 2 * 4 * 4 * 2  # forward and the gradient of the weights; the input needs none
    inputs = {"samples": 9.0, "tokens": 10.0, "phrases": 0.0}
    assert estimate.of(inputs) == pytest.approx(10 * per_row)
    resumed = FlopEstimate(model, tmp_path, finished_steps=3, micro_batches=2)
    with resumed.counting(inputs):
        model(torch.randn(10, 4)).sum().backward()
    assert resumed.of(inputs) == estimate.of(inputs)
    assert FlopEstimate(model, tmp_path / "other", finished_steps=3).of(inputs) == 0
    assert FlopEstimate(model, tmp_path, micro_batches=0).of(inputs) == 0, "a run from the start counts anew"


@pytest.mark.parametrize(
    "damaged", [b"", b'{"flops": 1', b"[]", b'{"flops": 1.0}', b'{"flops": null, "size": 1}', b"\xff"]
)
def test_a_damaged_count_is_unknown(damaged, tmp_path):
    (tmp_path / "flops.json").write_bytes(damaged)
    assert FlopEstimate(nn.Linear(1, 1), tmp_path, 3).of({"samples": 1.0, "tokens": 1.0, "phrases": 0.0}) == 0


def test_a_kill_while_a_count_is_written_leaves_none(tmp_path, monkeypatch):
    estimate, inputs = FlopEstimate(nn.Linear(4, 4), tmp_path), {"samples": 1.0, "tokens": 1.0, "phrases": 0.0}

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", kill)
    with pytest.raises(KeyboardInterrupt), estimate.counting(inputs):
        pass
    assert not (tmp_path / "flops.json").exists()


def test_by_samples_where_there_are_no_tokens(tmp_path):
    model = nn.Linear(4, 4)
    estimate = FlopEstimate(model, tmp_path)
    inputs = {"samples": 5.0, "tokens": 0.0, "phrases": 0.0}
    with estimate.counting(inputs):
        model(torch.randn(5, 4)).sum().backward()
    assert estimate.of({**inputs, "samples": 10.0}) == 2 * 5 * 2 * 4 * 4 * 2


@pytest.mark.slow
@float64()
def test_the_tiny_model_is_counted_and_a_resumed_run_is_exact(world, tmp_path):
    from tiny_fixtures import settings_of

    from instructsam.training.build import build_task

    task = build_task(settings_of("train", f"data.root={world}"))
    batch = task.collate([task.dataset[0, index] for index in range(2)])
    counts = {name: torch.tensor(value) for name, value in task.objective.count_units(batch).items()}
    inputs = count_inputs(batch)
    assert inputs["samples"] == 2 and inputs["tokens"] == batch["attention_mask"].sum()
    assert inputs["phrases"] == counts["phrases"]

    def gradients(estimate: FlopEstimate | None) -> list[torch.Tensor]:
        task.objective.zero_grad()
        with nullcontext() if estimate is None else estimate.counting(inputs):
            sum(task.objective(batch, counts).values()).backward()
        return [p.grad for p in task.objective.parameters() if p.grad is not None]

    first = FlopEstimate(task.objective, tmp_path)
    plain, counted = gradients(None), gradients(first)
    later = [gradients(first), gradients(FlopEstimate(task.objective, tmp_path, finished_steps=1))]
    for found in later:
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    whole = [torch.cat([g.flatten() for g in found]) for found in (plain, counted)]
    assert difference(whole[1], whole[0]) < CLOSE
    # 6 x tokens x parameters is the order of it: each token passes the language model, pictures the two encoders.
    rule = 6 * inputs["tokens"] * sum(p.numel() for p in task.objective.parameters())
    assert 0.3 * rule < first.of(inputs) < 10 * rule


def test_flex_attention_is_not_counted(tmp_path):
    class Config:
        _attn_implementation = "flex_attention"

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].config = Config()
    inputs = {"samples": 1.0, "tokens": 1.0, "phrases": 0.0}
    estimate = FlopEstimate(model, tmp_path)
    with estimate.counting(inputs):
        model(torch.randn(1, 2))
    assert estimate.of(inputs) == 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [False, True])
def test_compiled_modules_are_counted_and_compiled_afterwards(wrap, tmp_path):
    from torch._dynamo.testing import CompileCounter

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu()

    torch._dynamo.reset()
    backend = CompileCounter()
    model = nn.Sequential(Encoder(), nn.Linear(8, 8))
    if wrap:
        model[0] = torch.compile(model[0], backend=backend)
    else:
        model[0].compile(backend=backend)
    inputs = {"samples": 1.0, "tokens": 4.0, "phrases": 0.0}
    estimate, x = FlopEstimate(model, tmp_path), torch.randn(4, 8)
    with estimate.counting(inputs):
        model(x)
    assert estimate.of(inputs) == 2 * 2 * 4 * 8 * 8 and backend.frame_count == 0
    model(x)
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4e12),
        ("NVIDIA H100 80GB HBM3", "no", True, 494.7e12),
        ("NVIDIA H100 80GB HBM3", "no", False, 66.9e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
        ("NVIDIA H100 NVL", "bf16", False, None),
        ("NVIDIA A100-SXM4-80GB", "fp16", False, 312e12),
        ("NVIDIA A100-PCIE-40GB", "bf16", False, 312e12),
        ("NVIDIA A10G", "bf16", False, None),
        ("NVIDIA L4", "bf16", False, 121e12),
        ("NVIDIA L40S", "bf16", False, 362e12),
        ("cpu", "bf16", False, None),
    ],
)
def test_peaks(name, precision, tf32, peak):
    assert peak_flops(name, precision, tf32) == (peak and pytest.approx(peak))


def test_the_user_may_give_the_peak():
    cpu = torch.device("cpu")
    assert meters.peak_of(cpu, "bf16") is None
    assert meters.peak_of(cpu, "bf16", 2.5) == 2.5e12
    with pytest.raises(ValueError, match="peak_tflops"):
        meters.peak_of(cpu, "bf16", 0)


# ---- gradients ------------------------------------------------------------------------------------------------------


def grouped_optimizer() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Groups a (in two halves), b, and c without gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (6,), (8, 2), (3,))]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    names = ("a", "a/depth_1/no_decay", "b", "c")
    groups = [{"name": name, "params": [p]} for name, p in zip(names, parameters, strict=True)]
    return parameters, torch.optim.AdamW(groups)


def expected_norms(parameters: list[nn.Parameter]) -> dict[str, float]:
    first, second, third = (p.grad.double() for p in parameters[:3])
    return {
        "a": math.sqrt(first.square().sum() + second.square().sum()),
        "b": math.sqrt(third.square().sum()),
    }


def values(norms) -> dict[str, float]:
    return {name: norm.item() for name, norm in norms.items()}


def test_group_norms():
    parameters, optimizer = grouped_optimizer()
    assert values(group_norms(optimizer)) == pytest.approx(expected_norms(parameters))
    optimizer.zero_grad()
    assert group_norms(optimizer, None, 1.0) == {}


@pytest.mark.parametrize("max_norm", [0.5, 100.0, math.inf])
def test_group_norms_are_those_before_clipping(max_norm):
    parameters, optimizer = grouped_optimizer()
    expected = expected_norms(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    assert values(group_norms(optimizer, norm, max_norm)) == pytest.approx(expected, rel=1e-5)


def test_group_norms_of_sharded_gradients(tmp_path):
    """DTensors, as under FSDP2, mixed with plain tensors; one process, so that the shards are whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    parameters, optimizer = grouped_optimizer()
    expected = expected_norms(parameters)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for index, placement in ((0, Shard(0)), (2, Replicate())):
            old = parameters[index]
            new = nn.Parameter(distribute_tensor(old.detach(), mesh, [placement]))
            new.grad = distribute_tensor(old.grad, mesh, [placement])
            optimizer.param_groups[index]["params"] = [new]
        norms = group_norms(optimizer)
        assert values(norms) == pytest.approx(expected)
        assert not any(hasattr(norm, "device_mesh") for norm in norms.values()), "plain tensors, summed over the ranks"
    finally:
        dist.destroy_process_group()
