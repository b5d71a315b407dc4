"""Saving, loading and sharing of the processor, from folders and from a pretended hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoTokenizer

import instructsam.models.configuration  # noqa: F401 (registers the processor with AutoProcessor)
from instructsam.processing import hub
from instructsam.processing.images import VLMImageTransform
from instructsam.processing.pretrained import CONFIG_NAME, FILES
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.processing.special_tokens import add_special_tokens


@pytest.fixture
def processor(world) -> InstructSAMProcessor:
    tokenizer = AutoTokenizer.from_pretrained(str(world / "tokenizer"))
    image = VLMImageTransform(patch_size=8, min_pixels=4096, max_pixels=65536)
    return InstructSAMProcessor(tokenizer, 3, (24, 24), image, 96, max_length=200, mask_resize="nearest-exact")


@pytest.fixture
def saved(processor, tmp_path) -> Path:
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_save_and_load(processor, saved):
    again = InstructSAMProcessor.from_pretrained(saved)
    assert again.chat.token_ids == processor.chat.token_ids
    assert again.vlm_image == processor.vlm_image and again._settings == processor._settings
    assert (again.mask_size, again.detector_image.size) == ((24, 24), 96)
    assert again.chat.question("the red circles") == processor.chat.question("the red circles")


def test_settings_of_a_transform_or_of_a_dict_are_stored_alike(processor):
    values = {"patch_size": 8, "min_pixels": 4096, "max_pixels": 65536}
    other = InstructSAMProcessor(processor.tokenizer, 3, (24, 24), values, 96, 200, "nearest-exact")
    assert other._settings == processor._settings
    assert other._settings["vlm_image"]["mean"] == 0.5  # complete, also where a default was meant


def test_overrides_win_and_unknown_ones_are_refused(saved):
    again = InstructSAMProcessor.from_pretrained(saved, max_length=77, trust_remote_code=True)
    assert again.max_length == 77 and again.num_queries == 3
    with pytest.raises(TypeError, match="unknown argument max_lenght"):
        InstructSAMProcessor.from_pretrained(saved, max_lenght=77)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "class None, so this is not an InstructSAM checkpoint"),
        ('{"processor_class": "Qwen3VLProcessor"}', "class 'Qwen3VLProcessor', so this is not an InstructSAM"),
        ('{"processor_class": "InstructSAMProcessor", "num_queries": 3}', "no mask_size in it"),
        (
            '{"processor_class": "InstructSAMProcessor", "num_queries": 3, "mask_size": [2, 2], "colour": 1}',
            "unknown setting colour",
        ),
    ],
)
def test_broken_folders(saved, content, message):
    (saved / CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        InstructSAMProcessor.from_pretrained(saved)
    assert str(saved / CONFIG_NAME) in str(caught.value)


def test_folders_without_a_processor(saved, tmp_path, sam3_dir):
    with pytest.raises(ValueError, match="no processor_config.json there, so this is not an InstructSAM checkpoint"):
        InstructSAMProcessor.from_pretrained(sam3_dir)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        InstructSAMProcessor.from_pretrained(tmp_path / "nowhere")
    assert InstructSAMProcessor.is_saved_in(saved) and not InstructSAMProcessor.is_saved_in(sam3_dir)
    whole = (saved / "tokenizer.json").read_text()
    (saved / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="saved: its tokenizer cannot be read"):
        InstructSAMProcessor.from_pretrained(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="saved: no tokenizer there"):
        InstructSAMProcessor.from_pretrained(saved)


def test_auto_processor(checkpoint):
    found = AutoProcessor.from_pretrained(checkpoint)
    assert type(found) is InstructSAMProcessor
    assert found._settings == InstructSAMProcessor.from_pretrained(checkpoint)._settings
    assert AutoProcessor.from_pretrained(checkpoint, max_length=99).max_length == 99
    with pytest.raises(TypeError, match="unknown argument max_lenght"):
        AutoProcessor.from_pretrained(checkpoint, max_lenght=99)


@pytest.mark.multiprocess
def test_a_tokenizer_of_the_hub_keeps_its_own_class_out_of_the_way(qwen3_vl_dir, tmp_path):
    """Qwen's tokenizer files may name Qwen's processor: ours goes first, and no model class is needed to read it."""
    folder = tmp_path / "theirs"
    shutil.copytree(qwen3_vl_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "processor_class": "Qwen3VLProcessor"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_special_tokens(tokenizer, 384)
    InstructSAMProcessor(tokenizer, 3, (48, 48)).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "instructsam"}')
    found = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(found) is InstructSAMProcessor and found.chat.token_ids["seg"] == 347
    code = (
        "import sys; from instructsam.processing.processor import InstructSAMProcessor as P; "
        f"p = P.from_pretrained({str(tmp_path / 'ours')!r}); "
        "print(type(p.tokenizer).__name__, p.chat.token_ids['seg'], 'instructsam.models' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["Qwen2Tokenizer", "347", "False"]


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_hub_names_are_downloaded_with_their_options(saved, tmp_path, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    again = InstructSAMProcessor.from_pretrained(
        "someone/segmenter", revision="v2", token="secret", cache_dir=tmp_path, local_files_only=True, max_length=50
    )
    assert again.max_length == 50
    ((name, options),) = calls
    assert name == "someone/segmenter"
    given = {key: options[key] for key in hub.HUB_OPTIONS}
    assert given == {
        "revision": "v2", "token": "secret", "cache_dir": tmp_path, "local_files_only": True, "force_download": False,
    }  # fmt: skip
    assert options["allow_patterns"] == list(FILES) and "*.bin" in options["ignore_patterns"]
    again.save_pretrained(tmp_path / "again")
    assert not any("secret" in path.read_text() for path in (tmp_path / "again").iterdir())


def test_the_files_of_a_download_are_all_that_is_needed(saved, checkpoint):
    """FILES take everything that save_pretrained writes, and nothing of a model's."""
    from huggingface_hub.utils import filter_repo_objects

    written = sorted(path.name for path in saved.iterdir())
    assert sorted(filter_repo_objects(written, allow_patterns=list(FILES))) == written
    everything = [path.name for path in checkpoint.iterdir()]
    taken = set(filter_repo_objects(everything, allow_patterns=list(FILES)))
    assert taken.isdisjoint({"config.json", "model.safetensors"}) and CONFIG_NAME in taken


