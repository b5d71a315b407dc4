"""index.html: figures with charts, and samples as they would be asked, on one page that needs no server and no network.

Pictures are inside the file as JPEG. Texts of the data are set as text by `evaluation.markup`, never as HTML, and a
content security policy keeps a browser from running or fetching anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from instructsam.data.augmentation import PictureChange
from instructsam.evaluation.charts import share_chart
from instructsam.evaluation.markup import Node, document, node, picture, table
from instructsam.inspection.pictures import UNCHANGED, describe_turn, picture_of, turn_overlay
from instructsam.inspection.statistics import QUANTITIES
from instructsam.structures import Sample, Turn
from instructsam.visualization import jpeg_bytes

CELL = 300
TURNS_SHOWN = 4
_PICTURE_BYTES = 25_000
_LONGEST = 600
_STYLE = """
.sample { margin: 0 0 16px; padding: 12px; border: 1px solid var(--rule); border-radius: 8px; break-inside: avoid; }
.sample > h3 { margin: 0 0 8px; overflow-wrap: anywhere; }
.turns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); gap: 14px; }
.turns figure { margin: 0; font-size: 13px; }
.turns img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.turns figcaption { margin-bottom: 6px; font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
.turns p { margin: 4px 0; overflow-wrap: anywhere; }
.missing { color: var(--series-1); }
"""


class Shown(NamedTuple):
    """A source's name, a sample with its turns as they are asked, and what is done to its picture."""

    source: str
    sample: Sample
    change: PictureChange = UNCHANGED


def page(title: str, found: Mapping[str, Any], shown: Sequence[Shown], notes: Sequence[str]) -> bytes:
    """The whole page in UTF-8.

    Args:
        found: as written to statistics.json: ``all`` and ``sources``, each as `statistics.statistics` returns it; the
            latter with samples, counted, epoch (samples that an epoch draws), left_out and aside besides.
        shown: what is shown, as it is asked.
        notes: what has to be known of the figures.
    """
    tiles = node("div", [_tile(name, value) for name, value in _headline(found).items()], class_="tiles")
    body = node(
        "main",
        node("header", node("h1", title), tiles, [node("p", note, class_="faint") for note in notes]),
        node("section", node("h2", "Sources"), _sources(found)),
        node("section", node("h2", "Statistics"), _charts(found["all"])),
        node("section", node("h2", f"{len(shown)} random samples"), [_sample(one) for one in shown]),
    )
    style = (resources.files("instructsam.evaluation") / "report.css").read_text(encoding="utf-8")
    return document(title, body, style + _STYLE)


# ---- figures ----------------------------------------------------------------------------------------------------


def _headline(found: Mapping[str, Any]) -> dict[str, str]:
    sources, of_all = found["sources"], found["all"]
    return {
        "samples": f"{sum(one['samples'] for one in sources.values()):,}",
        "samples an epoch": f"{sum(one['epoch'] for one in sources.values()):,}",
        "instructions at once": _number(of_all["turns_per_sample"]["mean"]),
        "instances an instruction": _number(of_all["instances_per_instruction"]["mean"]),
        "no-target": _percent(of_all["no_target"]),
        "boxes only": _percent(of_all["boxes_only"]),
    }


def _tile(name: str, value: str) -> Node:
    return node("div", node("span", name), node("strong", value), class_="tile")


def _sources(found: Mapping[str, Any]) -> Node:
    names = [
        "source",
        "samples",
        "in an epoch",
        "share of an epoch",
        "instructions at once",
        "instances an instruction",
    ]
    names += ["no-target", "boxes only", "median mask", "median side", "left out as bad", "left out besides"]
    total = max(sum(one["epoch"] for one in found["sources"].values()), 1)
    rows = [names]
    for name, one in found["sources"].items():
        cells = [name, f"{one['samples']:,}", f"{one['epoch']:,}", _percent(one["epoch"] / total)]
        cells += [_number(one[key]["mean"]) for key in ("turns_per_sample", "instances_per_instruction")]
        cells += [_percent(one["no_target"]), _percent(one["boxes_only"]), _percent(one["mask_area"]["median"])]
        cells += [_number(one["longest_side"]["median"]), _counts(one["left_out"]), _counts(one["aside"])]
        rows.append(cells)
    return table(rows)


def _charts(of_all: Mapping[str, Any]) -> Node:
    figures = []
    for name, (title, unit, counted, _) in QUANTITIES.items():
        one = of_all[name]
        if one["mean"] is None:
            continue
        show = _percent if name == "mask_area" else _number
        values = ", ".join(f"{key} {show(one[key])}" for key in ("mean", "median", "p95", "max"))
        chart = share_chart(title, unit, f"share of {counted}", list(one["bins"]), list(one["bins"].values()))
        figures.append(node("figure", node("figcaption", title), chart, node("p", values, class_="faint")))
    for name, none in (("kinds", "not stated"), ("forms", "as it stands")):
        title = f"{name.capitalize()} of instructions"
        figures.append(node("figure", node("figcaption", title), _shares(of_all[name], none)))
    return node("div", figures, class_="charts")


def _shares(shares: Mapping[str, float], none: str, most: int = 12) -> Node:
    rows = [(name or none, share) for name, share in shares.items()]
    if len(rows) > most:
        rest = rows[most - 1 :]
        rows = [*rows[: most - 1], (f"{len(rest)} others", sum(share for _, share in rest))]
    lines = [node("tr", node("th", _cut(name, 40), scope="row"), node("td", _percent(share))) for name, share in rows]
    return node("table", node("tbody", lines))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}" if value >= 0.01 or value == 0 else f"{value:.2%}"


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in left_out.items()) or "–"


