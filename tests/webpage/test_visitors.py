"""The page, asked by several visitors without a browser."""

from __future__ import annotations

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from instructsam import demo
from instructsam.webpage.asking import Conversation
from instructsam.webpage.downloads import Downloads


def client(address: str) -> httpx.Client:
    """It waits long, for busy machines; and without certificates, which take longer to read than the answer."""
    return httpx.Client(base_url=address, timeout=300, verify=False)


@functools.cache
def events(address: str) -> dict[str, int]:
    with client(address) as page:
        described = page.get("/config").json()["dependencies"]
    return {one["api_name"]: one["id"] for one in described}


def send(address: str, visitor: str, name: str, data: list[Any]) -> dict[str, Any]:
    """What the page in a browser sends and gets for one event, without the browser."""
    asked = {"data": data, "fn_index": events(address)[name], "session_hash": visitor}
    with client(f"{address}/gradio_api") as page:
        page.post("/queue/join", json=asked).raise_for_status()
        with page.stream("GET", "/queue/data", params={"session_hash": visitor}) as answer:
            for line in answer.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    return message
    raise AssertionError("the stream ended without an answer")


def visit(address: str, path: str, phrases: str, visitor: str) -> dict[str, Any]:
    """One question."""
    with open(path, "rb") as file, client(address) as page:
        [stored] = page.post("/gradio_api/upload", files={"files": (Path(path).name, file)}).json()
    picture = {"path": stored, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}
    answered = send(address, visitor, "run", [None, picture, "", phrases])
    return send(address, visitor, "view", [None, 0.3]) if answered["success"] else answered


@pytest.mark.slow
def test_twenty_visitors(address, examples, asker):
    """All at once: each gets the right answer, and the page stays up."""
    expected = [asker.ask(Conversation(), path, "", "squares").result for path, _ in examples]
    events(address)  # which all of them use
    with ThreadPoolExecutor(20) as visitors:
        places = [k % len(examples) for k in range(20)]
        asked = [
            visitors.submit(visit, address, examples[k][0], "squares", f"visitor{n}") for n, k in enumerate(places)
        ]
        for k, one in zip(places, asked, strict=True):
            message = one.result()
            assert message["success"], message
            _, answer, _, _, chosen, _, table, *_ = message["output"]["data"]
            assert answer == "[ squares ]"
            scores = [row[2] for row in table["data"]]
            wanted = [round(instance.score, 3) for instance in expected[k] if instance.score > 0.3]
            assert scores == pytest.approx(wanted, abs=0.002) and len(chosen["choices"]) == len(wanted)
    with client(address) as page:
        assert page.get("/").status_code == 200


@pytest.mark.slow
def test_files_are_made_when_they_are_asked_for(address, examples, monkeypatch):
    written, write = [], Downloads.write
    monkeypatch.setattr(Downloads, "write", lambda self, *args: written.append(args) or write(self, *args))
    assert visit(address, examples[-1][0], "squares, circles", "collector")["success"]
    assert send(address, "collector", "at_threshold", [None, 0.5])["success"]
    assert send(address, "collector", "with_instances", [None, [0]])["success"]
    assert written == []
    [file] = send(address, "collector", "write_png", [None, [0]])["output"]["data"]
    assert file["orig_name"].endswith("_overlay.png") and len(written) == 1


@pytest.mark.slow
def test_visitors_slide_at_the_same_time(address, examples, monkeypatch):
    """Neither is drawn before the other is being drawn too."""
    visitors = ("first", "second")
    assert all(visit(address, examples[0][0], "squares", visitor)["success"] for visitor in visitors)
    both = threading.Barrier(2, timeout=300)

    def draw(*args: Any) -> None:
        both.wait()

    monkeypatch.setattr("instructsam.webpage.page.picture_of", draw)
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(lambda visitor: send(address, visitor, "at_threshold", [None, 0.5]), visitors))
    assert all(one["success"] for one in drawn), drawn


@pytest.mark.slow
def test_the_longest_absent_visitor_is_forgotten(address, examples):
    """Conversations hold pictures: so many are kept and no more."""
    assert visit(address, examples[0][0], "squares", "absent")["success"]
    for k in range(demo.SESSIONS - 1):
        send(address, f"other{k}", "at_threshold", [None, 0.5])
    assert send(address, "absent", "write_png", [None, []])["success"]
    for k in range(demo.SESSIONS):
        send(address, f"another{k}", "at_threshold", [None, 0.5])
    message = send(address, "absent", "write_png", [None, []])
    assert not message["success"] and message["output"]["error"] == "The answer is no longer kept: ask again."
