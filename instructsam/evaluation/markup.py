"""HTML and SVG as element trees, so that every text is escaped by the library that writes it out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias
from xml.etree import ElementTree

Node: TypeAlias = ElementTree.Element
Child: TypeAlias = "Node | str | None | Iterable[Node | str | None]"


def node(tag: str, *children: Child, **attributes: str | float | bool | None) -> Node:
    """An element with children: elements, texts, or lists of both; None is left out.

    In names of attributes "_" stands for "-", and a trailing one is dropped (``class_``). True gives an attribute
    without a value of its own (``open``), False and None give none.
    """
    element = ElementTree.Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            element.set(name.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for child in children:
        add(element, child)
    return element


def add(element: Node, child: Child) -> None:
    """Append a child, a text behind the last one, or each of several."""
    if child is None:
        return
    if isinstance(child, ElementTree.Element):
        element.append(child)
    elif isinstance(child, str):
        if len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    else:
        for one in child:
            add(element, one)


def size_of(element: Node) -> int:
    """Bytes that an element takes in a document."""
    return len(_written(element))


def table(rows: Sequence[Sequence[str]]) -> Node:
    """Rows of text, of which the first is the header; so is the first cell of each."""
    head = node("thead", node("tr", [node("th", cell, scope="col") for cell in rows[0]]))
    lines = [node("tr", node("th", row[0], scope="row"), [node("td", cell) for cell in row[1:]]) for row in rows[1:]]
    return node("div", node("table", head, node("tbody", lines)), class_="wide")


def picture(jpeg: bytes, label: str) -> Node:
    """A JPEG file inside the page, and what is said where it cannot be seen."""
    return node("img", src="data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), alt=label)


def document(title: str, body: Node, style: str, script: str | None = None) -> bytes:
    """A whole page in UTF-8; half characters (lone surrogates) become question marks.

    Its content security policy keeps a browser from fetching anything, and from running anything but the script.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=policy),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("title", title),
        node("style", style),
    )
    code = None if script is None else node("script", script)
    return b"<!DOCTYPE html>\n" + _written(node("html", head, node("body", body, code), lang="en")) + b"\n"


def _written(element: Node) -> bytes:
    return ElementTree.tostring(element, encoding="unicode", method="html").encode("utf-8", "replace")
