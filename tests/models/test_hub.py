"""From path or hub name to a complete model folder, and what people read when that fails. No network is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from instructsam.models.hub import resolve
from instructsam.processing import hub

NAME = "facebook/sam3"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No hub name is a folder here, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("a download was tried"))


def failing(monkeypatch, error: Exception) -> None:
    def download(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)


def answer(status: int) -> Mock:
    return Mock(status_code=status, headers={}, request=Mock(method="GET", url="https://hub"))


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_local_folders_come_back_as_they_are(qwen3_vl_dir, sharded_sam3_dir, checkpoint, monkeypatch):
    assert resolve(qwen3_vl_dir, "Qwen3-VL") == qwen3_vl_dir
    assert resolve(str(sharded_sam3_dir), "SAM 3") == sharded_sam3_dir
    assert resolve(checkpoint, "InstructSAM") == checkpoint
    shutil.copytree(qwen3_vl_dir, "Qwen/tiny")  # looks like a hub name, but is here
    assert resolve("Qwen/tiny", "Qwen3-VL") == Path("Qwen/tiny")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert resolve("~/Qwen/tiny", "Qwen3-VL") == Path.cwd() / "Qwen/tiny"


@pytest.mark.parametrize(
    "path",
    ["/data/sam3", "./sam3", "../a/b", "weights/facebook/sam3", "sam3", "~/sam3", "a/b/", "https://huggingface.co/a/b"],
)
def test_paths_that_are_not_there_are_no_hub_names(path):
    with pytest.raises(ValueError, match=r"^SAM 3: no folder .* \(a model on the hub would be named ORG/NAME\)"):
        resolve(path, "SAM 3")
    with pytest.raises(ValueError, match="no folder facebook/sam3"):  # a Path is never a name
        resolve(Path(NAME), "SAM 3")


@pytest.mark.parametrize("path", ["", " "])
def test_nothing_given(path):
    with pytest.raises(ValueError, match="SAM 3: neither a folder nor a hub name is given"):
        resolve(path, "SAM 3")


def test_a_file_is_no_folder(sam3_dir):
    with pytest.raises(ValueError, match=r"SAM 3: .*model.safetensors is a file: give the folder it lies in"):
        resolve(sam3_dir / "model.safetensors", "SAM 3")


@pytest.fixture
def folder(sam3_dir) -> Path:
    shutil.copytree(sam3_dir, "copy")
    return Path("copy")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"SAM 3: copy: no config.json there.*`hf download ORG/NAME --local-dir copy`"):
        resolve(folder, "SAM 3")
    shutil.copytree(folder, "outer/inner")
    (Path("outer/inner") / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"there is one in outer/inner"):
        resolve("outer", "SAM 3")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"SAM 3: copy: no weights there.*`hf download"):
        resolve(folder, "SAM 3")


def test_two_saves_in_one_folder(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"both model.safetensors and model.safetensors.index.json there"):
        resolve(folder, "SAM 3")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sam3.pt"])
def test_pickles_are_never_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=rf"its weights are pickles \({name}\).*never read here.*`python -c") as caught:
        resolve(folder, "SAM 3")
    assert "weights_only=True" in str(caught.value)


@pytest.mark.multiprocess
def test_the_command_that_converts_pickles_works(folder):
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save({**weights, "tied": weights["a"]}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickles") as caught:
        resolve(folder, "SAM 3")
    code = str(caught.value).split('python -c "')[1].split('"`')[0]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    found = load_file(folder / "model.safetensors")
    assert torch.equal(found["a"], weights["a"]) and torch.equal(found["tied"], weights["a"]) and len(found) == 3
    assert resolve(folder, "SAM 3") == folder


def test_interrupted_downloads(folder, sharded_sam3_dir):
    shutil.copytree(sharded_sam3_dir, "shards")
    shards = sorted(Path("shards").glob("*.safetensors"))
    shards[3].unlink()
    message = (
        rf"1 of the {len(shards)} files that .*index.json names are missing \(first: {shards[3].name}\).*interrupted"
    )
    with pytest.raises(ValueError, match=message):
        resolve("shards", "SAM 3")
    (Path("shards") / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="only model-00001-of-.*interrupted"):
        resolve("shards", "SAM 3")
    (folder / "model.safetensors").unlink()
    unfinished = folder / ".cache/huggingface/download/abc.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    with pytest.raises(ValueError, match="not been downloaded completely"):
        resolve(folder, "SAM 3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no index of weight files"),
        ('{"weight_map": {}}', "names no weight files"),
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            "names '../model.safetensors', which is no safetensors file in",
        ),
        ('{"weight_map": {"a": "model.bin"}}', "names 'model.bin', which is no safetensors file in that folder"),
        ('{"weight_map": {"a": 5}}', "names 5, which is no"),
        ("[]", "is no index"),
    ],
)
def test_broken_indices(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"SAM 3: copy: model.safetensors.index.json {message}"):
        resolve(folder, "SAM 3")


def test_git_lfs_pointers(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=r"model.safetensors is a pointer of Git LFS.*`git lfs pull`"):
        resolve(folder, "SAM 3")


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_hub_names_are_downloaded(sam3_dir, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(sam3_dir)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve(NAME, "SAM 3", revision="v1", token="secret", local_files_only=True) == sam3_dir
    ((name, options),) = calls
    assert name == NAME and set(options["allow_patterns"]) == {"*.json", "*.safetensors", "*.txt", "*.jinja"}
    assert (options["revision"], options["token"], options["local_files_only"]) == ("v1", "secret", True)
    assert {"*.bin", "*.pt", "*.pth", "*.pkl"} <= set(options["ignore_patterns"])
    with pytest.raises(TypeError, match="unknown option revison: the hub's are revision, token"):
        resolve(NAME, "SAM 3", revison="v1")


def test_the_patterns_take_what_is_needed_and_no_pickle(qwen3_vl_dir):
    from huggingface_hub.utils import filter_repo_objects

    files = [path.name for path in qwen3_vl_dir.iterdir()]
    pickles = ["sam3.pt", "pytorch_model.bin", "optimizer.pt"]
    more = ["README.md", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    taken = set(filter_repo_objects([*files, *pickles, *more], allow_patterns=list(hub.PATTERNS)))
    assert taken == {*files, *more[1:]}


def test_an_incomplete_snapshot_is_not_taken(sharded_sam3_dir, monkeypatch):
    shutil.copytree(sharded_sam3_dir, "snapshot")
    next(Path("snapshot").glob("*.safetensors")).unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: "snapshot")
    with pytest.raises(ValueError, match=r"SAM 3: facebook/sam3 \(in snapshot\): 1 of the .* are missing") as caught:
        resolve(NAME, "SAM 3", revision="v1")
    command = "hf download facebook/sam3 --revision v1 --include '*.json' --include '*.safetensors' --include '*.txt'"
    assert command in str(caught.value)


DOWNLOAD = "`hf download facebook/sam3 --include '*.json'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            GatedRepoError("gated", response=answer(403)),
            ["accepted its terms", "https://huggingface.co/facebook/sam3", "`hf auth login`"],
        ),
        (
            RepositoryNotFoundError("404", response=answer(404)),
            ["knows no model of that name, or it is private", "check the spelling", "`hf auth login`"],
        ),
        (RevisionNotFoundError("404", response=answer(404)), ["no revision 'v9'", "/facebook/sam3/commits"]),
        (HfHubHTTPError("401", response=answer(401)), ["refuses access", "HTTP 401", "`hf auth login`"]),
        (HfHubHTTPError("boom\nmore", response=answer(503)), ["HTTP 503 (boom)", "try again later", DOWNLOAD]),
        (LocalTokenNotFoundError("no token"), ["token=True", "`hf auth login`"]),
        (OfflineModeIsEnabled("offline"), ["forbids to download it", DOWNLOAD, "folder weights/facebook/sam3"]),
        (ConnectionError("reset"), [DOWNLOAD]),
        (OSError(28, "No space left on device"), ["failed (OSError: [Errno 28] No space left", DOWNLOAD]),
        (RuntimeError(""), ["failed (RuntimeError: no reason given)", DOWNLOAD]),
    ],
)
def test_failures_say_what_to_do(monkeypatch, error, expected):
    failing(monkeypatch, error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    with pytest.raises(ValueError, match="SAM 3: there is no folder facebook/sam3 here, and ") as caught:
        resolve(NAME, "SAM 3", revision="v9")
    assert caught.value.__cause__ is error
    for part in expected:
        assert part.replace("sam3 --include", "sam3 --revision v9 --include") in str(caught.value)


@pytest.mark.parametrize(
    ("options", "offline", "reason"),
    [
        ({}, False, "the hub cannot be reached"),
        ({}, True, "HF_HUB_OFFLINE=1 forbids to download it"),
        ({"local_files_only": True, "cache_dir": "/my/cache"}, False, "local_files_only=True forbids to download it"),
    ],
)
def test_nothing_cached(monkeypatch, options, offline, reason):
    failing(monkeypatch, LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match=f"{reason}, while the cache") as caught:
        resolve(NAME, "SAM 3", **options)
    assert DOWNLOAD in str(caught.value) and "weights/facebook/sam3" in str(caught.value)
    assert f"({options.get('cache_dir', constants.HF_HUB_CACHE)})" in str(caught.value)
