"""The command `instructsam`: what it lists, what it runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from instructsam import cli

PACKAGE = Path(cli.__file__).parent


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["instructsam", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_every_command_is_listed_with_one_line(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    said = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command} " in said and 10 < len(cli.summary(command)) <= 95, command
    assert "  segment          Segment pictures: files" in said
    assert max(map(len, said.splitlines())) <= 115, said


def test_every_entry_point_is_a_command():
    runnable = {path.stem for path in PACKAGE.glob("*.py") if "if __name__ ==" in path.read_text()} - {"cli"}
    assert runnable == set(cli.COMMANDS)


def test_a_command_gets_its_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: seen.append((name, sys.argv[1:], options)))
    assert run(monkeypatch, "train", "experiment=tiny_world", "--cfg", "job") == 0
    options = {"run_name": "__main__", "alter_sys": True}
    assert seen == [("instructsam.train", ["experiment=tiny_world", "--cfg", "job"], options)]


def test_a_wrong_command(monkeypatch, capsys):
    assert run(monkeypatch, "segmnt") == 2
    said = capsys.readouterr()
    assert said.err.startswith("instructsam: no command 'segmnt', did you mean segment?") and not said.out


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == metadata.version("instructsam")


@pytest.mark.multiprocess
def test_a_reader_that_has_seen_enough():
    """Nothing is said when what is printed goes nowhere any more."""
    line = f"{sys.executable} -m instructsam.cli | true; {sys.executable} -m instructsam.cli | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "usage: instructsam COMMAND ...\n" and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each(command):
    line = [sys.executable, "-m", "instructsam.cli", command, "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr
