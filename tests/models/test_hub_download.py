"""Downloads with the real client of the hub, from a hub that runs on this computer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from pretended_hub import serve

from instructsam.models.hub import resolve
from instructsam.processing import hub
from instructsam.processing.processor import InstructSAMProcessor


@pytest.fixture
def online(tmp_path, monkeypatch, sam3_dir, sharded_qwen3_vl_dir, checkpoint) -> Iterator[list[str]]:
    """A hub with three models and three that are refused; yields the requests it gets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models = {
        "facebook/sam3": sam3_dir,
        "Qwen/tiny": sharded_qwen3_vl_dir,
        "me/segmenter": checkpoint,
        "facebook/gated": sam3_dir,
    }
    refused = {"facebook/gated": (403, "GatedRepo"), "me/private": (401, "RepoNotFound"), "me/broken": (503, "")}
    with serve(models, refused) as (endpoint, requests):
        download = functools.partial(snapshot_download, endpoint=endpoint)
        monkeypatch.setattr(hub, "snapshot_download", download)
        yield requests


def same_files(first: Path, second: Path) -> bool:
    return {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_download_and_cache(online, tmp_path, sharded_qwen3_vl_dir, monkeypatch):
    folder = resolve("Qwen/tiny", "Qwen3-VL", cache_dir=tmp_path / "cache")
    assert folder.is_relative_to(tmp_path / "cache") and same_files(folder, sharded_qwen3_vl_dir)
    before = sum("resolve" in path for path in online)
    assert resolve("Qwen/tiny", "Qwen3-VL", cache_dir=tmp_path / "cache") == folder
    assert sum("resolve" in path for path in online) == before  # nothing is fetched twice
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("Qwen/tiny", "Qwen3-VL", cache_dir=tmp_path / "cache") == folder
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 forbids to download it"):
        resolve("facebook/sam3", "SAM 3", cache_dir=tmp_path / "cache")


def test_an_interrupted_download_goes_on(online, tmp_path, sharded_qwen3_vl_dir):
    cache = tmp_path / "cache"
    folder = resolve("Qwen/tiny", "Qwen3-VL", cache_dir=cache)
    lost = next(folder.glob("model-00002*"))
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"Qwen3-VL: .*`hf download Qwen/tiny"):
        resolve("Qwen/tiny", "Qwen3-VL", cache_dir=cache, local_files_only=True)
    assert same_files(resolve("Qwen/tiny", "Qwen3-VL", cache_dir=cache), sharded_qwen3_vl_dir)


def test_patterns_keep_other_files_away(online, tmp_path):
    folder = resolve("facebook/sam3", "SAM 3", patterns=["config.json", "*.safetensors"], cache_dir=tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_the_processor_alone(online, tmp_path):
    processor = InstructSAMProcessor.from_pretrained("me/segmenter", cache_dir=tmp_path, max_length=64)
    assert processor.max_length == 64 and processor.chat.question("the red circles")
    assert not any("safetensors" in path for path in online)
    with pytest.raises(ValueError, match=r"InstructSAM processor: .*knows no model of that name"):
        InstructSAMProcessor.from_pretrained("me/none", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no processor_config.json there"):
        InstructSAMProcessor.from_pretrained("Qwen/tiny", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("facebook/gated", {}, ["accept them at https://huggingface.co/facebook/gated", "`hf auth login`"]),
        ("me/private", {}, ["knows no model of that name, or it is private", "`hf auth login`"]),
        ("me/none", {}, ["knows no model of that name, or it is private"]),
        ("facebook/sam3", {"revision": "v9"}, ["no revision 'v9'"]),
        ("me/broken", {}, ["the hub is in trouble", "503", "`hf download me/broken"]),
        ("facebook/sam3", {"local_files_only": True}, ["local_files_only=True forbids", "`hf download facebook/sam3"]),
    ],
)
def test_refusals(online, tmp_path, name, options, expected):
    with pytest.raises(ValueError, match=f"SAM 3: there is no folder {name} here, and ") as caught:
        resolve(name, "SAM 3", cache_dir=tmp_path, **options)
    for part in expected:
        assert part in str(caught.value)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nobody = functools.partial(snapshot_download, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(hub, "snapshot_download", nobody)
    with pytest.raises(ValueError, match=r"the hub cannot be reached.*`hf download facebook/sam3"):
        resolve("facebook/sam3", "SAM 3", cache_dir=tmp_path / "cache")
