"""Where the golden figures are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN_ROOT = Path(__file__).parent / "golden"


def golden_folders() -> list[Path]:
    """Folders of golden figures: the committed ones, plus those of ``INSTRUCTSAM_GOLDEN`` (one or a folder of them)."""
    roots = [GOLDEN_ROOT]
    if extra := os.environ.get("INSTRUCTSAM_GOLDEN"):
        roots.append(Path(extra))
    folders = []
    for root in roots:
        candidates = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
        found = [path for path in candidates if (path / "meta.json").exists()]
        if not found:
            raise ValueError(f"INSTRUCTSAM_GOLDEN={root}: neither it nor a folder in it holds a meta.json")
        folders.extend(found)
    return folders


@pytest.fixture(params=golden_folders(), ids=lambda path: path.name)
def golden(request) -> Path:
    return request.param
