"""The model with its processor, one batch at a time: what the harness evaluates and `InstructSAM` is built upon.

``decoding="released"`` answers as the released inference code does, see `models.decoding_rules`.

Shape suffixes: B rows of a batch, P phrases, N queries, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructsam.models.decoding import decode
from instructsam.models.decoding_rules import DEFAULT_RULE, DecodingRule, decoding_rule
from instructsam.models.factory import load_processor
from instructsam.models.hub import resolve
from instructsam.models.modeling import BridgeOutput, InstructSAMModel
from instructsam.models.placement import as_device, as_dtype
from instructsam.models.stages import Detection, EncodedImages, Prepared, Understanding
from instructsam.processing.chat import IGNORED, Turns, chat_turn
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import DEFAULT_THRESHOLD, Prediction


class Predictor:
    """InstructSAM with its processor, ready to segment. Works on CPU and GPU, in the model's own precision.

    It is a `StagedSegmenter` of the evaluation harness: `segment` of one batch is `finish` of `compute` of `prepare`.

    Args:
        model, processor: of one checkpoint.
        decoding: ``trained`` or ``released``, for written answers and for given phrases alike.
        max_new_tokens, max_phrases: limits on the written answer; of the first a call may give its own.

    Raises:
        ValueError: unknown decoding, a limit below 1.
    """

    name = "InstructSAM"

    def __init__(
        self,
        model: InstructSAMModel,
        processor: InstructSAMProcessor,
        decoding: str | DecodingRule = DEFAULT_RULE,
        max_new_tokens: int = 128,
        max_phrases: int = 10,
    ):
        if max_new_tokens < 1 or max_phrases < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}, max_phrases={max_phrases}: must be at least 1")
        self.rule = decoding_rule(decoding)
        self.model = model.eval()
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.max_phrases = max_phrases

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        decoding: str | DecodingRule = DEFAULT_RULE,
        max_new_tokens: int = 128,
    ) -> Predictor:
        """Load a checkpoint.

        Args:
            path: a folder or hub name, in our own layout or the released one.
            device: where to run.
            dtype: precision to run in: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``. Scores, boxes
                and masks are worked out in float32 whatever it is.
            decoding, max_new_tokens: see the class.

        Raises:
            ValueError: no checkpoint, one of another architecture, a device that is not there, an unknown choice.
        """
        rule, device, precision = decoding_rule(decoding), as_device(device), as_dtype(dtype)
        folder = resolve(path, "InstructSAM")
        model = InstructSAMModel.from_pretrained(folder, dtype=precision or "auto").to(device)
        return cls(model, load_processor(folder, model.config), rule, max_new_tokens)

    def segment(
        self, images: Sequence[Any], instructions: Sequence[str], *, threshold: float = DEFAULT_THRESHOLD
    ) -> list[Prediction]:
        """Segment every instance that each instruction asks for, in one batch.

        Args:
            images: paths or PIL images.
            instructions: as many.
            threshold: instances with score > threshold are kept.

        Returns:
            One `Prediction` per instruction, in order. One whose answer reached the limit of tokens has
            ``meta["finished"]`` False, and may lack phrases.

        Raises:
            ValueError: an image that cannot be read, an empty instruction.
        """
        return self.finish(self.compute(self.prepare(images, instructions)), threshold)

    @torch.no_grad()
    def understand(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        phrases: Sequence[Sequence[str] | None],
    ) -> Understanding:
        """Run everything up to the bridge on one batch; `phrases` all None = write the answers."""
        return self._understand(self._encode(images, instructions, phrases))

    def _encode(
        self, images: Sequence[Any], instructions: Sequence[str], phrases: Sequence[Sequence[str] | None]
    ) -> Prepared:
        items = []
        for image, instruction, answer in zip(images, instructions, phrases, strict=True):
            item = self.processor.encode_image(image)
            items.append({**item, **self._chat_item(item["image_grid_thw"], [(instruction, answer)])})
        return self._prepared(items, phrases, [item["size"] for item in items])

    def _chat_item(self, grid_thw: Tensor, turns: Turns) -> dict[str, Any]:
        chat = self.processor.encode_chat(grid_thw, turns)
        last_answer = (chat.turn_ids == len(turns)) & (chat.labels != IGNORED)
        start = int(last_answer.int().argmax()) if bool(last_answer.any()) else len(chat.input_ids)
        return {"input_ids": chat.input_ids, "answer_start": start}

    def _prepared(
        self,
        items: list[dict[str, Any]],
        phrases: Sequence[Sequence[str] | None],
        sizes: list[tuple[int, int]],
    ) -> Prepared:
        batch = self._pinned(self.processor.collate(items))
        return Prepared(batch, phrases, sizes, [item["answer_start"] for item in items])

    def _pinned(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Where there is a GPU, so that the copy to it need not wait."""
        if self.model.device.type != "cuda":
            return dict(batch)
        return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.model.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def _understand(self, prepared: Prepared) -> Understanding:
        batch = self._on_device(prepared.batch)
        encoded = self._encode_images(batch, prepared.sizes)
        return self._answer(batch, prepared, encoded, range(len(encoded)))

    def _encode_images(self, batch: dict[str, Any], sizes: list[tuple[int, int]]) -> EncodedImages:
        vision = self.model.encode_vision(batch["pixel_values"], batch["image_grid_thw"])
        features = self.model.detector.encode_image(batch["detector_pixel_values"])
        return EncodedImages(vision, batch["image_grid_thw"], features, sizes)

    # ---- the same in two steps, for pictures that are asked about more than once -----------------------------------

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any]) -> EncodedImages:
        """Run both vision encoders on pictures (paths or PIL images), all that does not depend on an instruction."""
        items = [self.processor.encode_image(image) for image in images]
        batch = self._on_device(self._pinned(self.processor.collate_pictures(items)))
        return self._encode_images(batch, [item["size"] for item in items])

    def check(self, turns: Turns, size: tuple[int, int] | None = None) -> None:
        """Raise what a conversation cannot be answered for, before anything is encoded.

        Args:
            turns: as in `answer`.
            size: (height, width) of its picture, if it is known yet.

        Raises:
            DataError: an empty text, one with a reserved token, a sequence too long.
            ValueError: too many phrases, a picture too thin.
        """
        wanted = len(chat_turn(turns[-1]).phrases or ())
        if wanted > self.max_phrases:
            raise ValueError(f"{wanted} phrases, more than max_phrases={self.max_phrases}")
        grid_thw = None if size is None else self.processor.vlm_image.grid_thw(*size)
        self.processor.encode_chat(grid_thw, turns)

    @torch.no_grad()
    def answer(
        self,
        encoded: EncodedImages,
        image_of_row: Sequence[int],
        conversations: Sequence[Turns],
        max_new_tokens: int | None = None,
    ) -> Understanding:
        """Run everything else up to the bridge on one batch of conversations.

        Args:
            encoded: pictures; image_of_row: which of them each conversation is about.
            conversations: turns with their phrases; those of the last one are None (the answer is written) in all
                conversations or in none. Only the last turn's phrases come back.
            max_new_tokens: limit on the written answers; None = the predictor's own.
        """
        grids = encoded.grid_thw.cpu()
        items = [self._chat_item(grids[k], turns) for k, turns in zip(image_of_row, conversations, strict=True)]
        phrases = [chat_turn(turns[-1]).phrases for turns in conversations]
        prepared = self._prepared(items, phrases, [encoded.sizes[image] for image in image_of_row])
        return self._answer(self._on_device(prepared.batch), prepared, encoded, image_of_row, max_new_tokens)

    def _answer(
        self,
        batch: dict[str, Any],
        prepared: Prepared,
        encoded: EncodedImages,
        image_of_row: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Understanding:
        phrases, image_B = prepared.phrases, torch.tensor(image_of_row, dtype=torch.long, device=self.model.device)
        vision = (encoded.vision.select(image_of_row), encoded.grid_thw[image_B])
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        if all(answer is None for answer in phrases):
            decoded = decode(
                self.model,
                input_ids,
                attention_mask,
                *vision,
                max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
                max_phrases=self.max_phrases,
                rule=self.rule,
            )
            input_ids, language = decoded.input_ids, decoded.language
            answers_ids = [
                ids[start:length].tolist()
                for ids, start, length in zip(
                    input_ids, decoded.answer_start.tolist(), decoded.attention_mask.sum(-1).tolist(), strict=True
                )
            ]
            found = [self.processor.chat.phrases_of(ids) for ids in answers_ids]
            finished = decoded.finished.tolist()
        else:
            language = self.rule.run_language_model(self.model, input_ids, attention_mask, *vision)
            found = [list(answer or ()) for answer in phrases]
            answers_ids = [self.processor.chat.answer(answer) for answer in found]
            finished = [True] * len(found)
        bridge = self.model.bridge(input_ids, language)
        start_B = torch.tensor(prepared.answer_start, device=input_ids.device)
        said_now = language.phrases.queries[:, 0] >= start_B[language.phrases.row]
        bridge = bridge.select(said_now.nonzero()[:, 0])
        bridge.phrase_image_P = image_B[bridge.phrase_image_P]
        return Understanding(
            answers=[self.processor.chat.answer_text(ids) for ids in answers_ids],
            phrases=found,
            sizes=prepared.sizes,
            finished=finished,
            features=encoded.detector,
            bridge=bridge,
        )

    @torch.no_grad()
    def detect(
        self,
        understanding: Understanding,
        threshold: float | Sequence[float] = DEFAULT_THRESHOLD,
        queries_PNC: Tensor | None = None,
    ) -> list[Prediction]:
        """Detector and post-processing; `queries_PNC` stands in for the projected queries (query reliance)."""
        return self.finish(self._detect(understanding, queries_PNC), threshold)

    def _detect(self, understanding: Understanding, queries_PNC: Tensor | None = None) -> Detection:
        bridge = understanding.bridge
        if queries_PNC is not None:
            bridge = BridgeOutput(queries_PNC, bridge.phrase_features_PTC, bridge.phrase_mask_PT, bridge.phrase_image_P)
        output = self.model.detect(understanding.features, bridge) if len(bridge.phrase_image_P) else None
        return Detection(
            understanding.answers, understanding.phrases, understanding.sizes, understanding.finished, output
        )

    # ---- the three stages, for the harness (`evaluation.segmenter.StagedSegmenter`) --------------------------------

    def describe(self) -> dict[str, Any]:
        """What the answers depend on besides the weights."""
        return {
            "name": self.name,
            "decoding": self.rule.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention_variant": self.model.config.attention_variant,
            "max_new_tokens": self.max_new_tokens,
            "max_phrases": self.max_phrases,
        }

    def estimate_length(self, height: int, width: int, instruction: str) -> int:
        """Image tokens plus words. Raises ValueError for a picture too thin."""
        return self.processor.vlm_image.num_tokens(height, width) + len(instruction.split())

    def prepare(self, images: Sequence[Any], instructions: Sequence[str]) -> Prepared:
        """Read and transform one batch; needs no model, may run in any thread."""
        return self._encode(images, instructions, [None] * len(images))

    @torch.no_grad()
    def compute(self, prepared: Prepared) -> Detection:
        """Run the model on one batch."""
        return self._detect(self._understand(prepared))

    @torch.no_grad()
    def finish(self, detection: Detection, threshold: float | Sequence[float] = DEFAULT_THRESHOLD) -> list[Prediction]:
        """Keep score > threshold (one for all, or one for each answer); masks at image size, run-length encoded."""
        output = detection.output
        rows = len(detection.answers)
        thresholds = [threshold] * rows if isinstance(threshold, (int, float)) else threshold
        predictions, start = [], 0
        for answer, phrases, (height, width), finished, least in zip(
            detection.answers, detection.phrases, detection.sizes, detection.finished, thresholds, strict=True
        ):
            stop = start + len(phrases)
            instances = []
            if output is not None and phrases:
                scores = output.pred_logits[start:stop].float().sigmoid()
                if output.presence_logits is not None:
                    scores = scores * output.presence_logits[start:stop].float().sigmoid()
                instances = self.processor.instances(
                    output.pred_masks[start:stop],
                    scores,
                    output.pred_boxes[start:stop],
                    phrases,
                    (height, width),
                    least,
                )
            meta = {"finished": finished}
            predictions.append(Prediction(answer, tuple(phrases), tuple(instances), height, width, meta))
            start = stop
        return predictions
