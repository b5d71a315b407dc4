"""Checkpoints: everything comes back, only what trains is stored, and no other run is continued by mistake."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instructsam.training import checkpointing
from instructsam.training.checkpoint_files import FOLDER, STATE_FILE, find_damage, list_checkpoints, path_of
from instructsam.training.checkpointing import (
    EMA_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    WEIGHTS_FILE,
    Checkpointer,
    capture_rng,
    frozen_checksum,
    load_weights,
    restore_rng,
    stored_weights,
)
from instructsam.training.ema import EMA
from instructsam.training.engines import Engine, start_engine
from instructsam.training.optim import OptimConfig, build_optimizer

PLACE = {"samples_per_step": 4, "sampler": {"samples": 12}}


class Objective(nn.Module):
    """Two names for one tensor, a view that is not contiguous, buffers of both kinds, and a part that does not train,
    some of it in half precision."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.side = nn.Parameter(torch.randn(3, 4).t())
        self.backbone = nn.Linear(4, 4)
        self.backbone.bias.data = self.backbone.bias.data.bfloat16()
        self.backbone.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


@dataclass
class Run:
    """What a trainer holds."""

    objective: nn.Module
    engine: Engine
    saver: Checkpointer
    ema: EMA
    state: dict = field(default_factory=dict)

    def train(self, steps: int) -> None:
        model = self.objective
        for _ in range(steps):
            noise = torch.randn(5, 4)
            loss = (model.head(model.embed.weight + noise) * model.backbone.weight.sum()).square().mean()
            self.engine.backward(loss + model.side.sin().sum())
            model.seen += 1
            self.engine.step()
            self.ema.update()

    def save(self, step: int) -> Path:
        return self.saver.save(step, PLACE, self.ema.state_dict())

    def everything(self) -> dict[str, Tensor]:
        """Weights, buffers, optimizer state and averages."""
        optimizer = {
            f"{key}/{name}": torch.as_tensor(value)
            for name, values in self.engine.optimizer_state().items()
            for key, value in values.items()
        }
        averages = {f"average/{name}": value for name, value in self.ema.state_dict().items()}
        weights = {name: value.clone() for name, value in self.objective.state_dict().items()}
        return {**weights, **optimizer, **averages}


