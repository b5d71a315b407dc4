"""The model at full size with random weights: build it in low precision, segment one photograph, say what that took.

    bash scripts/smoke_full_size.sh                                  # environment, matplotlib's photograph, CPU or GPU
    bash scripts/smoke_full_size.sh PICTURE.jpg --phrase "the dog" --phrase "the ball"
    bash scripts/smoke_full_size.sh --tokenizer weights/Qwen3-VL-2B-Instruct --json outputs/smoke.json
    bash scripts/smoke_full_size.sh --tiny                           # the same in seconds, with the tiny sizes

Nothing but memory and time is learnt from it: with random weights neither words nor masks mean anything. The words come
from a stand-in tokenizer unless a folder of Qwen's own is given; the embedding table has its full size either way.
Fails if a parameter is not in the asked-for precision, if building took the memory of a second copy of the weights, or
if an output is not finite.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from smoke_measure import Clock, machine, peak_memory, single_pass, watch_parts, write_answer
from torch import nn

from instructsam.configs_path import CONFIGS
from instructsam.models.configuration import InstructSAMConfig
from instructsam.models.factory import VISION_TOKENS, load_tokenizer, make_processor
from instructsam.models.full_size import full_size_config
from instructsam.models.loading import empty_model, fill
from instructsam.models.lora import TARGETS, LoraSettings
from instructsam.models.modeling import InstructSAMModel
from instructsam.models.placement import as_device, as_dtype
from instructsam.predictor import Predictor
from instructsam.processing.image_files import load_image
from instructsam.processing.special_tokens import add_special_tokens
from instructsam.processing.tokenizer import build_word_tokenizer, split_words

PHRASES = ("the woman", "the flag")
GIB = 2**30
PARTS = {  # title → module; an indented title is a part of the one above it
    "VLM: vision tower": "vlm.visual",
    "VLM: language model": "vlm.language_model",
    "  of it token embeddings": "vlm.language_model.embed_tokens",
    "query bank": "query_bank",
    "query projector": "query_projector",
    "phrase projector": "phrase_projector",
    "detector: vision encoder": "detector.vision_encoder",
    "detector: fusion encoder": "detector.detr_encoder",
    "detector: decoder": "detector.detr_decoder",
    "detector: mask decoder": "detector.mask_decoder",
}


def default_picture() -> Path:
    """The public-domain photograph among matplotlib's sample data. Raises ValueError without matplotlib."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ValueError("no picture given, and matplotlib, which brings one along, is not installed: name a picture")
    return Path(found.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


# ---- building -------------------------------------------------------------------------------------------------------


def build(tiny: bool, tokenizer_folder: str | None, texts: list[str], dtype: torch.dtype) -> Predictor:
    """Model with random weights, made on the meta device and filled in `dtype`, and the processor that fits it."""
    tokenizer: Any
    if tokenizer_folder is None:
        tokenizer = build_word_tokenizer({word for text in texts for word in split_words(text)})
    else:
        tokenizer = load_tokenizer(tokenizer_folder)
    if tiny:
        values: Any = OmegaConf.to_container(OmegaConf.load(f"{CONFIGS}/model/tiny.yaml")["config"])
        values["vlm_config"]["text_config"]["vocab_size"] = max(512, len(tokenizer) + 16)
        config = InstructSAMConfig(**values)
    else:
        config = full_size_config()
    vlm = config.vlm_config
    config.token_ids.update(add_special_tokens(tokenizer, vlm.text_config.vocab_size))
    vlm.text_config.pad_token_id = config.token_ids["pad"]
    for key, token in VISION_TOKENS.items():
        setattr(vlm, key, tokenizer.convert_tokens_to_ids(token))
    model = empty_model(InstructSAMModel, config)
    fill(model, [], dtype=dtype, may_be_new=("",), seed=0)
    return Predictor(model, make_processor(config, tokenizer, {}))


def check_build(model: nn.Module, dtype: torch.dtype, memory_before: int, memory_after: int) -> None:
    """Raises RuntimeError if parameters are in another precision or if building took more than the weights' memory."""
    wrong = [name for name, parameter in model.named_parameters() if parameter.dtype != dtype]
    # Tables of positions and frequencies stay in float32.
    floats = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    wrong += [name for name, buffer in floats.items() if buffer.dtype != torch.float32]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors are not in the right precision, first {wrong[0]}")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A float32 copy of no more than the detector would already be beyond this.
    if memory_after - memory_before > 1.25 * weights + GIB / 4:
        raise RuntimeError(
            f"building took {(memory_after - memory_before) / GIB:.2f} GiB for {weights / GIB:.2f} GiB of weights"
        )


def count_parameters(model: InstructSAMModel) -> dict[str, int]:
    """Parameters of each part, of all, and of what the first stage trains (configs/optim/stage1.yaml with LoRA)."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    counts = {title: count(model.get_submodule(path)) for title, path in PARTS.items()}
    total = count(model)
    counts["detector: the rest"] = total - sum(n for title, n in counts.items() if not title.startswith(" "))
    return {**counts, "all": total, "  trained in stage 1": sum(stage1_parameters(model).values())}


def stage1_parameters(model: InstructSAMModel) -> dict[str, int]:
    """Name → size of every parameter that the first stage trains; LoRA's are counted without peft."""
    patterns = [re.compile(pattern) for pattern in OmegaConf.load(f"{CONFIGS}/optim/stage1.yaml")["train"]]
    adapted = [(name, module) for name, module in model.named_modules() if re.fullmatch(TARGETS, name)]
    sizes = {f"{name}.lora": LoraSettings().r * (m.in_features + m.out_features) for name, m in adapted}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(pattern.search(f"model.{name}") for pattern in patterns):
            sizes[name] = parameter.numel()
    return sizes


# ---- the report -----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build, check, measure; the report as plain data (seconds, bytes)."""
    device = as_device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = as_dtype(args.dtype)
    if dtype is None or args.max_new_tokens < 1 or (args.runs is not None and args.runs < 1):
        raise ValueError("name a dtype; --max-new-tokens and --runs must be at least 1")
    picture, phrases = load_image(args.image or default_picture()), args.phrase or list(PHRASES)
    instruction = f"segment {' and '.join(phrases)}"
    memory = {"before": peak_memory()}
    start = time.perf_counter()
    predictor = build(args.tiny, args.tokenizer, [instruction], dtype)
    seconds_building = time.perf_counter() - start
    memory["after building"] = peak_memory()
    model = predictor.model
    check_build(model, dtype, memory["before"], memory["after building"])
    model.to(device)
    on_gpu = device.type == "cuda"
    clock = Clock(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    answers = [write_answer(predictor, clock, picture, instruction, args.max_new_tokens) for _ in range(1 + on_gpu)]
    watch_parts(predictor, clock)
    runs = [
        single_pass(predictor, clock, picture, phrases) for _ in range((args.runs or (5 if on_gpu else 1)) + on_gpu)
    ]
    timed = runs[on_gpu:]  # on a GPU the first one is the warm-up
    memory["after segmenting"] = peak_memory()
    if on_gpu:
        memory["on the GPU"] = torch.cuda.max_memory_allocated(device)
    return {
        "model": "tiny" if args.tiny else "InstructSAM-2B",
        "dtype": args.dtype,
        "machine": machine(device),
        "picture": {
            "size": [picture.width, picture.height],
            "phrases": phrases,
            "tokens": predictor.processor.vlm_image.num_tokens(picture.height, picture.width),
            "detector pixels": predictor.processor.detector_image.size,
        },
        "parameters": count_parameters(model),
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "memory": memory,
        "building": seconds_building,
        "runs": len(timed),
        "single pass": {name: statistics.median(one[name] for one in timed) for name in timed[0]},
        "decoding": answers[-1],
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    hardware, picture, decoding = report["machine"], report["picture"], report["decoding"]
    processor = f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads"
    bfloat16 = " ".join(hardware["bfloat16 in hardware"]) or "no bfloat16 in hardware"
    width, height = picture["size"]
    bytes_each = report["weights"] / report["parameters"]["all"]

    def rows(values: dict[str, Any], form: str) -> list[str]:
        return [f"{name:34}{format(value, form):>15}" for name, value in values.items()]

    seconds = {"building": report["building"], **report["single pass"]}
    seconds |= {"writing: prompt with picture": decoding["prompt"], "writing: each token": decoding["per token"]}
    lines = [
        f"{report['model']}, random weights, {report['dtype']}; {processor}, {bfloat16}, torch {hardware['torch']}",
        f"picture {width} x {height}: {picture['tokens']} image tokens, detector {picture['detector pixels']} squared",
        f"phrases: {', '.join(picture['phrases'])}",
        f"\n{'parameters':34}{'number':>15}{'MiB':>10}",
        *(f"{name:34}{n:>15,}{n * bytes_each / 2**20:>10.1f}" for name, n in report["parameters"].items()),
        f"\n{'seconds':34}{'median of ' + str(report['runs']):>15}",
        *rows(seconds, ".3f"),
        f"{'tokens a second':34}{1 / decoding['per token']:>15.1f}",
        f"\n{'peak memory':34}{'GiB':>15}",
        *rows({name: value / GIB for name, value in report["memory"].items()}, ".2f"),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="scripts/smoke_full_size.sh", description="The full model in one run.")
    parser.add_argument("image", nargs="?", help="a picture (default: the photograph that matplotlib brings along)")
    parser.add_argument("--phrase", action="append", default=[], help="what to segment (repeat)")
    parser.add_argument("--tokenizer", help="folder of Qwen3-VL's tokenizer instead of the stand-in")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda ...")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--runs", type=int, help="timed single passes (default 1, on a GPU 5 after a warm-up)")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="tokens to write for the time per token")
    parser.add_argument("--json", help="write the figures there too")
    args = parser.parse_args(arguments)
    try:
        report = run(args)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(table(report))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
