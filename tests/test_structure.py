"""The floors of the house: who may import whom, no cycles, nothing heavy by accident (DESIGN section 14)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the package of the same content
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "instructsam"
MAX_LINES = 600

FLOOR = {"structures", "masks", "errors", "lock", "files", "words"}
# Usable without torch.
RECORDS = {f"evaluation.{name}" for name in ("metrics", "average_precision", "report", "tables", "records", "measure")}
RECORDS |= {f"evaluation.{name}" for name in ("measured", "overlaps", "concept_f1", "bootstrap", "sweep", "coco_ap")}
PARTS = FLOOR | {"processing", "models", "losses", "data", "visualization", "predictor", "evaluation"}
ENTRY_POINTS = {"train", "evaluate", "segment", "demo", "serve", "merge", "export", "compare", "make_tiny_world"}
ENTRY_POINTS |= {"prepare", "validate", "inspect", "ablate"}
USING = FLOOR | {"processing", "models", "visualization", "predictor", "inference"}

# What each part may import besides itself. A module belongs to the longest name that fits it.
ALLOWED: dict[str, set[str]] = {
    "structures": set(),
    "configs_path": set(),
    "errors": set(),
    "lock": set(),
    "files": set(),
    "words": set(),
    "cli": set(),
    "masks": {"structures", "errors"},
    "processing": FLOOR,
    "losses": FLOOR,
    "models": FLOOR | {"processing"},
    "data": FLOOR | {"processing"},
    "visualization": FLOOR | {"processing"},
    "predictor": FLOOR | {"processing", "models"},
    **{name: FLOOR | RECORDS for name in RECORDS},
    "evaluation": PARTS - {"losses"} | RECORDS,
    "inspection": FLOOR | RECORDS | {"processing", "data", "visualization", "evaluation"},
    "ablation": FLOOR | RECORDS | {"configs_path", "evaluation", "training"},
    "inference": USING,
    "segmenting": USING,
    "serving": USING,
    "webpage": USING | {"segmenting", "serving", "data"},
    "baselines": FLOOR | {"processing", "models", "losses", "visualization"},
    "pretraining": PARTS | RECORDS | {"training"},
    "training": PARTS | RECORDS | {"pretraining"},
    **{
        name: PARTS
        | RECORDS
        | {"configs_path", "ablation", "baselines", "inspection", "pretraining", "training"}
        | {"inference", "segmenting", "serving", "webpage"}
        for name in ENTRY_POINTS
    },
}

ABOUT_EXTRAS = {
    "instructsam.serving.app": {"fastapi", "starlette"},
    "instructsam.serving.metrics": {"prometheus-client"},
    "instructsam.webpage.page": {"gradio"},
}

# Import names of distributions that are called otherwise.
DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
DISTRIBUTIONS |= {"prometheus_client": "prometheus-client", "starlette": "fastapi"}  # one brings the other


def modules() -> dict[str, ast.Module]:
    """Module name → syntax tree of everything in the package."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


MODULES = modules()


def imported_names(name: str, tree: ast.Module, known: Mapping[str, ast.Module]) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that a module imports, at its top or inside functions, as absolute names."""
    is_package = any(other.startswith(name + ".") for other in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node


def own_imports(name: str, tree: ast.Module, known: Mapping[str, ast.Module]) -> set[str]:
    return {target for target, _ in imported_names(name, tree, known) if target.split(".")[0] == "instructsam"}


def part_of(module: str) -> str:
    """The key of `ALLOWED` that a module belongs to."""
    path = module.split(".")[1:]
    for length in range(len(path), 0, -1):
        if (part := ".".join(path[:length])) in ALLOWED:
            return part
    raise AssertionError(f"{module} belongs to no floor: give it a line in ALLOWED")


def find_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Some cycle of a directed graph, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def imports_of(code: str, name: str) -> set[str]:
    known = {"instructsam": ast.parse(""), "instructsam.data": ast.parse(""), "instructsam.data.coco": ast.parse(code)}
    return own_imports(name, known[name], known)


def test_the_import_reader_sees_every_form():
    code = """
import instructsam.masks
from instructsam.models.modeling import InstructSAMModel
from instructsam import data
from . import samplers
from .. import structures
from ..losses.matching import assign
def late():
    from instructsam.training import trainer
