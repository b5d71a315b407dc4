"""Instances as `supervision.Detections`, for the tools built on that package (optional)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instructsam.structures import Instance


def as_detections(
    instances: Sequence[Instance], boxes: NDArray[np.float32], masks: NDArray[np.bool_], scores: NDArray[np.float32]
) -> Any:
    """Boxes, masks, scores; ``class_id`` is the index of the phrase in the answer, ``data["class_name"]`` the phrase.

    Args:
        instances: K of them; boxes: (K, 4) xyxy; masks: (K, H, W); scores: (K,).

    Raises:
        ValueError: the package is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise ValueError("to_supervision needs another package: pip install supervision") from error
    return supervision.Detections(
        xyxy=boxes,
        mask=masks if len(masks) else None,
        confidence=scores,
        class_id=np.array([instance.phrase_index for instance in instances], dtype=int),
        data={"class_name": np.array([instance.phrase for instance in instances], dtype=str)},
    )
