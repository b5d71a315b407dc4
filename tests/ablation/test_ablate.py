"""The command as a user runs it, on a tiny world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_fixtures import settings_of

from instructsam.ablate import ablate
from instructsam.evaluate import evaluate
from instructsam.train import train


def toy(*overrides: str) -> dict:
    return settings_of("ablate", "experiment=ablation/query_mode", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=add/7", "CELL/SEED"),
        ("bootstrap=0", "bootstrap=0"),
        ("retry=1", "retry=1"),
        ("ablation.train=['trainer.nonsense=2']", "cell replace, bridge: .*nonsense"),
        ("ablation.default=both", "no such cell"),
    ],
)
def test_wrong_settings_run_nothing(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        ablate(toy(f"output_dir={tmp_path}/out", override))
    assert not (tmp_path / "out").exists()


def test_the_training_command_refuses_an_ablation():
    with pytest.raises(ValueError, match="python -m instructsam.ablate"):
        train(settings_of("train", "experiment=ablation/queries"))


def test_only_and_report_only_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        ablate(toy(f"output_dir={tmp_path}/out", "only=add/0", "report_only=true"))


@pytest.mark.slow
def test_the_attention_of_a_checkpoint_changed_at_test_time(checkpoint, world, tmp_path):
    """Reaches the model, is on record, and results of one rule are not taken for those of another."""
    common = (f"checkpoint={checkpoint}", f"benchmark.root={world}", "limit=3", "query_reliance=false", "html=false")
    common += ("gallery_rows=0", "threads=1", "workers=0", "bootstrap=0", f"output_dir={tmp_path}")
    evaluate(settings_of("eval", *common, "attention_variant=isolated", "max_new_tokens=8"))
    assert '"attention_variant": "isolated"' in (tmp_path / "metrics.json").read_text()
    with pytest.raises(ValueError, match="attention_variant"):
        evaluate(settings_of("eval", *common, "max_new_tokens=8"))
    with pytest.raises(ValueError, match="attention_variant=nonsense: must be"):
        evaluate(settings_of("eval", *common, "attention_variant=nonsense"))
    with pytest.raises(ValueError, match="needs the model"):
        evaluate(settings_of("eval", f"predictions={tmp_path}/predictions.jsonl", "attention_variant=causal"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_end_to_end(world, tmp_path):
    """Two cells that train and one that only tests otherwise; then cell by cell through Hydra's multirun."""
    stages = [
        f"data.root={world}",
        "model.init=[]",
        "trainer.max_steps=2",
        "trainer.per_device_batch_size=2",
        "threads=1",
    ]
    test = [f"benchmark.root={world}", "limit=6", "max_new_tokens=8", "query_reliance=false", "threads=1", "workers=0"]
    test += ["bootstrap=0", "html=false", "gallery_rows=0"]
    command = [
        *(sys.executable, "-m", "instructsam.ablate", "experiment=ablation/query_mode", f"output_dir={tmp_path}/out"),
        *("ablation.seeds=[0]", f"ablation.train={stages}", f"ablation.evaluate={test}"),  # as Python writes lists
        *("bootstrap=20", "+ablation.cells.swapped={trained_as:add,evaluate:['attention_variant=isolated']}"),
    ]
    swept = [command[0], command[1], command[2], "-m", *command[3:], "only=replace/0,add/0"]
    first = subprocess.run(swept, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    cells = Path(tmp_path / "out/cells")
    assert (cells / "add/seed_0/eval/metrics.json").is_file() and not (cells / "swapped").exists()
    losses = (cells / "add/seed_0/train/bridge/losses.jsonl").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert (cells / "add/seed_0/train/bridge/losses.jsonl").stat().st_mtime_ns == losses
    found = json.loads((tmp_path / "out/figures.json").read_text())
    assert [cell["seeds"]["0"]["status"] for cell in found["cells"].values()] == ["complete"] * 3
    assert found["num_instructions"] == 6 and found["cells"]["add"]["cost"]["parameters"]["mean"] > 1e5
    metrics = json.loads((cells / "swapped/seed_0/eval/metrics.json").read_text())
    assert metrics["settings"]["attention_variant"] == "isolated"
    broken = [
        *command,
        "ablation.seeds=[1]",
        "ablation.train=['trainer.max_steps=2','data.root=/nowhere']",
        "only=add/1",
    ]
    failed = subprocess.run(broken, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "add/1: failed (bridge: exit code 1:" in failed.stdout, failed.stdout
