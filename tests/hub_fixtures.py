"""Tiny directories laid out like `Qwen/Qwen3-VL-2B-Instruct` and `facebook/sam3` on the hub, with random weights.

Both are written by transformers' own classes, so tensor names, tying and file names are those of the real thing; only
the sizes are small (and chosen so that the tiny world's 96 x 96 pictures fit). Every tensor, biases and norms too, gets
random values: two tensors that change places do not go unnoticed. The VLM is stored in bfloat16 and the detector in
float32, as on the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QWEN_HUB_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
"""Tokens beyond the BPE in Qwen3-VL's tokenizer, in the order of their ids there (151,643 to 151,668)."""
NOT_SPECIAL = QWEN_HUB_TOKENS[14:]
"""Those of them that are ordinary text to the tokenizer, not special tokens."""
SENTENCES = (
    "segment the red circles and the large stars",
    "which object is the odd one out? the blue square on the left",
    "all triangles that are not green, counted from the right",
    "user assistant system",
)
PATCH, MERGE, IMAGE, NUM_DETECTOR_QUERIES = 8, 2, 96, 12
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    """A byte-level BPE with Qwen's pre-tokenisation and special tokens, without the four that InstructSAM adds."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token=None,
        pad_token=None,
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(t, special=t not in NOT_SPECIAL, normalized=False) for t in QWEN_HUB_TOKENS])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    return tokenizer


def write_qwen_tokenizer(folder: Path) -> int:
    """Write tokenizer files as they lie on the hub (older style than transformers now writes). Returns its length."""
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["backend"]
    settings.update(
        added_tokens_decoder={
            str(i): {"content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
                     "single_word": False, "special": token.special}
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
        },
        additional_special_tokens=list(QWEN_HUB_TOKENS[1:14]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        unk_token=None,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2))
    return len(tokenizer)


def randomise(model) -> None:
    """Move every parameter by noise, so that none equals another or its initial value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def qwen3_vl_config(length: int) -> dict[str, Any]:
    """Arguments of a small `Qwen3VLConfig` for a tokenizer of that length."""
    return {
        "text_config": {
            # Spare rows beyond the tokenizer, as 151,936 rows hold 151,669 tokens.
            "vocab_size": (length + 4 + 63) // 64 * 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": True,
    }  # fmt: skip


def make_qwen3_vl(folder: Path, max_shard_size: str = "5GB") -> Path:
    """Write a tiny Qwen3-VL with all the files that its hub page has."""
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    length = write_qwen_tokenizer(folder)
    first = length - len(QWEN_HUB_TOKENS)
    ids = {token: first + i for i, token in enumerate(QWEN_HUB_TOKENS)}
    config = Qwen3VLConfig(
        **qwen3_vl_config(length),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.text_config.bos_token_id, config.text_config.eos_token_id = ids["<|endoftext|>"], ids["<|im_end|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
    randomise(model)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.0,
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    preprocessor = {
        "size": {"longest_edge": 256 * 256, "shortest_edge": 64 * 64},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=4))
    video = {**preprocessor, "video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=4))
    return folder


def sam3_video_config() -> Any:
    """A small `Sam3VideoConfig` with the hub's structure: four neck levels, of which the last is not used."""
    from transformers.models.sam3_video.configuration_sam3_video import Sam3VideoConfig

    width, heads, grid = 32, 4, IMAGE // PATCH
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "pretrain_image_size": IMAGE // 2,
        "patch_size": PATCH,
        "window_size": grid // 2,
        "global_attn_indexes": [1],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": width,
        "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
    }
    layers = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 48}
    detector = {
        "model_type": "sam3",
        "vision_config": vision,
        "text_config": {
            "model_type": "clip_text_model", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16, "max_position_embeddings": 32,
            "bos_token_id": 0, "eos_token_id": 1,
        },
        "geometry_encoder_config": {**layers, "num_layers": 1},
        "detr_encoder_config": {**layers, "num_layers": 2},
        "detr_decoder_config": {**layers, "num_layers": 2, "num_queries": NUM_DETECTOR_QUERIES},
        "mask_decoder_config": {"hidden_size": width, "num_attention_heads": heads},
    }  # fmt: skip
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": vision,
        "image_size": IMAGE,
        "prompt_encoder_config": {"hidden_size": width, "image_size": IMAGE, "patch_size": PATCH},
        "mask_decoder_config": {
            "hidden_size": width, "mlp_dim": 48, "num_attention_heads": heads, "iou_head_hidden_dim": width,
            "num_hidden_layers": 1,
        },
        "memory_attention_hidden_size": width,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 48,
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": width,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": width,
        "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": 48,
    }  # fmt: skip
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * grid)


def make_sam3(folder: Path, max_shard_size: str = "5GB") -> Path:
    """Write a tiny SAM 3 as the hub holds it: detector with text encoder, tracker, tracker neck."""
    import torch
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Sam3VideoModel(sam3_video_config())
    randomise(model)
    # The names as they are: transformers' way back to "original" names puts the tracker's prefix twice.
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    return folder


@pytest.fixture(scope="session")
def qwen3_vl_dir(tmp_path_factory) -> Path:
    """A tiny Qwen3-VL in one file."""
    return make_qwen3_vl(tmp_path_factory.mktemp("hub") / "Qwen3-VL-tiny")


@pytest.fixture(scope="session")
def sharded_qwen3_vl_dir(tmp_path_factory) -> Path:
    """The same model in several files with an index."""
    return make_qwen3_vl(tmp_path_factory.mktemp("hub") / "Qwen3-VL-tiny-sharded", max_shard_size="80KB")


@pytest.fixture(scope="session")
def sam3_dir(tmp_path_factory) -> Path:
    """A tiny SAM 3 in one file."""
    return make_sam3(tmp_path_factory.mktemp("hub") / "sam3-tiny")


@pytest.fixture(scope="session")
def sharded_sam3_dir(tmp_path_factory) -> Path:
    """The same model in several files with an index."""
    return make_sam3(tmp_path_factory.mktemp("hub") / "sam3-tiny-sharded", max_shard_size="200KB")