def start(
    folder: Path,
    fingerprint: dict | None = None,
    keep: int = 2,
    save_frozen: bool = False,
    objective: nn.Module | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Run:
    """As the trainer does it: the newest checkpoint's weights, then the engine, then the rest."""
    objective = objective or Objective()
    engine = start_engine("no", str(folder))
    engine.accelerator.scaler = scaler
    optimizer = build_optimizer(objective, OptimConfig(lr=0.1))
    saver = Checkpointer(folder, engine, fingerprint or {}, keep, save_frozen)
    checkpoint = saver.find_latest()
    state = saver.load_model(checkpoint, objective)
    engine.prepare(objective, optimizer, 1.0)
    ema = EMA({name: p for name, p in objective.named_parameters() if p.requires_grad}, 0.9)
    if checkpoint is not None:
        ema.load_state_dict(saver.load_rest(checkpoint, state))
    return Run(objective, engine, saver, ema, state)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def draw() -> tuple[float, ...]:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


# ---------------------------------------------------------------------- everything comes back


def test_everything_comes_back_bit_by_bit_and_goes_on_alike(tmp_path):
    run = start(tmp_path)
    assert run.state == {}
    run.train(3)
    run.save(3)
    saved, first = run.everything(), draw()
    run.train(2)

    again = start(tmp_path)
    assert again.state["step"] == 3 and {name: again.state[name] for name in PLACE} == PLACE
    assert len(saved) == 6 + 2 * 3 + 3
    assert_same(again.everything(), saved)
    assert draw() == first, "random numbers go on where they were"
    again.train(2)
    assert_same(again.everything(), run.everything())


def test_tied_tensors_stay_tied_and_are_stored_once(tmp_path):
    run = start(tmp_path)
    run.train(1)
    path = run.save(1)
    again = start(tmp_path, objective=Objective(seed=0))
    assert again.objective.head.weight is again.objective.embed.weight
    assert torch.equal(again.objective.head.weight, run.objective.embed.weight)
    assert "head.weight" not in load_file(path / WEIGHTS_FILE)


def test_scaler_of_half_precision_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=7)
    run = start(tmp_path, scaler=scaler)
    scaler.scale(run.objective.side.sum() * float("inf")).backward()
    scaler.step(run.engine.optimizer.optimizer)
    scaler.update()
    run.save(1)
    other = torch.amp.GradScaler("cpu")
    start(tmp_path, scaler=other)
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 2.0**19


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Then random states are not for it to take."""
    run = start(tmp_path)
    path = run.save(1)
    states = torch.load(path / RNG_FILE, weights_only=True)
    assert len(states) == 1
    torch.save([*states, *states], path / RNG_FILE)
    state = run.saver.load_model(path, Objective())
    torch.manual_seed(77)
    expected = torch.rand(())
    torch.manual_seed(77)
    run.saver.load_rest(path, state)
    assert torch.equal(torch.rand(()), expected)


def test_a_run_without_averages_has_no_file_of_them(tmp_path):
    run = start(tmp_path)
    path = run.saver.save(1, PLACE)
    assert not (path / EMA_FILE).exists() and find_damage(path) is None
    assert run.saver.load_rest(path, run.saver.load_model(path, Objective())) == {}


def test_stored_weights_are_the_averages_where_there_are_some(tmp_path):
    run = start(tmp_path)
    run.train(3)
    averaged, plain = stored_weights(run.save(3)), stored_weights(run.saver.save(4, PLACE))
    averages, weights = run.ema.state_dict(), run.objective.state_dict()
    for name in ("embed.weight", "side"):
        assert not torch.equal(averages[name], weights[name])
        assert torch.equal(averaged[name], averages[name]) and torch.equal(plain[name], weights[name])
    assert averaged["seen"] == plain["seen"] == 3, "a buffer has no average"


def test_before_the_first_step_there_is_no_optimizer_state_to_come_back(tmp_path):
    start(tmp_path).save(0)
    again = start(tmp_path)
    assert again.engine.optimizer_state() == {}
    again.train(1)


def test_random_states_come_back():
    np.random.randn()  # leaves a second value in store, which belongs to the state
    state = capture_rng()
    first = draw()
    assert draw() != first
    restore_rng(state)
    assert draw() == first


# ---------------------------------------------------------------------- what is stored, and what is not


def test_only_what_trains_and_buffers_are_stored(tmp_path):
    run = start(tmp_path)
    run.train(1)
    path = run.save(1)
    assert set(load_file(path / WEIGHTS_FILE)) == {"embed.weight", "side", "seen"}
    moments = {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in ("embed.weight", "side")}
    assert set(load_file(path / OPTIMIZER_FILE)) == moments
    assert {file.name for file in path.iterdir()} == {WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE, RNG_FILE, STATE_FILE}


def test_save_frozen_stores_all_and_needs_no_other_source(tmp_path):
    run = start(tmp_path, save_frozen=True)
    run.train(2)
    path = run.save(2)
    stored = load_file(path / WEIGHTS_FILE)
    assert set(stored) == {"embed.weight", "side", "backbone.weight", "backbone.bias", "seen"}
    assert stored["backbone.bias"].dtype == torch.bfloat16
    again = start(tmp_path, save_frozen=True, objective=Objective(seed=1))
    assert_same(again.everything(), run.everything())


def test_other_frozen_weights_are_refused_before_anything_changes(tmp_path):
    run = start(tmp_path)
    run.train(1)
    run.save(1)
    for name in ("weight", "bias"):
        changed = Objective()
        with torch.no_grad():
            getattr(changed.backbone, name).view(-1)[-1] += 1
        before = changed.embed.weight.clone()
        for save_frozen in (False, True):
            message = "was made with other weights in what does not train.*trainer.save_frozen=true"
            with pytest.raises(ValueError, match=message) as error:
                start(tmp_path, objective=changed, save_frozen=save_frozen)
            assert "\n" not in str(error.value)
        assert torch.equal(changed.embed.weight, before)
    assert_same(start(tmp_path).everything(), run.everything())


def test_a_run_that_stops_storing_what_is_frozen_remembers_what_it_was(tmp_path):
    """Its weights came from the first checkpoint, not from where the second start would take them."""
    start(tmp_path, save_frozen=True).save(1)
    other = start(tmp_path, objective=Objective(seed=1))
    assert frozen_checksum(other.objective) == frozen_checksum(Objective())
    other.save(2)
    with pytest.raises(ValueError, match="other weights in what does not train"):
        start(tmp_path, objective=Objective(seed=1))
    assert start(tmp_path).state["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_of_what_does_not_train_is_of_names_and_bits(dtype):
    def checksum(**values: float) -> int:
        weights = {name: nn.Parameter(torch.tensor([0.0, x], dtype=dtype), False) for name, x in values.items()}
        return frozen_checksum(nn.ParameterDict({**weights, "trains": nn.Parameter(torch.randn(1))}))

    assert checksum(a=1.0, b=2.0) == checksum(b=2.0, a=1.0)
    others = [checksum(a=1.0, c=2.0), checksum(a=2.0, b=1.0), checksum(a=1.0, b=-2.0), checksum(a=1.0)]
    assert len({checksum(a=1.0, b=2.0), *others}) == 5


# ---------------------------------------------------------------------- other models, other settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "side", nn.Parameter(torch.zeros(4, 2))),
            r"side has shape \(4, 3\) instead of \(4, 2\)",
        ),
        (lambda model: setattr(model, "extra", nn.Parameter(torch.zeros(1))), "extra is missing"),
        (lambda model: delattr(model, "side"), "side is not part of the model"),
        (lambda model: model.register_buffer("count", torch.zeros(1)), "count is missing"),
        (lambda model: delattr(model, "seen"), "seen is not part of the model"),
        (lambda model: model.backbone.requires_grad_(True), "backbone.bias is missing; backbone.weight is missing"),
    ],
    ids=["shape", "more", "less", "another buffer", "no buffer", "trains more"],
)
def test_another_model_is_an_error_by_name_and_changes_nothing(tmp_path, change, message):
    run = start(tmp_path)
    run.train(1)
    path = run.save(1)
    other = Objective()
    change(other)
    before = other.embed.weight.clone()
    with pytest.raises(ValueError, match=f"cannot load .*: {message}$"):
        load_weights(path, other)
    assert torch.equal(other.embed.weight, before)


SHAPES = [((), (8,)), ((1,), (8,)), ((8,), (1,)), ((1,), ()), ((1, 4), (8, 4)), ((8, 1), (8, 4)), ((4,), (8, 4))]
SHAPES += [((8, 4), (4, 8)), ((32,), (8, 4)), ((2, 8, 4), (8, 4)), ((1, 8), (8,))]


@pytest.mark.parametrize(("stored", "here"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ["last", "buffer"])
def test_nothing_is_broadcast_or_reshaped_into_place(tmp_path, stored, here, name):
    """Neither a smaller tensor nor as many numbers in another shape; what is right beside them stays as it was, too."""
    model = nn.ParameterDict({"first": nn.Parameter(torch.zeros(2)), "last": nn.Parameter(torch.zeros(here))})
    model.register_buffer("buffer", torch.zeros(here))
    right = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    save_file({**right, name: torch.ones(stored)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"\b{name} has shape"):
        load_weights(tmp_path, model)
    assert not any(value.any() for value in model.state_dict().values())
    save_file(right, tmp_path / WEIGHTS_FILE)
    load_weights(tmp_path, model)
    assert all(value.all() for value in model.state_dict().values())


def test_many_differences_are_counted(tmp_path):
    path = start(tmp_path).save(1)
    with pytest.raises(ValueError, match="layer.0.bias is missing.* and 10 more$") as error:
        load_weights(path, nn.ModuleDict({"layer": nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))}))
    assert str(error.value).count(" is ") == 5 and "\n" not in str(error.value)


def test_other_configuration_is_a_one_line_error_and_changes_nothing(tmp_path):
    run = start(tmp_path, {"model": {"queries": 10, "size": [4, 4]}, "lr": 0.1})
    run.train(1)
    run.save(5)
    same = start(tmp_path, {"model": {"queries": 10, "size": (4, 4)}, "lr": 0.1})
    assert same.state["step"] == 5
    other = Objective()
    before = other.embed.weight.clone()
    with pytest.raises(ValueError) as error:
        start(tmp_path, {"model": {"queries": 20, "size": [4, 4]}, "seed": 1}, objective=other)
    text = str(error.value)
    assert "\n" not in text
    assert "model.queries is 10 there and 20 here" in text
    assert "lr is 0.1 there and 'absent' here" in text and "seed is 'absent' there and 1 here" in text
    assert "size" not in text
    assert torch.equal(other.embed.weight, before)


# ---------------------------------------------------------------------- files


def test_state_is_readable_json(tmp_path):
    path = start(tmp_path, {"seed": 3}).save(7)
    state = json.loads((path / STATE_FILE).read_text())
    assert state["step"] == 7 and state["fingerprint"] == {"seed": 3} and state["sampler"] == PLACE["sampler"]
    assert (state["engine"], state["processes"]) == ("plain", 1)
    assert set(state["files"]) == {WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE, RNG_FILE}


def test_a_damaged_checkpoint_is_passed_over_and_written_anew(tmp_path):
    run = start(tmp_path)
    run.train(1)
    run.save(1)
    one = run.everything()
    run.train(1)
    path = run.save(2)
    two = run.everything()
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE, EMA_FILE, RNG_FILE):
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)
        again = start(tmp_path)
        assert again.state["step"] == 1
        assert_same(again.everything(), one)
        again.train(1)
        again.save(2)
        assert_same(start(tmp_path).everything(), two)


@pytest.mark.parametrize(
    ("function", "call"), [("save_file", 1), ("save_file", 2), ("save_file", 3), ("write_state", 1)]
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, function, call):
    run = start(tmp_path)
    run.train(1)
    run.save(5)
    original, calls = getattr(checkpointing, function), []

    def full_disk(content, path):
        calls.append(path)
        if len(calls) == call:
            raise OSError("disk full")
        return original(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, function, full_disk)
        with pytest.raises(OSError, match="disk full"):
            run.save(10)
    assert list_checkpoints(tmp_path) == [path_of(tmp_path, 5)]
    assert_same(start(tmp_path).everything(), run.everything())
    run.save(10)
    assert run.saver.find_latest() == path_of(tmp_path, 10)


def test_old_ones_go_and_unfinished_ones_are_cleaned_up(tmp_path):
    run = start(tmp_path, keep=2)
    for step in (5, 10, 15):
        run.save(step)
    unfinished = tmp_path / FOLDER / "step_000020.tmp"
    unfinished.mkdir()
    (unfinished / WEIGHTS_FILE).write_bytes(b"half")
    assert run.saver.find_latest() == path_of(tmp_path, 15)
    run.saver.clean()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step_000010", "step_000015"]
    run.saver.clean(all_of_them=True)
    assert run.saver.find_latest() is None and not (tmp_path / FOLDER).exists()


def test_a_checkpoint_half_written_before_does_not_get_into_the_next(tmp_path):
    run = start(tmp_path)
    unfinished = tmp_path / FOLDER / "step_000001.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "left_over.bin").write_bytes(b"half")
    assert not (run.save(1) / "left_over.bin").exists()


def test_pickled_code_is_not_run(tmp_path):
    """A file with anything but plain data is refused by torch's restricted reader."""
    run = start(tmp_path)
    path = run.save(1)
    torch.save([random.Random(0)], path / RNG_FILE)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run.saver.load_rest(path, run.saver.load_model(path, Objective()))
