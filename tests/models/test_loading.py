"""Reading safetensors folders: single and sharded files, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from instructsam.models.loading import TensorFolder


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 2, 2), "scale": ()}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(params=["5GB", "20"], ids=["single", "sharded"])
def folder(request, tensors, tmp_path) -> Path:
    save_torch_state_dict(tensors, tmp_path, max_shard_size=int(request.param) if request.param == "20" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (request.param == "20")
    return tmp_path


def test_names_shapes_and_values(folder, tensors):
    found = TensorFolder(folder)
    assert set(found) == set(tensors) and len(found) == len(tensors)
    assert all(found.shape(name) == tuple(tensor.shape) for name, tensor in tensors.items())
    read = found.read(dict.fromkeys(tensors), None)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_first_rows_and_dtype(folder, tensors):
    read = TensorFolder(folder).read({"a.weight": 2}, torch.float32)
    assert set(read) == {"a.weight"} and read["a.weight"].dtype == torch.float32
    assert torch.equal(read["a.weight"], tensors["a.weight"][:2].float())


def test_what_is_read_outlives_the_file(folder, tensors):
    read = TensorFolder(folder).read({"a.weight": None}, None)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(read["a.weight"], tensors["a.weight"])


@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_a_truncated_file_says_so(folder, keep):
    victim = sorted(folder.glob("*.safetensors"))[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"{victim.name}: truncated"):
        TensorFolder(folder)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"\.\./model.safetensors"),
        ({"weight_map": {"b": "one.safetensors"}}, r"1 tensors are not in the shard it names \(first: b\)"),
        ({"weights": {}}, "is no index"),
        ([], "is no index"),
    ],
)
def test_a_broken_index_says_what(tmp_path, index, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        TensorFolder(tmp_path)
