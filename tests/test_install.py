"""An installed package, away from the checkout: a new user's three lines, offline, with the tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from instructsam.data.tiny_world import make_example

REPOSITORY = Path(__file__).parents[1]
THREE_LINES = """
from instructsam import InstructSAM
model = InstructSAM.from_pretrained("tiny")
result = model.segment("shapes.png", INSTRUCTION)
"""


def old_setuptools() -> bool:
    try:
        return Version(metadata.version("setuptools")) < Version("77")
    except metadata.PackageNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(old_setuptools(), reason="setuptools is too old to build the package without a network")
def test_three_lines_after_an_installation(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    copy = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if name.startswith(("instructsam/", "configs/", "checkpoints/tiny/")) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    wheels = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    subprocess.run([*pip, *wheels], check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "instructsam/checkpoints/tiny/model.safetensors" in names and "instructsam/configs/train.yaml" in names
    assert not [name for name in names if "tiny_vlm" in name and "checkpoints" in name]
    assert wheel.stat().st_size < 6 * 2**20
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    from PIL import Image

    scene, instructions = make_example(2026, "examples", 3)
    asked = next(one for one in instructions if one.kind == "attribute" or one.kind == "category")
    Image.fromarray(scene.image).save(tmp_path / "shapes.png")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    lines = THREE_LINES.replace("INSTRUCTION", repr(asked.text))
    code = f"{lines}import instructsam\nprint(instructsam.__file__, len(result))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, count = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and int(count) == len(asked.phrases[0][1])
