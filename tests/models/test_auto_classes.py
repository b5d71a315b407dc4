"""transformers' Auto classes and the hub, as for any of its models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from instructsam.models.modeling import InstructSAMModel


@pytest.mark.multiprocess
def test_the_auto_classes_know_a_checkpoint(checkpoint):
    code = f"""
import pytest
from transformers import AutoConfig, AutoModel, AutoProcessor
import instructsam.models.modeling
found = [cls.from_pretrained({str(checkpoint)!r}) for cls in (AutoConfig, AutoModel, AutoProcessor)]
print([type(one).__name__ for one in found], found[1].load_report.layout)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['InstructSAMConfig', 'InstructSAMModel', 'InstructSAMProcessor'] InstructSAM"


def test_a_model_is_pushed_in_shards(checkpoint, uploads):
    InstructSAMModel.from_pretrained(checkpoint).push_to_hub("someone/segmenter", max_shard_size="2MB")
    (commit,) = uploads.commits
    assert commit["repo_id"] == "someone/segmenter"
    index = json.loads(commit["files"]["model.safetensors.index.json"])
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and shards | {"config.json", "model.safetensors.index.json"} <= set(commit["files"])


@pytest.mark.slow
def test_sharded_is_the_same_model(checkpoint, tmp_path):
    model = InstructSAMModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = InstructSAMModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
