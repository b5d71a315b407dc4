"""What a run says that was evaluated on the very samples it trained on (debug=overfit): does the loop learn at all?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NEAR_ZERO = 0.02
"""Of the first steps' loss. What is left are class targets below 1 (a mask's dice) and boxes to the last pixel."""


def verdict(losses: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> str:
    """One paragraph: how far the loss has fallen, AP50, and what to make of it.

    Args:
        losses: records of all steps ("loss"), first and last of them averaged over a few steps.
        metrics: of the last evaluation.
    """
    finite = [record["loss"] for record in losses if record["loss"] is not None]  # a skipped step has none
    few = max(1, min(10, len(finite) // 10))
    first, last = sum(finite[:few]) / few, sum(finite[-few:]) / few
    ap50 = metrics.get("AP50", 0.0)
    said = f"overfit: the loss went from {first:.3g} to {last:.3g}, AP50 of the samples it trained on is {ap50:.3f}. "
    if last <= NEAR_ZERO * first and ap50 >= 0.999:
        return said + "That is as it should be: model, losses, data and evaluation fit together."
    return said + (
        f"It should end below {NEAR_ZERO * first:.2g} and at 1.000: something does not learn, or has too few steps. "
        "losses.jsonl has every term, and samples/ shows what is predicted."
    )