def test_push_to_hub_sends_the_files_of_save_pretrained(processor, saved, uploads):
    processor.push_to_hub("someone/segmenter", private=True, token="secret", commit_message="first")
    (commit,) = uploads.commits
    assert uploads.created == [("someone/segmenter", True, "secret")]
    assert (commit["repo_id"], commit["commit_message"]) == ("someone/segmenter", "first")
    assert set(commit["files"]) == {path.name for path in saved.iterdir()} | {"README.md"}
    assert commit["files"][CONFIG_NAME] == (saved / CONFIG_NAME).read_bytes()
    assert commit["files"]["tokenizer.json"] == (saved / "tokenizer.json").read_bytes()


def test_save_pretrained_can_push(processor, tmp_path, uploads):
    processor.save_pretrained(tmp_path / "segmenter", push_to_hub=True)
    processor.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="someone/other", revision="dev")
    assert [commit["repo_id"] for commit in uploads.commits] == ["me/segmenter", "someone/other"]
    assert ("branch", "dev") in uploads.created
    assert InstructSAMProcessor.is_saved_in(tmp_path / "other")


def test_options_of_pushing_are_not_swallowed(processor, tmp_path, uploads):
    with pytest.raises(TypeError, match="repo_id, private without push_to_hub=True"):
        processor.save_pretrained(tmp_path / "a", repo_id="someone/segmenter", private=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(TypeError, match="privat"):
        processor.save_pretrained(tmp_path / "a", push_to_hub=True, privat=True)
    assert not uploads.commits
