"""The page at /docs names everything and loads nothing."""

from __future__ import annotations

import html
import re

import pytest

from instructsam.serving.docs_page import docs_page
from instructsam.serving.limits import Limits
from instructsam.serving.schema import ANSWER, FIELDS, RESPONSES, form_schema


@pytest.fixture
def description() -> dict:
    body = {"content": {"multipart/form-data": {"schema": form_schema(Limits(least_threshold=0.07))}}}
    responses = {str(status): response for status, response in RESPONSES.items()}
    post = {"summary": "Segment", "description": "What <b>is</b> asked.", "requestBody": body, "responses": responses}
    get = {"summary": "Health", "responses": {"200": {"description": "well"}}}
    return {"info": {"title": "A & B"}, "paths": {"/v1/segment": {"post": post}, "/health": {"get": get}}}


def test_it_names_every_path_field_and_response(description):
    page = docs_page(description, "http://127.0.0.1:8000/")
    instance = ANSWER["properties"]["instances"]["items"]["properties"]
    names = [*FIELDS, *ANSWER["properties"], *instance, *instance["segmentation"]["properties"]]
    assert all(f"<code>{name}</code>" in page for name in names)
    assert all(f"<b>{status}</b> {html.escape(RESPONSES[status]['description'])}" in page for status in RESPONSES)
    assert "POST /v1/segment" in page and "GET /health" in page and "at least 0.07" in page


def test_its_commands_can_be_copied(description):
    def commands() -> list[str]:
        page = docs_page(description, "http://127.0.0.1:8000/")
        return [html.unescape(command) for command in re.findall(r"<pre>(.*?)</pre>", page)]

    form = "-F image=@photo.jpg -F instruction='the two dogs on the left' http://127.0.0.1:8000/v1/segment"
    assert commands() == [f"curl {form}", "curl http://127.0.0.1:8000/health"]
    description["paths"]["/v1/segment"]["post"]["security"] = [{"HTTPBearer": []}]
    assert commands()[0] == f'curl -H "Authorization: Bearer $INSTRUCTSAM_TOKEN" {form}'


def test_it_loads_nothing_and_escapes_everything(description):
    page = docs_page(description, "http://evil/<script>")
    assert re.findall(r'(?:src|href)\s*=\s*"?([^">\s]*)', page) == ["openapi.json"]
    assert not re.search(r"<(script|link|img|iframe|b>is)|@import|url\(", page)
    assert "<title>A &amp; B</title>" in page and "What &lt;b&gt;is&lt;/b&gt; asked." in page
    assert "default-src 'none'" in page
