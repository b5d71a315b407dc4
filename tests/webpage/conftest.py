"""Pictures, a model, and the page for the tests of the web page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import pytest

from instructsam import demo
from instructsam.inference.model import InstructSAM
from instructsam.serving.limits import Limits
from instructsam.webpage.asking import Asker
from instructsam.webpage.examples import write_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[tuple[str, str]]:
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def asker() -> Asker:
    """The shipped tiny model: an untrained one finds nothing to look at."""
    return Asker(InstructSAM.from_pretrained("tiny", device="cpu"), Limits(upload_bytes=2_000_000, pixels=4_000_000))


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Where the page is shown."""
    pytest.importorskip("gradio")
    args = demo.parser().parse_args(["--device", "cpu", "--port", "0", "--max-megapixels", "4", "--max-megabytes", "2"])
    args = Namespace(**{**vars(args), "port": None})
    page = demo.build(args, tmp_path_factory.mktemp("shown"))
    yield demo.launch(page, args, block=False).rstrip("/")
    page.close()
