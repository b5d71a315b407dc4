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

from instructsam.errors import DataError, at
from instructsam.masks import encode_batch
from instructsam.processing.chat import IGNORED, ChatLayout, ChatTurn, EncodedChat, Turns, chat_turn
from instructsam.processing.image_files import ImageSource, load_image
from instructsam.processing.images import DetectorImageTransform, VLMImageTransform
from instructsam.processing.pretrained import PretrainedProcessor
from instructsam.processing.targets import MASK_RESIZES, collate_targets, phrase_targets
from instructsam.structures import DEFAULT_THRESHOLD, Instance, Sample

_PIXELS_AT_ONCE = 2**26
"""Of masks that are brought to picture size together (256 MiB of float32): many on a large picture would need 16 GB."""


class InstructSAMProcessor(PretrainedProcessor):
    """Prepares the model's inputs and reads its outputs.

    Args:
        tokenizer: transformers tokenizer with Qwen's special tokens and ours.
        num_queries: N.
        mask_size: (height, width) of the mask logits, for training targets.
        vlm_image: `VLMImageTransform`, or settings of one.
        detector_image_size: side of the detector's square input in pixels.
        max_length: longest sequence in tokens.
        mask_resize: how targets come to mask resolution, see `targets.phrase_targets`.
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
        return self._views(load_image(image))

    def _views(self, picture: Image.Image) -> dict[str, Any]:
        pixel_values, grid_thw = self.vlm_image(picture)
        return {
            "pixel_values": pixel_values,
            "image_grid_thw": grid_thw,
            "detector_pixel_values": self.detector_image(picture),
            "size": (picture.height, picture.width),
        }

    def encode_chat(
        self, grid_thw: Tensor | None, turns: Turns, independent_turns: bool = False, where: str = ""
    ) -> EncodedChat:
        """Tokens of a conversation about an image of that grid (None: about no image); `where` names it in errors.

        Raises:
            DataError: see `ChatLayout.encode`; a sequence beyond ``max_length``.
        """
        num_image_tokens = None if grid_thw is None else int(grid_thw.prod()) // self.vlm_image.merge_size**2
        try:
            encoded = self.chat.encode(num_image_tokens, turns, independent_turns)
        except DataError as error:
            if not where:
                raise
            raise at(where, error) from error
        if len(encoded.input_ids) > self.max_length:
            phrases = sum(len(chat_turn(turn).phrases or ()) for turn in turns)
            raise DataError(
                f"{where or 'input'}: {len(encoded.input_ids)} tokens ({phrases} phrases with {self.num_queries} "
                f"queries, {num_image_tokens or 0} image tokens) do not fit max_length={self.max_length}",
                "too long",
            )
        return encoded

    def encode_sample(
        self, sample: Sample, independent_turns: bool = False, image: Image.Image | None = None
    ) -> dict[str, Any]:
        """A training item: image (if the sample has one), conversation with answers, targets of all phrases in order.

        Args:
            sample: its turns' instructions stand as they are to be asked.
            independent_turns: see `ChatLayout.encode`.
            image: the sample's picture, where it is loaded already (and changed, perhaps); of the sample's size.

        Raises:
            DataError: whatever is wrong with the record, under its kind; every message names the sample.
        """
        where = f"sample {sample.id}"
        phrases = [phrase for turn in sample.turns for phrase in turn.phrases]
        for phrase in phrases:
            if len(phrase.rles) > self.num_queries:
                raise DataError(
                    f"{where}: phrase {phrase.text!r} has {len(phrase.rles)} instances, more than the "
                    f"{self.num_queries} queries of a phrase",
                    "too many instances",
                )
        item: dict[str, Any] = {"sample_id": sample.id}
        if sample.image is not None:
            item |= self._encode_picture(sample, sample.image if image is None else image)
        else:
            assert image is None, f"{where}: a picture is given to a conversation about none"
            if phrases:
                raise DataError(f"{where}: phrase {phrases[0].text!r} needs a picture to be found in", "image missing")
        turns = [ChatTurn.of(turn) for turn in sample.turns]
        chat = self.encode_chat(item.get("image_grid_thw"), turns, independent_turns, where)
        item |= {"input_ids": chat.input_ids, "labels": chat.labels}
        if independent_turns:
            item["turn_ids"] = chat.turn_ids
        item["targets"] = [phrase_targets(phrase, self.mask_size, self.mask_resize) for phrase in phrases]
        item["box_only"] = [phrase.box_only for phrase in phrases]
        return item

    def _encode_picture(self, sample: Sample, source: ImageSource) -> dict[str, Any]:
        """`encode_image` of the sample's picture, which must be as large as the sample says."""
        where = f"sample {sample.id}"
        try:
            picture = load_image(source)
            if (picture.height, picture.width) != (sample.height, sample.width):
                raise DataError(
                    f"{sample.image} has height and width {(picture.height, picture.width)}, the annotations say "
                    f"{(sample.height, sample.width)} (EXIF orientation counts)",
                    "image size",
                )
            return self._views(picture)
        except ValueError as error:  # the transforms' too: a picture too thin to be shown
            raise at(where, error) from error

    def neutral_item(self, sample_id: str) -> dict[str, Any]:
        """What takes the place of a training item that cannot be read: tokens without a picture and without labels.

        It adds nothing to any loss or count, and leaves batch sizes and the order of all other items as they were.
        `collate` lists its id under ``skipped_ids``.
        """
        chat = self.chat.encode(None, [])
        item = {"input_ids": chat.input_ids, "labels": chat.labels, "targets": [], "box_only": []}
        return {**item, "sample_id": sample_id, "skipped": True}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad a list of items to a batch, padding on the right.

        Items are all for training (from `encode_sample` and `neutral_item`) or none has labels and targets. Pictures
        are those of the rows that have one, in the order of rows; tensors of length 0 where no row has any.
        """
        length = max(len(item["input_ids"]) for item in items)

        def pad(values: Sequence[Tensor], value: int) -> Tensor:
            return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in values])

        input_ids = [item["input_ids"] for item in items]
        batch: dict[str, Any] = {
            "input_ids": pad(input_ids, self.chat.token_ids["pad"]),
            "attention_mask": torch.arange(length) < torch.tensor([len(row) for row in input_ids])[:, None],
            **self.collate_pictures([item for item in items if "pixel_values" in item]),
            "sample_ids": [item.get("sample_id", str(k)) for k, item in enumerate(items)],
        }
        if any("turn_ids" in item for item in items):
            # Turn 0 is seen by all that follows and shifts no position: an ordinary conversation is nothing else.
            batch["turn_ids"] = pad([item.get("turn_ids", torch.zeros_like(item["input_ids"])) for item in items], 0)
        if "targets" in items[0]:
            batch["labels"] = pad([item["labels"] for item in items], IGNORED)
            batch["skipped_ids"] = [item["sample_id"] for item in items if item.get("skipped")]
            targets = [target for item in items for target in item["targets"]]
            box_only = [flag for item in items for flag in item["box_only"]]
            batch.update(collate_targets(targets, box_only, self.mask_size))
        return batch

    def collate_pictures(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The pictures of items that all have one (from `encode_image`), one after the other; length 0 for no item."""
        if not items:
            vlm, side = self.vlm_image, self.detector_image.size
            return {
                "pixel_values": torch.zeros(0, 3 * vlm.temporal_patch_size * vlm.patch_size**2),
                "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
                "detector_pixel_values": torch.zeros(0, 3, side, side),
            }
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "image_grid_thw": torch.stack([item["image_grid_thw"] for item in items]),
            "detector_pixel_values": torch.stack([item["detector_pixel_values"] for item in items]),
        }

    # ---- outputs -------------------------------------------------------------------------------------------------

    def instances(
        self,
        mask_logits_PNHW: Tensor,
        scores_PN: Tensor,
        boxes_PN4: Tensor,
        phrases: Sequence[str],
        size: tuple[int, int],
        threshold: float = DEFAULT_THRESHOLD,
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
        height, width = size
        logits = mask_logits_PNHW[phrase_index, query_index].float()
        rles = []
        for some in logits.split(max(1, _PIXELS_AT_ONCE // (height * width))):
            masks = F.interpolate(some[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0
            rles += encode_batch(masks.cpu().numpy())
        boxes = boxes_PN4[phrase_index, query_index].float().clamp(0, 1)
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        return [
            Instance(rle, score, tuple(box), phrases[p], p)
            for rle, score, box, p in zip(rles, scores.tolist(), boxes.tolist(), phrase_index.tolist(), strict=True)
        ]
