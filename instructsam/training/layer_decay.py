"""How far below the top of its tower every parameter lies, for learning rates that shrink towards the input.

A tower is a stack of numbered layers, ``PREFIX.layers.3.`` or ``PREFIX.blocks.3.``; towers are told apart by PREFIX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# A whole name ("scale_layers.0" is no layer) of something that has parts itself: the rows of a small MLP, such as
# "mask_embedder.layers.0.weight", are no tower.
LAYER = re.compile(r"^(?P<tower>(?:.*?\.)?)(?:layers|blocks)\.(?P<number>\d+)\.\w+\.")


def depths_below_top(names: Sequence[str]) -> dict[str, int]:
    """Depth of each parameter: of layer i of n it is n - 1 - i, so 0 in the last layer.

    What a tower holds ahead of its first layer (embeddings, norms before) is one deeper than that layer, n; what it
    holds after the layers (norm, merger, heads), and what lies in no tower, is 0.

    Args:
        names: of all the model's parameters, frozen ones too, in the model's own order.
    """
    found = {name: match for name in names if (match := LAYER.match(name))}
    heights: dict[str, int] = {}
    for match in found.values():
        heights[match["tower"]] = max(heights.get(match["tower"], 0), int(match["number"]) + 1)
    # The innermost tower that a parameter without a number may belong to.
    towers = sorted(heights, key=len, reverse=True)
    begun: set[str] = set()
    depths = {}
    for name in names:
        if match := found.get(name):
            begun.add(match["tower"])
            depths[name] = heights[match["tower"]] - 1 - int(match["number"])
        else:
            tower = next((prefix for prefix in towers if name.startswith(prefix)), None)
            depths[name] = 0 if tower is None or tower in begun else heights[tower]
    return depths
