"""The examples on the report's page: galleries with pictures, a line for every instruction, one filter for both."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from instructsam.evaluation.gallery import SECTIONS, sort_out
from instructsam.evaluation.markup import Node, node, picture, size_of
from instructsam.evaluation.measure import COUNT_GROUPS, Measured
from instructsam.visualization import GalleryRow, jpeg_bytes, overlay_pair

CELL = 320
MAX_PICTURE_BYTES = 25_000
# The page stays below 15 MB; base64 makes pictures a third larger.
MAX_PICTURES_BYTES = 7_000_000
MAX_LINES_BYTES = 4_000_000
MAX_LINES = 2_000
MAX_TEXT = 400
GREY = (150, 150, 150)

Record = Mapping[str, Any]


def section(
    records: Sequence[Record], measured: Sequence[Measured], per_gallery: int, score_threshold: float | None
) -> Node:
    """The filter, the galleries, and a line for each of up to ``MAX_LINES`` instructions, those of lowest IoU first.

    Args:
        records, measured: in the same order.
        per_gallery: most instructions a gallery shows.
        score_threshold: predictions with score > this are drawn; all that are listed if that is None.

    Raises:
        ValueError: for a picture of another size than its record says.
    """
    sections = sort_out(measured)
    chosen = {name: indices[:per_gallery] for name, indices in sections.items()}
    uses = Counter(index for indices in chosen.values() for index in indices)
    pairs, space = {}, MAX_PICTURES_BYTES
    for index, count in uses.items():
        pair, is_found = _pictures(records[index], score_threshold)
        space -= count * sum(map(len, pair))
        if space < 0:
            break
        pairs[index] = pair, is_found
    parts = []
    for name, indices in chosen.items():
        cards = [_card(records[index], measured[index], *pairs[index]) for index in indices if index in pairs]
        parts.append(_gallery(name, cards, len(sections[name])))
    order = sorted(range(len(records)), key=lambda index: (measured[index].iou, index))
    lines, space = [], MAX_LINES_BYTES
    for index in order[:MAX_LINES]:
        line = _line(records[index], measured[index])
        space -= size_of(line)
        if space < 0:
            break
        lines.append(line)
    return node(
        "section", node("h2", "Examples"), _filters(measured), parts, _lines(lines, len(records)), id="examples"
    )


def _filters(measured: Sequence[Measured]) -> Node:
    kinds = sorted({one.kind for one in measured if one.kind})
    counts = [group for group in COUNT_GROUPS if any(one.count_group == group for one in measured)]

    def choices(values: Sequence[str], name: str, every: str) -> Node:
        options = [node("option", every, value=""), *(node("option", value, value=value) for value in values)]
        return node("select", options, id=f"filter-{name}", aria_label=every)

    def bound(name: str, value: str) -> Node:
        return node("input", type="number", id=f"filter-{name}", min="0", max="1", step="0.05", value=value)

    targets = [node("option", text, value=value) for value, text in _TARGETS.items()]
    return node(
        "form",
        node("label", "search ", node("input", type="search", id="filter-text", placeholder="instruction or phrase")),
        node("label", "kind ", choices(kinds, "kind", "all kinds")) if kinds else None,
        node("label", "true instances ", choices(counts, "count", "any number")),
        node("label", "target ", node("select", targets, id="filter-target")),
        node("label", "IoU from ", bound("low", "0"), " to ", bound("high", "1")),
        node("button", "reset", type="reset"),
        node("output", id="shown"),
        id="filters",
    )


_TARGETS = {"": "with and without", "yes": "with target", "no": "no-target only"}


def _gallery(name: str, cards: Sequence[Node], available: int) -> Node:
    total = f"{len(cards)} of {available}" if available > len(cards) else str(available)
    title = node("h3", name.capitalize(), " ", node("span", f"({total})", class_="faint"))
    if not cards:
        return node("section", title, node("p", "None.", class_="faint"), class_="gallery")
    nothing = node("p", "Nothing here passes the filter.", class_="faint nothing", hidden=True)
    about = node("p", SECTIONS[name], class_="faint")
    return node("section", title, about, node("div", cards, class_="cards"), nothing, class_="gallery", id=_id(name))


def _id(name: str) -> str:
    return "gallery-" + name.replace(" ", "-")


def _searched(record: Record, one: Measured) -> dict[str, str]:
    """What the filter looks at, as attributes of a card or line."""
    texts = [_text(record), *(record.get("gt_phrases") or ()), *(record.get("pred_phrases") or ())]
    return {
        "data_search": _cut("\n".join(texts).lower()),
        "data_kind": one.kind,
        "data_count": one.count_group,
        "data_target": "yes" if one.num_truths else "no",
        "data_iou": f"{one.iou:.4f}",
    }


def _card(record: Record, one: Measured, pair: tuple[bytes, bytes], is_found: bool) -> Node:
    sides = []
    for name, side, count in zip(("truth", "prediction"), pair, (one.num_truths, one.num_kept), strict=True):
        label = f"{name}: {_instances(count)}"
        sides.append(node("figure", picture(side, label), node("figcaption", label)))
    facts = {"IoU": f"{one.iou:.3f}", "scores": _scores(one)}
    facts |= {"duplicates": str(one.num_duplicates)} if one.num_duplicates else {}
    facts |= {"kind": one.kind} if one.kind else {}
    facts |= {"answer": _cut(str(record["answer"]))} if record.get("answer") else {}
    facts["id"] = _cut(str(record["id"]))
    rows = [one for name, value in facts.items() for one in (node("dt", name), node("dd", value))]
    missing = None if is_found else node("p", "The picture is not at the place that the record names.", class_="faint")
    return node(
        "article",
        node("h4", _cut(_text(record))),
        node("div", sides, class_="sides"),
        missing,
        node("dl", rows),
        class_="card",
        **_searched(record, one),
    )


def _lines(lines: Sequence[Node], total: int) -> Node:
    names = ("instruction", "kind", "true", "kept", "IoU", "scores", "id")
    head = node("thead", node("tr", [node("th", name, scope="col") for name in names]))
    title = node(
        "h3", "All instructions ", node("span", f"({len(lines)} of {total}, lowest IoU first)", class_="faint")
    )
    table = node("table", head, node("tbody", lines), id="all", class_="texts")
    return node("details", node("summary", title), node("div", table, class_="wide"), open=True)


def _line(record: Record, one: Measured) -> Node:
    cells = [one.kind, str(one.num_truths), str(one.num_kept), f"{one.iou:.3f}", _scores(one), _cut(str(record["id"]))]
    text = node("td", _cut(_text(record)))
    return node("tr", text, [node("td", cell) for cell in cells], class_="line-of-all", **_searched(record, one))


def _text(record: Record) -> str:
    return str(record.get("instruction") or record.get("text") or record["id"])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _scores(one: Measured) -> str:
    shown = [f"{score:.2f}" for score in sorted(one.scores_P.tolist(), reverse=True)]
    return " ".join(shown[:6]) + (f" … ({len(shown)})" if len(shown) > 6 else "") if shown else "–"


def _instances(count: int) -> str:
    return "none" if not count else f"{count} instance{'s' if count > 1 else ''}"


def _pictures(record: Record, score_threshold: float | None) -> tuple[tuple[bytes, bytes], bool]:
    """JPEG files of truth and prediction; and whether the picture itself was found."""
    is_found = bool(record.get("image")) and os.path.isfile(record["image"])
    image = record["image"] if is_found else Image.new("RGB", (record["width"], record["height"]), GREY)
    threshold = -math.inf if score_threshold is None else score_threshold
    row = GalleryRow.from_record({"instruction": "", **record}, image, threshold)
    try:
        left, right = overlay_pair(row, CELL)
    except ValueError as error:
        raise ValueError(f"record {record['id']!r}, picture {record.get('image')}: {error}") from None
    return (jpeg_bytes(left, MAX_PICTURE_BYTES), jpeg_bytes(right, MAX_PICTURE_BYTES)), is_found