# ---- samples ----------------------------------------------------------------------------------------------------


def _sample(shown: Shown) -> Node:
    source, sample, change = shown
    image, reason = picture_of(sample, change)
    size = f"{sample.height}×{sample.width} (height × width)" if sample.image is not None else "no picture"
    count = f"{len(sample.turns)} instruction{'s' if len(sample.turns) != 1 else ''}"
    head = node("h3", f"{source}: {_cut(sample.id)} ", node("span", f"{size}, {count}", class_="faint"))
    figures = [_turn(turn, image) for turn in sample.turns[:TURNS_SHOWN]]
    missing = node("p", reason, class_="missing") if reason else None
    rest = sample.turns[TURNS_SHOWN:]
    more = node("details", node("summary", f"{len(rest)} more"), _list(rest)) if rest else None
    return node("article", head, missing, node("div", figures, class_="turns"), more, class_="sample")


def _turn(turn: Turn, image: Any) -> Node:
    shown = None
    if image is not None:
        shown = picture(jpeg_bytes(turn_overlay(image, turn, CELL), _PICTURE_BYTES), describe_turn(turn))
    return node("figure", node("figcaption", _cut(turn.instruction)), shown, _about(turn))


def _about(turn: Turn) -> list[Node]:
    facts = " · ".join(part for part in (describe_turn(turn), turn.kind) if part)
    return [node("p", facts, class_="faint"), node("p", "→ ", _cut(answer_text(turn)))]


def _list(turns: Sequence[Turn]) -> Node:
    return node("ul", [node("li", node("strong", _cut(turn.instruction)), _about(turn)) for turn in turns])


def answer_text(turn: Turn) -> str:
    """The answer as text, each phrase in brackets with the number of its instances: "It is [the dog: 1]."."""
    phrases = [f"[{phrase.text}: {len(phrase.rles)}]" for phrase in turn.phrases]
    if not turn.answer:
        return ", ".join(phrases)
    between = zip(turn.answer, [*phrases, ""], strict=True)
    return "".join(piece + phrase for piece, phrase in between)


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
