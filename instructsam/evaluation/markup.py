"""HTML and SVG as element trees, so that every text is escaped by the library that writes it out."""

from __future__ import annotations

from collections.abc import Iterable
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


def document(root: Node) -> bytes:
    """A whole page in UTF-8; half characters (lone surrogates) become question marks."""
    return b"<!DOCTYPE html>\n" + _written(root) + b"\n"


def _written(element: Node) -> bytes:
    return ElementTree.tostring(element, encoding="unicode", method="html").encode("utf-8", "replace")
