"""An ablation as its file describes it (configs/experiment/ablation): cells, each trained once a seed and evaluated.

A cell's training has stages, one run of `instructsam.train` each, in their order. ``{train}`` in an override is the
folder that holds the stages' outputs, so that a later stage can take weights from an earlier one. A cell with
``trained_as`` has no training of its own: it evaluates another cell's model under other settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EVALUATION = "evaluate"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KEYS = {"name", "title", "stages", "cells", "default", "seeds", "train", "evaluate", "figures", "x_name"}
_CELL_KEYS = {"train", "evaluate", "trained_as", "x"}
DEFAULT_FIGURES = ("mAP", "AP50", "giou", "n_acc", "duplicate_rate", "count_error")


@dataclass(frozen=True)
class Cell:
    """One setting under test.

    Attributes:
        stages: stage -> overrides of `instructsam.train`, complete; empty with ``trained_as``.
        evaluate: overrides of `instructsam.evaluate`, complete.
        x: its place on the axis of a plot, where the cells lie along a number.
    """

    name: str
    stages: dict[str, tuple[str, ...]]
    evaluate: tuple[str, ...]
    trained_as: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class Ablation:
    """A checked ablation: ``default`` is the cell that others are compared with, ``x_name`` what `Cell.x` counts."""

    name: str
    title: str
    cells: dict[str, Cell]
    default: str
    seeds: tuple[int, ...]
    figures: tuple[str, ...]
    x_name: str | None

    def source(self, cell: Cell) -> Cell:
        """The cell whose training a cell uses: itself, or the one that ``trained_as`` names."""
        return cell if cell.trained_as is None else self.cells[cell.trained_as]

    def order(self) -> list[tuple[Cell, int]]:
        """Every cell with every seed, cells with training of their own first; seed by seed, so that a sweep that is
        stopped early has whole comparisons."""
        cells = sorted(self.cells.values(), key=lambda cell: cell.trained_as is not None)
        return [(cell, seed) for seed in self.seeds for cell in cells]

    def find(self, only: str) -> tuple[Cell, int]:
        """The cell and seed of "CELL/SEED". Raises ValueError, listing what there is."""
        name, _, seed = str(only).rpartition("/")
        if name not in self.cells or not seed.isdecimal() or int(seed) not in self.seeds:
            seeds = ", ".join(map(str, self.seeds))
            raise ValueError(f"only={only}: must be CELL/SEED of the cells {', '.join(self.cells)} and seeds {seeds}")
        return self.cells[name], int(seed)


def parse(values: Any) -> Ablation:
    """Check the `ablation` part of the settings.

    Args:
        values: name; title (default: the name); stages (stage -> overrides); cells (name -> train, evaluate,
            trained_as, x); default; seeds; train and evaluate (overrides for all stages and cells, behind those of the
            stages and before those of the cell); figures (keys of `metrics.summarise`); x_name.

    Raises:
        ValueError: says which key is wrong and what to write instead.
    """
    values = _mapping(values, "ablation")
    _known(values, _KEYS, "ablation")
    if missing := sorted({"name", "stages", "cells", "default"} - {key for key, value in values.items() if value}):
        raise ValueError(f"ablation: not given: {', '.join(missing)}; name one with experiment=ablation/NAME")
    stages = _mapping(values["stages"], "ablation.stages")
    for stage in stages:
        _name(stage, "ablation.stages")
        if stage == EVALUATION:
            raise ValueError(f"ablation.stages: a stage cannot be called {EVALUATION}")
    common = {key: _overrides(values.get(key), f"ablation.{key}") for key in ("train", "evaluate")}
    cells: dict[str, Cell] = {}
    for name, own in _mapping(values["cells"], "ablation.cells").items():
        name = _name(name, "ablation.cells")
        if clash := [other for other in cells if other.casefold() == name.casefold()]:
            raise ValueError(f"ablation.cells: {clash[0]} and {name} would share a folder; call one otherwise")
        cells[name] = _cell(name, _mapping(own or {}, f"ablation.cells.{name}"), stages, common)
    for cell in cells.values():
        if cell.trained_as is not None and (cell.trained_as == cell.name or cell.trained_as not in cells):
            raise ValueError(f"ablation.cells.{cell.name}.trained_as={cell.trained_as}: must be another cell")
        if cell.trained_as is not None and cells[cell.trained_as].trained_as is not None:
            raise ValueError(
                f"ablation.cells.{cell.name}.trained_as={cell.trained_as}: that cell has no training of its own either"
            )
    if str(values["default"]) not in cells:
        raise ValueError(f"ablation.default={values['default']}: there is no such cell, only {', '.join(cells)}")
    name = _name(values["name"], "ablation.name")
    x_name = values.get("x_name")
    if x_name and (without := [cell.name for cell in cells.values() if cell.x is None and cell.trained_as is None]):
        raise ValueError(f"ablation.x_name={x_name}: cell {without[0]} has no x")
    figures = tuple(str(figure) for figure in values.get("figures") or DEFAULT_FIGURES)
    title = str(values.get("title") or name)
    return Ablation(name, title, cells, str(values["default"]), _seeds(values.get("seeds", [0])), figures, x_name)


def _cell(name: str, own: Mapping[str, Any], stages: Mapping[str, Any], common: Mapping[str, tuple[str, ...]]) -> Cell:
    where = f"ablation.cells.{name}"
    _known(own, _CELL_KEYS, where)
    x = own.get("x")
    if x is not None and (isinstance(x, bool) or not isinstance(x, int | float)):
        raise ValueError(f"{where}.x={x}: must be a number")
    train, evaluate = _overrides(own.get("train"), f"{where}.train"), _overrides(own.get("evaluate"), where)
    trained_as = own.get("trained_as")
    if trained_as is not None:
        if train:
            raise ValueError(f"{where}: has train and trained_as; a cell trained as another has no training of its own")
        return Cell(name, {}, (*common["evaluate"], *evaluate), str(trained_as), x)
    complete = {
        str(stage): (*_overrides(base, f"ablation.stages.{stage}"), *common["train"], *train)
        for stage, base in stages.items()
    }
    return Cell(name, complete, (*common["evaluate"], *evaluate), None, x)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names with values, got {value!r}")
    return value


def _known(values: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(map(str, values)) - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{where}: {value!r} becomes a folder: letters, digits, '_', '-' and '.' only, as text")
    return value


def _overrides(value: Any, where: str) -> tuple[str, ...]:
    """A list of KEY=VALUE. What the sweep itself decides may not be among them."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{where}: expected a list of overrides such as ['trainer.max_steps=2'], got {value!r}")
    for override in value:
        key = override.split("=")[0]
        if "=" not in override and not override.startswith("~"):
            raise ValueError(f"{where}: {override!r} is no override (KEY=VALUE)")
        if key.lstrip("+~") in ("seed", "output_dir", "checkpoint", "predictions", "restart", "trainer.resume"):
            raise ValueError(f"{where}: {override!r}: {key} is set by the sweep; seeds are ablation.seeds=[...]")
    return tuple(value)


def _seeds(value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not is_list or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in value):
        raise ValueError(f"ablation.seeds={value}: must be a list of whole numbers, such as [0, 1, 2]")
    if len(set(value)) < len(value):
        raise ValueError(f"ablation.seeds={list(value)}: a seed occurs twice")
    return tuple(value)
