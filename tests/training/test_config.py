"""Settings of the trainer: nonsense is refused by name."""

from __future__ import annotations

import pytest

from instructsam.training.config import TrainerConfig


def config(**values) -> TrainerConfig:
    return TrainerConfig(**{"output_dir": "out", "max_steps": 1, **values})


@pytest.mark.parametrize(
    "setting",
    [
        {"max_steps": 0},
        {"max_steps": True},
        {"max_steps": None},
        {"per_device_batch_size": 0},
        {"per_device_batch_size": None},
        {"tokens_per_batch": 100},  # beside a batch size
        {"phrases_per_batch": 100},
        {"tokens_per_batch": 0, "per_device_batch_size": None},
        {"phrases_per_batch": 1.5, "per_device_batch_size": None},
        {"accumulation": 1.5},
        {"accumulation": None},
        {"clip_norm": -1.0},
        {"clip_norm": float("nan")},
        {"precision": "fp32"},
        {"frozen_dtype": "bfloat16"},
        {"frozen_dtype": "float16", "precision": "bf16"},
        {"epochs": 1.0},
        {"epochs": 0.0, "max_steps": None},
        {"epochs": True, "max_steps": None},
        {"epochs": float("inf"), "max_steps": None},
        {"epochs": None, "max_steps": None},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"ema_decay": None},
        {"ema_decay": float("nan")},
        {"nonfinite": "ignore"},
        {"max_nonfinite": -1},
        {"max_nonfinite": None},
        {"spike_window": 19},
        {"spike_window": 50.0},
        {"spike_factor": -1.0},
        {"spike_factor": float("inf")},
        {"seed": -1},
        {"num_workers": -1},
        {"checkpoint_every": -1},
        {"keep_checkpoints": -1},
        {"best_metric": "AP50"},  # never evaluates
        {"eval_every": -1},
        {"log_every": 0},
        {"max_skipped": -1},
        {"profile_steps": -1},
        {"resume": "maybe"},
        {"wandb_mode": "on"},
        {"output_dir": " "},
    ],
    ids=str,
)
def test_nonsense_settings_are_errors(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        config(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0.5, "max_steps": None},
        {"per_device_batch_size": None, "tokens_per_batch": 100},
        {"per_device_batch_size": None, "tokens_per_batch": 100, "phrases_per_batch": 5},
        {"precision": "bf16", "frozen_dtype": "bfloat16"},
        {"best_metric": "-error", "eval_every": 1},
        {"clip_norm": 0, "spike_factor": 0, "keep_checkpoints": 0, "checkpoint_every": 0, "max_nonfinite": 0},
        {"max_skipped": 0},
        {"resume": "fresh", "nonfinite": "skip", "wandb_mode": "disabled", "ema_decay": 0.999},
    ],
    ids=str,
)
def test_what_makes_sense_is_taken_as_it_is(setting):
    made = config(**setting)
    assert {name: getattr(made, name) for name in setting} == setting
    assert TrainerConfig.from_dict({"output_dir": "out", "max_steps": 1, **setting}) == made


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="max_stpes"):
        TrainerConfig.from_dict({"output_dir": "out", "max_steps": 1, "max_stpes": 2})
