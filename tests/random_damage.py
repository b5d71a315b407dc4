"""Random damage to data files: JSON values of any kind in any place, and what else may suffer from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD = (10**400, -1, "half \ud83d", "a\0b", "x" * 300, "../..", "<|im_end|>", "[]", '{"size": [3, 4]}', "[1, 2")
KEYS = ("id", "size", "counts", "points", "value", "ann", "segmentation")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=3) | st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=6,
)


def ways_into(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything inside of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for key, item in inner for one in [(*way, key), *ways_into(item, (*way, key))]]


def damaged_record(draw: Any, record: Any) -> Any:
    """A copy of a record, or what stands in its place, with something in it replaced or gone."""
    ways = ways_into(record)
    if not ways or draw(st.integers(0, 15)) == 0:
        return draw(json_values)
    # The few large parts of a record come up as often as the many numbers within its polygons.
    depth = draw(st.sampled_from(sorted({len(way) for way in ways})))
    *way, last = draw(st.sampled_from([one for one in ways if len(one) == depth]))
    record = copy.deepcopy(record)
    holder = record
    for key in way:
        holder = holder[key]
    if draw(st.integers(0, 3)) == 0:
        del holder[last]
    else:
        holder[last] = draw(json_values)
    return record


def damaged_bytes(draw: Any, content: bytes) -> bytes:
    """Some bytes replaced, and perhaps the end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def scalars(value: Any) -> Iterator[Any]:
    """Numbers and texts within a value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from scalars(item)
    elif isinstance(value, int | str):
        yield value
