"""Fill a model from safetensors folders, strictly: every tensor is loaded, new where it may be, or an error.

The model is made on the meta device first and each tensor is read once, so the memory needed is the model's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from instructsam.models.layouts import Layout
from instructsam.models.weights import INDEX, WEIGHTS, read_index

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        layout, source: of the checkpoint(s) read.
        loaded: our names of the tensors taken from there.
        cut: those of them of which only the first rows were taken.
        new: our names of tensors that were newly initialised.
        ignored: their names of tensors that have no place in the model, by the prefix that says so.
    """

    layout: str
    source: str
    loaded: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Every key, as JSON; makes the folder if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        def parts(names: list[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in Counter(n.split(".")[0] for n in names).items())

        lines = [f"{self.layout} layout, read from {self.source}: {len(self.loaded)} tensors loaded"]
        lines[0] += f" ({parts(self.loaded)})" if self.loaded else ""
        if self.cut:
            lines.append(f"  first rows only: {', '.join(self.cut)}")
        if self.new:
            lines.append(f"  newly initialised: {len(self.new)} ({parts(self.new)})")
        if self.ignored:
            lines.append(
                f"  not used: {', '.join(f'{prefix}* {len(names)}' for prefix, names in self.ignored.items())}"
            )
        return "\n".join(lines)


def has_weights(folder: str | Path) -> bool:
    """Whether a folder holds safetensors under the usual names."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX))


class TensorFolder:
    """The tensors of a checkpoint folder: one safetensors file, or shards with an index. Nothing is ever unpickled.

    Raises:
        ValueError: no safetensors there, an index that names a missing shard or tensor, a truncated file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        if (self.folder / WEIGHTS).is_file():
            self._read_header(self.folder / WEIGHTS)
        elif (self.folder / INDEX).is_file():
            self._read_index()
        else:
            raise ValueError(f"{self.folder}: neither {WEIGHTS} nor {INDEX} there")

    def _read_index(self) -> None:
        path = self.folder / INDEX
        weight_map = read_index(self.folder)
        for shard in sorted(set(weight_map.values())):
            if not (self.folder / shard).is_file():
                raise ValueError(f"{path}: names the shard {shard!r}, which is not in the folder")
            self._read_header(self.folder / shard)
        wrong = [name for name, shard in weight_map.items() if self._file_of.get(name, path).name != shard]
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} tensors are not in the shard it names (first: {wrong[0]})")

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shapes[name]

    def read(self, rows: dict[str, int | None], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The named tensors, all or their first rows, in memory of their own; dtype None keeps the stored one."""
        tensors = {}
        for path in sorted({self._file_of[name] for name in rows}):
            with safe_open(path, framework="pt") as file:
                for name, count in rows.items():
                    if self._file_of[name] == path:
                        part = file.get_slice(name)[:count] if count else file.get_tensor(name)
                        # The library maps the file into memory; a copy outlives the file.
                        wanted = dtype if dtype is not None and part.is_floating_point() else part.dtype
                        tensors[name] = torch.empty(part.shape, dtype=wanted).copy_(part)
        return tensors


def empty_model(model_class: type[Model], config: Any) -> Model:
    """The model with all parameters on the meta device, which takes no memory; buffers that are computed are real."""
    with init_empty_weights(include_buffers=False):
        return model_class(config)


def fill(
    model: PreTrainedModel,
    sources: Sequence[tuple[TensorFolder, Layout]],
    *,
    dtype: torch.dtype | None = None,
    may_be_new: Sequence[str] = (),
    first_rows: Sequence[str] = (),
    seed: int = 0,
) -> LoadReport:
    """Give every tensor of a model from `empty_model` its values.

    Args:
        sources: folders with the layouts of their names; together they must hold every tensor.
        dtype: of all tensors; None keeps what the files hold (new ones: float32).
        may_be_new: prefixes of our names; such tensors are initialised where no source has them.
        first_rows: our names of tensors of which a source may hold more rows than needed; the first ones are taken.
        seed: of the new tensors.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, or one that two sources hold (named).
    """
    report = LoadReport(
        " + ".join(layout.name for _, layout in sources), " + ".join(str(folder.folder) for folder, _ in sources)
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plans: list[dict[str, tuple[str, int | None]]] = []
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": [], "there twice": []}
    seen: set[str] = set()
    for folder, layout in sources:
        plan: dict[str, tuple[str, int | None]] = {}
        for name in folder:
            ours = layout.to_ours(name)
            if ours is None or ours not in wanted:
                prefix = layout.ignored_by(name)
                (problems["unexpected"] if prefix is None else report.ignored.setdefault(prefix, [])).append(name)
                continue
            shape = folder.shape(name)
            cut = ours in first_rows and shape[1:] == wanted[ours][1:] and shape[0] > wanted[ours][0]
            if ours in seen:
                problems["there twice"].append(name)
            elif shape != wanted[ours] and not cut:
                problems["of another shape"].append(f"{name} {list(shape)} instead of {list(wanted[ours])}")
            seen.add(ours)
            plan[name] = (ours, wanted[ours][0] if cut else None)
            report.loaded.append(ours)
            if cut:
                report.cut.append(ours)
        plans.append(plan)
    for ours in wanted:
        if ours not in seen and ours.startswith(tuple(may_be_new)):
            report.new.append(ours)
        elif ours not in seen:
            theirs = (layout.to_theirs(ours) for _, layout in sources)
            problems["missing"].append(next((name for name in theirs if name is not None), ours))
    if any(problems.values()):
        texts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise ValueError(f"{report.source}: the tensors do not fit the model ({report.layout}): {'; '.join(texts)}")
    state: dict[str, Tensor] = {}
    for (folder, _), plan in zip(sources, plans, strict=True):
        tensors = folder.read({name: count for name, (_, count) in plan.items()}, dtype)
        state |= {ours: tensors.pop(name) for name, (ours, _) in plan.items()}
    state |= {name: torch.empty(wanted[name], dtype=dtype or torch.float32) for name in report.new}
    model.load_state_dict(state, strict=True, assign=True)
    _initialise(model, set(report.new), seed)
    model.eval()
    return report


def _initialise(model: PreTrainedModel, new: set[str], seed: int) -> None:
    """Run transformers' initialisation on the modules whose tensors are new; the others are marked as done."""
    for prefix, module in model.named_modules():
        names = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)}
        assert names <= new or not names & new, f"only a part of {prefix} is new"
        module._is_hf_initialized = not names & new  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
