"""Memory, and the time that the parts of a single pass and of decoding take; used by `smoke_full_size.py`.

The model itself is not touched: the methods of one predictor are wrapped.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructsam.models.decoding import decode
from instructsam.predictor import Predictor


def peak_memory() -> int:
    """Most memory that this process has had resident so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "bfloat16 in hardware": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in info.split()],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


class Clock:
    """Adds up the seconds that chosen methods take, by label, and keeps what each returned last."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last: dict[str, Any] = {}

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, owner: Any, method: str, label: str) -> None:
        """Measure every later call of a method of this one object."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self.last[label] = original(*args, **kwargs)
            self.seconds[label] += self.now() - start
            return self.last[label]

        setattr(owner, method, timed)


def watch_parts(predictor: Predictor, clock: Clock) -> None:
    """Let the clock measure what a single pass consists of."""
    model, processor = predictor.model, predictor.processor
    clock.watch(processor, "encode_image", "preprocessing")
    clock.watch(processor, "collate", "preprocessing")
    clock.watch(model.vlm.visual, "forward", "VLM's vision tower")
    clock.watch(model.vlm.language_model, "forward", "language model, whole sequence")
    clock.watch(model.detector, "encode_image", "detector's vision encoder")
    clock.watch(model.detector, "forward", "detector: fusion, decoder, masks")
    clock.watch(processor, "instances", "post-processing")


def single_pass(predictor: Predictor, clock: Clock, picture: Any, phrases: list[str]) -> dict[str, float]:
    """Segment `phrases` in one forward pass; seconds of every part, by `watch_parts`.

    Raises:
        RuntimeError: masks, scores or boxes that are not finite.
    """
    clock.seconds.clear()
    start = clock.now()
    # Threshold 0 keeps all queries, so that post-processing is not measured on what random scores happen to leave.
    prediction = predictor.detect(predictor.understand([picture], [" and ".join(phrases)], [phrases]), 0.0)[0]
    total = clock.now() - start
    output = clock.last["detector: fusion, decoder, masks"]
    if not all(bool(value.isfinite().all()) for value in (output.pred_masks, output.pred_logits, output.pred_boxes)):
        raise RuntimeError("masks, scores or boxes are not finite")
    config = predictor.model.config
    assert output.pred_masks.shape == (len(phrases), config.num_queries, *config.mask_size)
    assert len(prediction.instances) == len(phrases) * config.num_queries
    assert all(instance.rle["size"] == [picture.height, picture.width] for instance in prediction.instances)
    parts = dict(clock.seconds)
    return {**parts, "the rest": total - sum(parts.values()), "all": total}


def write_answer(predictor: Predictor, clock: Clock, picture: Any, instruction: str, count: int) -> dict[str, float]:
    """Decode exactly `count` tokens greedily; seconds until the first one could be chosen, and of the step after each.

    Raises:
        RuntimeError: hidden states that are not finite.
    """
    model, processor = predictor.model, predictor.processor
    item = processor.encode_image(picture)
    chat = processor.encode_chat(item["image_grid_thw"], [(instruction, None)])
    batch = {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in processor.collate([{**item, "input_ids": chat.input_ids}]).items()
    }
    chosen: list[float] = []

    def choose(step: int, logits: Tensor) -> Tensor:
        chosen.append(clock.now())
        logits[:, model.config.token_ids["eos"]] = -torch.inf  # random weights must not end the answer early
        return logits.argmax(-1)

    vision = (batch["pixel_values"], batch["image_grid_thw"])
    start = clock.now()
    decoded = decode(model, batch["input_ids"], batch["attention_mask"], *vision, max_new_tokens=count, choose=choose)
    end = clock.now()
    if not bool(decoded.language.hidden_BLC.isfinite().all()):
        raise RuntimeError("hidden states of the decoded answer are not finite")
    assert len(chosen) == count
    return {"prompt": chosen[0] - start, "per token": (end - chosen[0]) / count, "tokens": count}