"""
    assert imports_of(code, "instructsam.data.coco") == {
        "instructsam.masks",
        "instructsam.models.modeling",
        "instructsam.data",
        "instructsam",
        "instructsam.losses.matching",
        "instructsam.training",
    }


def test_the_cycle_finder_finds():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("module", [name for name in MODULES if name != "instructsam"])
def test_imports_go_downwards(module: str):
    part = part_of(module)
    for target in own_imports(module, MODULES[module], MODULES):
        assert target != "instructsam", f"{module} imports names from the package itself: import their module"
        above = part_of(target)
        assert above == part or above in ALLOWED[part], f"{module} ({part}) may not import {target} ({above})"


def test_the_package_itself_offers_what_a_user_holds():
    """And loads it only when it is asked for: see `test_importing_stays_light`."""
    offered = {"instructsam.inference.model", "instructsam.inference.results"}
    assert own_imports("instructsam", MODULES["instructsam"], MODULES) == offered


def test_no_import_cycles():
    graph = {name: own_imports(name, tree, MODULES) - {name} for name, tree in MODULES.items()}
    cycle = find_cycle(graph)
    assert cycle is None, " → ".join(cycle or [])


def test_files_stay_small():
    folders = (PACKAGE, REPOSITORY / "tests", REPOSITORY / "scripts")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py")}
    too_long = {str(path.relative_to(REPOSITORY)): lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long


def loaded_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import instructsam", ["deepspeed", "wandb", "gradio", "matplotlib", "torch", "instructsam.training"]),
        ("import instructsam.cli", ["torch", "hydra", "instructsam.train"]),
        (
            "from instructsam import InstructSAM; import instructsam.predictor",
            ["deepspeed", "wandb", "gradio", "fastapi", "matplotlib", "hydra", "supervision", "instructsam.training"],
        ),
        ("import instructsam.masks, instructsam.structures", ["torch", "transformers", "scipy"]),
        ("import instructsam.evaluation.metrics, instructsam.evaluation.report", ["torch", "transformers", "hydra"]),
        ("import instructsam.visualization", ["transformers", "matplotlib", "instructsam.models"]),
        ("import instructsam.prepare, instructsam.validate", ["torch", "transformers"]),  # their workers import these
    ],
)
def test_importing_stays_light(statement: str, unwanted: list[str]):
    loaded = loaded_after(statement)
    assert "instructsam" in loaded
    assert not loaded & set(unwanted)


# ---- packaging ------------------------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_import_is_a_declared_dependency():
    """At the top of a module only what is always installed; what an extra brings is imported where it is used, or in
    modules that are all about it."""
    required = {distribution(line) for line in project()["project"]["dependencies"]}
    extras = project()["project"]["optional-dependencies"]
    optional = {distribution(line) for name, lines in extras.items() if name != "dev" for line in lines}
    for module, tree in MODULES.items():
        top = set(map(id, tree.body))
        for target, node in imported_names(module, tree, MODULES):
            name = target.split(".")[0]
            if name in sys.stdlib_module_names or name == "instructsam":
                continue
            name = DISTRIBUTIONS.get(name, name)
            about_an_extra = module in ABOUT_EXTRAS and name in ABOUT_EXTRAS[module]
            allowed = required | optional if about_an_extra or id(node) not in top else required
            assert name in allowed, f"{module} line {node.lineno} imports {name}, which pyproject.toml does not require"


def test_every_package_is_in_the_wheel():
    settings = project()["tool"]["setuptools"]
    folders = {path.parent.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py")}
    listed = set(settings["packages"]) - set(settings["package-dir"])
    assert {folder.replace("/", ".") for folder in folders} == listed
    for folder, kept in (("configs", "train.yaml"), ("checkpoints", "tiny/model.safetensors")):
        assert settings["package-dir"][f"instructsam.{folder}"] == folder and (REPOSITORY / folder / kept).is_file()


def test_constraints_pin_every_dependency_inside_its_range():
    pins = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+(; python_version (<|>=) \"3\.\d+\")?", line) for line in pins)
    described = project()["project"]
    extras = [line for lines in described["optional-dependencies"].values() for line in lines]
    for requirement in [*described["dependencies"], *extras]:
        found = [line for line in pins if distribution(line) == distribution(requirement)]
        assert found, f"constraints.txt does not pin {requirement}"
        lowest = re.search(r">=([\d.]+)", requirement)
        for line in found if lowest else []:
            version = line.split("==")[1].split(";")[0]
            numbers = [[int(part) for part in text.split(".")] for text in (version, lowest[1])]
            assert numbers[0] >= numbers[1], f"{line} is below {requirement}"
