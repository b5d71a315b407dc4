"""Fixtures shared by the whole suite."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the whole process; runs of other tests must not see it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


from browser_fixtures import chromium  # noqa: E402, F401
from golden_fixtures import golden  # noqa: E402, F401
from hub_fixtures import qwen3_vl_dir, sam3_dir, sharded_qwen3_vl_dir, sharded_sam3_dir  # noqa: E402, F401
from pretended_hub import uploads  # noqa: E402, F401
from tiny_fixtures import checkpoint, world  # noqa: E402, F401  (fixtures)


def pytest_addoption(parser):
    parser.addoption(
        "--processes",
        choices=("any", "one", "several"),
        default="any",
        help="select tests by whether they start several processes (the mark multiprocess); as -m, but beside it",
    )


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU are skipped where there is none; ``--processes`` selects."""
    import torch

    wanted = config.getoption("--processes")
    if wanted != "any":
        sorted_out: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            sorted_out[("multiprocess" in item.keywords) == (wanted == "several")].append(item)
        items[:] = sorted_out[True]
        config.hook.pytest_deselected(items=sorted_out[False])

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
