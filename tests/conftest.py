"""Fixtures shared by the whole suite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the whole process; runs of other tests must not see it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


_started: list[str] = []


def _note_process(event: str, arguments: tuple) -> None:
    if event in ("subprocess.Popen", "os.fork", "forked.start") and arguments[:1] != ("git",):
        _started.append(f"{event} {arguments[:2]}")


sys.addaudithook(_note_process)


@pytest.fixture(autouse=True)
def marked_if_it_starts_processes(request):
    """What `scripts/test.sh --fast` leaves out is found by its marks; git, which says the revision, is no matter."""
    _started.clear()
    yield
    if _started and not {"slow", "multiprocess"} & set(request.keywords):
        pytest.fail(f"mark it multiprocess: it started {_started[0]}")


LONGEST = {
    Path(__file__).parent / name
    for name in (
        *("ablation/test_ablate.py", "models/test_flex_attention.py", "segmenting/test_going_on.py"),
        *("test_end_to_end.py", "test_evaluate.py", "test_launch.py", "test_own_data_guide.py", "test_stages.py"),
        *("training/test_engines.py", "training/test_kill_and_resume.py", "training/test_objectives.py"),
        *("training/test_overfit.py", "training/test_recipe.py"),
    )
}
"""Files that take more than 45 s each, more than half of the whole."""


from browser_fixtures import chromium  # noqa: E402, F401
from golden_fixtures import golden  # noqa: E402, F401
from hub_fixtures import qwen3_vl_dir, sam3_dir, sharded_qwen3_vl_dir, sharded_sam3_dir  # noqa: E402, F401
from pretended_hub import uploads  # noqa: E402, F401
from tiny_fixtures import checkpoint, shallow_checkpoint, world  # noqa: E402, F401  (fixtures)


def pytest_collection_modifyitems(items):
    """Long files first, so that the last one to end does not start last; no GPU tests where there is no GPU."""
    import torch

    items.sort(key=lambda item: item.path not in LONGEST)  # stable: otherwise as collected

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
