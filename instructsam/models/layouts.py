"""Names of tensors in other checkpoints and in ours: one table of prefixes for each (DESIGN sections 4 and 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Learned rows, one a query: a model with fewer queries takes the first.
FIRST_ROWS = ("detector.detr_decoder.query_embed.weight", "detector.detr_decoder.reference_points.weight")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names the tensors that it shares with ours.

    Attributes:
        name: for reports.
        prefixes: (theirs, ours); what follows the prefix is the same on both sides.
        ignored: prefixes of their tensors that may be left out where our model has no place for them.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()

    def to_ours(self, name: str) -> str | None:
        """Our name of one of their tensors, None where the table has none."""
        return next(
            (ours + name.removeprefix(theirs) for theirs, ours in self.prefixes if name.startswith(theirs)), None
        )

    def to_theirs(self, name: str) -> str | None:
        """Their name of one of our tensors, None where the table has none."""
        return next((theirs + name.removeprefix(ours) for theirs, ours in self.prefixes if name.startswith(ours)), None)

    def ignored_by(self, name: str) -> str | None:
        """The prefix by which one of their tensors may be left out, None where it may not."""
        return next((prefix for prefix in self.ignored if name.startswith(prefix)), None)


def untie_or_tie(config: dict[str, Any]) -> None:
    """Let a Qwen3-VL configuration say at its top whether the head is tied, which some say for the text part only."""
    text = config.get("text_config")
    if "tie_word_embeddings" not in config and isinstance(text, dict) and "tie_word_embeddings" in text:
        config["tie_word_embeddings"] = text["tie_word_embeddings"]


_VLM = (("model.language_model.", "vlm.language_model."), ("model.visual.", "vlm.visual."), ("lm_head.", "lm_head."))

RELEASED = Layout(
    "released InstructSAM",
    (
        *_VLM,
        ("model.mask_queries", "query_bank.weight"),
        ("model.mask_hidden_fcs.0.", "query_projector."),
        ("model.text_hidden_fcs.0.", "phrase_projector."),
        ("model.grounding_model.model.", "detector."),
    ),
)
# A tied head is stored by some writers and is then the same as the embeddings.
QWEN3_VL = Layout("Qwen3-VL", _VLM, ignored=("lm_head.",))
SAM3 = Layout(
    "SAM 3",
    (("detector_model.", "detector."),),
    ignored=(
        "tracker_model.",
        "tracker_neck.",
        "detector_model.text_encoder.",  # the phrase projector takes its place
        "detector_model.detr_decoder.presence_",  # only in models that keep the presence token
    ),
)
