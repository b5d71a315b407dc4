"""scripts/test.sh fails when one of its checks does, and only then."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

PRETENDED_PYTHON = """#!/usr/bin/env bash
echo "ran: $*"
for check in pytest ruff pyrefly; do
    if [ "${2:-}" = "$check" ]; then [ "$check" != "${FAILING:-}" ]; exit; fi
done
"""


@pytest.fixture
def checkout(tmp_path):
    """Two scripts and an environment that is up to date, whose Python runs nothing."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=lambda _, names: {*names} - {"test.sh", "check.sh"})
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    python = tmp_path / ".venv-test" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PRETENDED_PYTHON)
    python.chmod(0o755)
    installed_for = b"[project]\ntorch==2.13.0\n" + sys.version.encode()
    (tmp_path / ".venv-test" / "installed-for").write_text(hashlib.sha256(installed_for).hexdigest())
    return tmp_path


def check(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "scripts" / "test.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "JOBS": "1", **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.multiprocess
def test_passes_when_all_pass(checkout):
    done = check(checkout, "-k", "matching")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("== all passed\n")
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran: -m ")]
    assert {line.split()[2] for line in ran} == {"pytest", "ruff", "pyrefly"}
    assert any("-m pytest" in line and line.endswith("-k matching") for line in ran)


@pytest.mark.multiprocess
@pytest.mark.parametrize("failing", ["pytest", "ruff", "pyrefly"])
def test_fails_when_one_fails(checkout, failing):
    done = check(checkout, FAILING=failing)
    assert done.returncode == 1
    assert "all passed" not in done.stdout


@pytest.mark.multiprocess
def test_fast_leaves_out_what_is_marked(checkout):
    assert "-m not slow and not multiprocess" in check(checkout, "--fast").stdout
    assert "multiprocess" not in check(checkout).stdout
