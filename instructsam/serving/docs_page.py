"""The page at /docs: an OpenAPI description as HTML. FastAPI's own pages load their scripts from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
pre { background: #f2f2f2; color: #111; padding: .75rem; overflow-x: auto; }
li > span { color: #666; }
"""
_LIMITS = {"default": "default", "minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}


def docs_page(description: Mapping[str, Any], address: str) -> str:
    """The whole page, which loads nothing.

    Args:
        description: as FastAPI's ``openapi()`` returns it, its schemas without references.
        address: of the service, for the commands.
    """
    title, summary = escape(description["info"]["title"]), escape(description["info"].get("summary", ""))
    sections = [
        _operation(method, path, operation, address.rstrip("/"))
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1><p>{summary}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>\n' + "\n".join(sections) + "</body></html>\n"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any], address: str) -> str:
    contents = operation.get("requestBody", {}).get("content", {})
    form = contents.get("multipart/form-data", {}).get("schema", {})
    fields = f"<h3>Fields of the form</h3>{_fields(form)}" if form else ""
    responses = "".join(_response(status, response) for status, response in operation["responses"].items())
    return (
        f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(operation['summary'])}. "
        f"{escape(operation.get('description', ''))}</p>"
        f"<pre>{escape(_curl(address + path, form, 'security' in operation))}</pre>{fields}"
        f"<h3>Responses</h3><ul>{responses}</ul>"
    )


def _curl(url: str, form: Mapping[str, Any], token: bool) -> str:
    header = ' -H "Authorization: Bearer $INSTRUCTSAM_TOKEN"' if token else ""
    given = {name: one["example"] for name, one in form.get("properties", {}).items() if "example" in one}
    parts = [f" -F {name}={shlex.quote(value)}" for name, value in given.items()]
    return f"curl{header}{''.join(parts)} {shlex.quote(url)}"


def _response(status: str, response: Mapping[str, Any]) -> str:
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    return f"<li><b>{escape(status)}</b> {escape(response['description'])}{_fields(schema)}</li>"


def _fields(schema: Mapping[str, Any]) -> str:
    """An object's fields as a list, with those of the objects in it."""
    rows = []
    for name, one in schema.get("properties", {}).items():
        kind = f"{one['type']} of {one['items']['type']}s" if "items" in one else one["type"]
        about = [kind, "required" if name in schema.get("required", ()) else "optional"]
        about += [f"{words} {one[key]:g}" for key, words in _LIMITS.items() if key in one]
        inner = _fields(one.get("items", one))
        text = escape(one.get("description", ""))
        rows.append(f"<li><code>{escape(name)}</code> {text} <span>({escape(', '.join(about))})</span>{inner}</li>")
    return f"<ul>{''.join(rows)}</ul>" if rows else ""
