"""Revision and versions of a start, inside a repository and outside."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from instructsam.training import provenance
from instructsam.training.engines import Engine
from instructsam.training.provenance import describe_start, git_revision, one_line, versions


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *settings, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository of one file, package/module.py."""
    file = tmp_path / "package/module.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return file


def test_a_clean_and_a_changed_tree(repository):
    commit = git(repository.parent, "rev-parse", "HEAD")
    assert git_revision(repository) == {"commit": commit, "dirty": []}
    repository.write_text("x = 2\n")
    (repository.parents[1] / "new file ä.txt").write_text("")
    assert git_revision(repository) == {"commit": commit, "dirty": ["package/module.py", "new file ä.txt"]}


def test_no_repository(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("")
    assert git_revision(file) is None
    assert git_revision(tmp_path / "missing/module.py") is None


def test_installed_inside_someone_elses_repository(repository):
    installed = repository.parent / "site-packages/module.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert git_revision(installed) is None


def test_no_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision(repository) is None


def test_a_start(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    start = describe_start(Engine(Accelerator(), "no"), 12, ["optim.lr=1e-3"], 8)
    assert json.loads(json.dumps(start)) == start
    assert start["versions"]["torch"] == torch.__version__ and start["versions"] == versions()
    assert start["overrides"] == ["optim.lr=1e-3"] and start["step"] == 12 and start["global_batch_size"] == 8
    assert (start["engine"], start["num_processes"], start["device"], start["precision"]) == ("plain", 1, "cpu", "no")
    host, home = platform.node(), str(Path.home())
    assert not host or host not in json.dumps(start)
    assert home == "/" or home not in json.dumps(start)


def test_only_the_main_process_asks_git(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked = []
    monkeypatch.setattr(provenance, "git_revision", lambda: asked.append("git"))
    engine = Engine(Accelerator(), "no")
    describe_start(engine, 0)
    assert asked == ["git"]
    engine.accelerator = SimpleNamespace(is_main_process=False, device=torch.device("cpu"), num_processes=2)
    assert describe_start(engine, 0)["git"] is None and asked == ["git"]


def test_a_start_in_one_line(repository, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(provenance, "git_revision", lambda: git_revision(repository))
    repository.write_text("x = 2\n")
    text = one_line(describe_start(Engine(Accelerator(), "no"), 0))
    assert f"revision {git(repository.parent, 'rev-parse', 'HEAD')[:12]} with 1 changed file," in text
    assert "1 process on cpu" in text and torch.__version__ in text
    for number in range(60):
        (repository.parent / f"new_{number}.py").write_text("")
    git(repository.parent, "add", "-N", ".")
    assert "with 50 or more changed files" in one_line(describe_start(Engine(Accelerator(), "no"), 0))
    monkeypatch.setattr(provenance, "git_revision", lambda: None)
    assert one_line(describe_start(Engine(Accelerator(), "no"), 0)).startswith("no git revision, torch")
