"""InstructSAMProcessor: pictures and words in, tensors out, and back again (no torchvision needed).

Shape suffixes: B batch, L sequence, P phrases, N queries, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from instructsam.masks import encode_batch
from instructsam.processing.chat import IGNORED, ChatLayout, EncodedChat
from instructsam.processing.images import DetectorImageTransform, VLMImageTransform, load_image
from instructsam.processing.pretrained import PretrainedProcessor
from instructsam.processing.targets import MASK_RESIZES, collate_targets, phrase_targets
from instructsam.structures import Instance, Sample


class InstructSAMProcessor(PretrainedProcessor):
    """Prepares the model's inputs and reads its outputs.

    Args:
        tokenizer: transformers tokenizer with Qwen's special tokens and ours.
        num_queries: N.
        mask_size: (height, width) of the mask logits, for training targets.
        vlm_image: `VLMImageTransform`, or settings of one.
        detector_image_size: side of the detector's square input in pixels.
        max_length: longest sequence in tokens.
        mask_resize: how targets come to mask resolution, see `targets.resize_nearest`.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_queries: int,
        mask_size: tuple[int, int],
        vlm_image: VLMImageTransform | Mapping[str, Any] | None = None,
        detector_image_size: int = 1008,
        max_length: int = 16384,
        mask_resize: str = "nearest",
    ):
        if mask_resize not in MASK_RESIZES:
            raise ValueError(f"mask_resize={mask_resize!r} is not one of {', '.join(MASK_RESIZES)}")
        self.tokenizer = tokenizer
        self.chat = ChatLayout(tokenizer, num_queries)
        self.num_queries = num_queries
        self.mask_size = (int(mask_size[0]), int(mask_size[1]))
        if not isinstance(vlm_image, VLMImageTransform):
            vlm_image = VLMImageTransform(**(vlm_image or {}))
        self.vlm_image = vlm_image
        self.detector_image = DetectorImageTransform(detector_image_size)
        self.max_length = max_length
        self.mask_resize = mask_resize
        self._settings = {
            "num_queries": num_queries,
            "mask_size": list(self.mask_size),
            "vlm_image": asdict(self.vlm_image),
            "detector_image_size": detector_image_size,
            "max_length": max_length,
            "mask_resize": mask_resize,
        }

    # ---- inputs --------------------------------------------------------------------------------------------------

    def encode_image(self, image: Any) -> dict[str, Any]:
        """Both towers' views of one picture (path or PIL image), and its own size."""
        picture: Image.Image = load_image(image)
        pixel_values, grid_thw = self.vlm_image(picture)
        return {
            "pixel_values": pixel_values,
            "image_grid_thw": grid_thw,
            "detector_pixel_values": self.detector_image(picture),
            "size": (picture.height, picture.width),
        }

    def encode_chat(
        self,
        grid_thw: Tensor,
        turns: Sequence[tuple[str, Sequence[str] | None]],
        independent_turns: bool = False,
        where: str = "",
    ) -> EncodedChat:
        """Tokens of a conversation about an image of that grid; `where` names the sample in errors.

        Raises:
            ValueError: see `ChatLayout.encode`; a sequence beyond ``max_length``.
        """
        num_image_tokens = int(grid_thw.prod()) // self.vlm_image.merge_size**2
        try:
            encoded = self.chat.encode(num_image_tokens, turns, independent_turns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
        if len(encoded.input_ids) > self.max_length:
            phrases = sum(len(p or ()) for _, p in turns)
            raise ValueError(
                f"{where or 'input'}: {len(encoded.input_ids)} tokens ({phrases} phrases with {self.num_queries} "
                f"queries, {num_image_tokens} image tokens) do not fit max_length={self.max_length}"
            )
        return encoded

    def encode_sample(self, sample: Sample, independent_turns: bool = False) -> dict[str, Any]:
        """A training item: image, conversation with answers, targets of all phrases in order.

        Raises:
            ValueError: a phrase with more instances than queries, and everything the other encoders raise.
        """
        item = self.encode_image(sample.image)
        if item["size"] != (sample.height, sample.width):
            raise ValueError(
                f"sample {sample.id}: {sample.image} has height and width {item['size']}, the annotations say "
                f"{(sample.height, sample.width)} (EXIF orientation counts)"
            )
        turns = [(turn.instruction, [phrase.text for phrase in turn.phrases]) for turn in sample.turns]
        chat = self.encode_chat(item["image_grid_thw"], turns, independent_turns, where=f"sample {sample.id}")
        item.update(input_ids=chat.input_ids, labels=chat.labels, sample_id=sample.id)
        if independent_turns:
            item["turn_ids"] = chat.turn_ids
        phrases = [phrase for turn in sample.turns for phrase in turn.phrases]
        for phrase in phrases:
            if len(phrase.rles) > self.num_queries:
                raise ValueError(
                    f"sample {sample.id}: phrase {phrase.text!r} has {len(phrase.rles)} instances, more than the "
                    f"{self.num_queries} queries of a phrase"
                )
        item["targets"] = [phrase_targets(phrase, self.mask_size, self.mask_resize) for phrase in phrases]
        item["box_only"] = [phrase.box_only for phrase in phrases]
        return item

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad a list of items (with or without labels and targets) to a batch, padding on the right."""
        length = max(len(item["input_ids"]) for item in items)

        def pad(key: str, value: int) -> Tensor:
            rows = [F.pad(item[key], (0, length - len(item[key])), value=value) for item in items]
            return torch.stack(rows)

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch: dict[str, Any] = {
            "input_ids": pad("input_ids", self.chat.token_ids["pad"]),
            "attention_mask": torch.arange(length) < lengths[:, None],
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "image_grid_thw": torch.stack([item["image_grid_thw"] for item in items]),
            "detector_pixel_values": torch.stack([item["detector_pixel_values"] for item in items]),
            "sample_ids": [item.get("sample_id", str(k)) for k, item in enumerate(items)],
        }
        if "labels" in items[0]:
            batch["labels"] = pad("labels", IGNORED)
        if "turn_ids" in items[0]:
            batch["turn_ids"] = pad("turn_ids", 0)
        if "targets" in items[0]:
            targets = [target for item in items for target in item["targets"]]
            box_only = [flag for item in items for flag in item["box_only"]]
            batch.update(collate_targets(targets, box_only, self.mask_size))
        return batch

    # ---- outputs -------------------------------------------------------------------------------------------------

    def instances(
        self,
        mask_logits_PNHW: Tensor,
        scores_PN: Tensor,
        boxes_PN4: Tensor,
        phrases: Sequence[str],
        size: tuple[int, int],
        threshold: float = 0.3,
    ) -> list[Instance]:
        """Post-processing of one image's phrases (DESIGN section 7).

        Keeps score > threshold, upsamples those mask *logits* bilinearly (align_corners false) to `size` (height,
        width) and thresholds them at 0. Sorted by phrase, then by falling score.
        """
        phrase_index, query_index = torch.nonzero(scores_PN > threshold, as_tuple=True)
        if not len(phrase_index):
            return []
        scores = scores_PN[phrase_index, query_index].float()
        order = scores.argsort(descending=True, stable=True)
        order = order[phrase_index[order].argsort(stable=True)]
        phrase_index, query_index, scores = phrase_index[order], query_index[order], scores[order]
        logits = mask_logits_PNHW[phrase_index, query_index].float()
        masks = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        height, width = size
        boxes = boxes_PN4[phrase_index, query_index].float().clamp(0, 1)
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        rles = encode_batch(masks.cpu().numpy())
        return [
            Instance(rle, score, tuple(box), phrases[p], p)
            for rle, score, box, p in zip(rles, scores.tolist(), boxes.tolist(), phrase_index.tolist(), strict=True)
        ]
