"""The notebook runs from top to bottom; the Dockerfile is free of what a linter finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "examples" / "quick_tour.ipynb"


def test_the_text_of_the_notebook_is_in_lines():
    """As notebooks are stored: one string a line, each but the last with its end."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert cell["source"] == "".join(cell["source"]).splitlines(keepends=True), cell["id"]
        assert cell["cell_type"] == "code" or not any("\\n" in line for line in cell["source"]), cell["id"]


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), "outputs are not kept"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(NOTEBOOK.parent))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs
    )
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "picture known: True" in text and "'coco.json', 'labelme.json', 'overlay.png'" in text
    assert "squares" in text


@pytest.mark.multiprocess
def test_the_dockerfile_is_clean():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=os.path.dirname(sys.executable))
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_there_is():
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    assert copied == ["constraints.txt", "."] and all((REPOSITORY / name).exists() for name in copied)
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not {"checkpoints", "configs", "instructsam", "README.md"} & set(ignored)
