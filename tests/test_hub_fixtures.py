"""The tiny hub folders have the real ones' names, files and quirks."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hub_fixtures import NUM_DETECTOR_QUERIES, QWEN_HUB_TOKENS
from safetensors import safe_open
from transformers import AutoTokenizer


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → (shape, dtype) of every tensor in a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                assert name not in found
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def test_qwen3_vl(qwen3_vl_dir: Path, sharded_qwen3_vl_dir: Path):
    tensors = stored(qwen3_vl_dir)
    assert "lm_head.weight" not in tensors  # tied
    assert {re.match(r"model\.(language_model|visual)\.", name) is not None for name in tensors} == {True}
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_dir)
    assert tensors["model.language_model.embed_tokens.weight"][0][0] >= len(tokenizer) + 4
    assert tokenizer.convert_tokens_to_ids(list(QWEN_HUB_TOKENS)) == list(range(320, len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids("[SEG]") is None and tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer("a stone wall").input_ids) == "a stone wall"
    assert stored(sharded_qwen3_vl_dir) == tensors
    index = json.loads((sharded_qwen3_vl_dir / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 1


def test_sam3(sam3_dir: Path, sharded_sam3_dir: Path):
    tensors = stored(sam3_dir)
    parts = {"detector_model", "tracker_model", "tracker_neck"}
    assert {name.split(".")[0] for name in tensors} == parts
    assert {name.split(".")[1] for name in tensors} & parts == set()
    assert {dtype for _, dtype in tensors.values()} == {"F32"}
    assert tensors["detector_model.detr_decoder.query_embed.weight"][0][0] == NUM_DETECTOR_QUERIES
    for part in ("text_encoder.", "detr_decoder.presence_token.", "vision_encoder.neck.", "text_projection."):
        assert any(name.startswith(f"detector_model.{part}") for name in tensors), part
    assert stored(sharded_sam3_dir) == tensors
    assert len(list(sharded_sam3_dir.glob("*.safetensors"))) > 1


def test_folders_stay_small(qwen3_vl_dir: Path, sam3_dir: Path):
    for folder in (qwen3_vl_dir, sam3_dir):
        assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
