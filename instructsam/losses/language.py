"""Next-token loss on the assistant's text (DESIGN section 6, "Language loss").

Only the positions that are trained on are selected, so that the caller runs the vocabulary head (151,936 rows) on a few
hundred hidden states instead of on all image and prompt tokens. Shape suffixes: B batch, L sequence, T trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class LanguageTargets(NamedTuple):
    """Trained tokens: logits at (row, position) should predict `token`; three (T,) int64 tensors.

    `position` is that of the *predicting* token: the target stands one further right. T, the number of trained tokens,
    is the batch's share of ``counts["tokens"]``.
    """

    row_T: Tensor
    position_T: Tensor
    token_T: Tensor


def language_targets(input_ids_BL: Tensor, labels_BL: Tensor, ignore_ids: Sequence[int]) -> LanguageTargets:
    """Select what the language loss is taken on.

    Args:
        input_ids_BL: token ids.
        labels_BL: the token ids where the answer stands, −100 elsewhere (not shifted).
        ignore_ids: ids that are never predicted: ``[SEG]`` and ``<|mask_end|>``, which decoding appends by itself.

    Raises:
        ValueError: the shapes differ.
    """
    if input_ids_BL.shape != labels_BL.shape or input_ids_BL.dim() != 2:
        raise ValueError(
            f"input_ids and labels must both be (B, L), not {tuple(input_ids_BL.shape)} and {tuple(labels_BL.shape)}"
        )
    ignored = torch.tensor(list(ignore_ids), dtype=input_ids_BL.dtype, device=input_ids_BL.device)
    trained = (labels_BL[:, 1:] != IGNORE_INDEX) & ~torch.isin(input_ids_BL[:, 1:], ignored)
    row, position = trained.nonzero(as_tuple=True)
    return LanguageTargets(row, position, labels_BL[row, position + 1])


def language_loss(logits_TV: Tensor, token_T: Tensor, token_count: Tensor | float) -> Tensor:
    """Σ cross-entropy / max(token_count, 1), float32 scalar; 0 and connected to the logits where T = 0.

    Args:
        logits_TV: logits at the selected positions, any float dtype.
        token_T: target ids.
        token_count: number of trained tokens over all ranks and accumulation steps.
    """
    with torch.autocast(logits_TV.device.type, enabled=False):
        total = F.cross_entropy(logits_TV.float(), token_T, reduction="sum")
        return total / at_least_one(token_count, total)


def answer_targets(batch: Mapping[str, Any], token_ids: Mapping[str, int]) -> LanguageTargets:
    """`language_targets` of a batch: ``[SEG]`` and ``<|mask_end|>`` are never predicted, decoding appends them."""
    return language_targets(batch["input_ids"], batch["labels"], [token_ids["seg"], token_ids["mask_end"]])


def answer_loss(
    hidden_BLC: Tensor, targets: LanguageTargets, lm_logits: Callable[[Tensor], Tensor], token_count: Tensor | float
) -> Tensor:
    """`language_loss` from the last hidden states; logits are computed at the trained positions only."""
    return language_loss(lm_logits(hidden_BLC[targets.row_T, targets.position_T]), targets.token_T, token_count)


def at_least_one(count: Tensor | float, like: Tensor) -> Tensor:
    """A normaliser as float32 scalar on the device of `like`, at least 1 so that an empty unit divides safely."""
    return torch.as_tensor(count, dtype=torch.float32, device=like.device).clamp(min=1)
