"""Streaming of JSON: equal to json.load whatever the window, memory bounded, every fault named."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instructsam.data.json_stream import stream_json, stream_json_lines
from instructsam.errors import DataError

RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
LAYOUTS = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])


def write(tmp_path, content: str | bytes):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def gathered(path, **options) -> Any:
    """The whole value put together again, except that empty lists of an object are not seen."""
    items = list(stream_json(path, **options))
    by_key: dict[str, Any] = {}
    for key, index, item in items:
        if index < 0:
            by_key[key] = item
        else:
            assert index == len(by_key.setdefault(key, []))
            by_key[key].append(item)
    return by_key


def expected(value: Any) -> Any:
    by_key = {"": value} if isinstance(value, list) else value
    return {key: one for key, one in by_key.items() if one != []}


@pytest.mark.slow
@given(st.lists(JSON, max_size=6) | st.dictionaries(st.text(max_size=5), JSON, max_size=5), LAYOUTS, st.integers(1, 40))
@example([-math.inf, math.inf, -1.5e-300, True, '\\"\u00e9\U0001f600', 12345678901234567890], {}, 1)
@example([1, 12, 123, 1e5, 1.25, -0.0], {"indent": 2}, 1)
@RELAXED
def test_equals_json_load_whatever_the_window(tmp_path, value, layout, chunk_bytes):
    try:
        path = write(tmp_path, json.dumps(value, **layout).encode())
    except UnicodeEncodeError:  # half a character can only be written escaped
        path = write(tmp_path, json.dumps(value))
    assert gathered(path, chunk_bytes=chunk_bytes) == expected(value)


@pytest.mark.slow
@given(JSON, st.data())
@RELAXED
def test_damaged_text_is_a_json_error_and_never_another_value(tmp_path, value, data):
    text = bytearray(json.dumps([value, value]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, bytes(text))
    try:
        whole = json.loads(bytes(text).decode("utf-8"))
    except ValueError:
        whole = None
    try:
        found = gathered(path, chunk_bytes=data.draw(st.integers(1, 20)))
    except DataError as error:
        assert error.kind == "json" and str(path) in str(error)
        # A key that occurs twice is the one thing that json.load lets pass.
        assert not isinstance(whole, list | dict) or "a second time" in str(error)
    else:
        assert repr(found) == repr(expected(whole))  # repr, since NaN is not equal to itself


def test_nan_and_infinity_are_read(tmp_path):
    first, *others = (item for _, _, item in stream_json(write(tmp_path, "[NaN, Infinity, -Infinity]"), chunk_bytes=1))
    assert math.isnan(first) and others == [math.inf, -math.inf]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert list(stream_json(write(tmp_path, b"\xef\xbb\xbf[1]"), chunk_bytes=1)) == [("", 0, 1)]


def test_lists_of_an_object_come_item_by_item_in_file_order(tmp_path):
    path = write(tmp_path, '{"info": {"year": 1}, "images": [{"id": 1}, {"id": 2}], "none": [], "n": null, "a": [[3]]}')
    assert list(stream_json(path)) == [
        ("info", -1, {"year": 1}),
        ("images", 0, {"id": 1}),
        ("images", 1, {"id": 2}),
        ("n", -1, None),
        ("a", 0, [3]),
    ]


FAULTS = {
    "empty": ("", r"x\.json: at byte 0: the file ends where '\[' or '\{' is expected"),
    "scalar": ("3", r"at byte 0: expected '\[' or '\{', got '3'"),
    "truncated in an item": ('[{"a": 1}, {"a": "bc', r"\[1\]: at byte 17: .*Unterminated string.*the file ends there"),
    "truncated after an item": ('[{"a": 1}, {"a": 2}', r"\[1\]: at byte 19: the file ends where ',' or '\]'"),
    "truncated list": ("[1,", r"\[1\]: at byte 3: .*Expecting value"),
    "truncated object": ('{"images": [1, 2]', r"images\[2?1?\]: at byte 17: the file ends where ',' or '\}'"),
    "malformed": ('{"images": [1, {"a" 2}]}', r"images\[1\]: at byte 20: .*Expecting ':'"),
    "malformed behind é": ('{"é": [1, x]}', r"é\[1\]: at byte 11: .*Expecting value"),
    "trailing comma": ("[1, ]", r"\[1\]: at byte 4: .*Expecting value"),
    "no comma": ("[1 2]", r"\[0\]: at byte 3: expected ',' or '\]', got '2'"),
    "no colon": ('{"a" 1}', r"at byte 5: expected ':', got '1'"),
    "no key": ('{"a": 1, 3: 2}', r"at byte 9: expected a key"),
    "more": ("[1] [2]", r"at byte 4: the value ends here, but '\[' follows"),
    "key twice": ('{"a": [1], "a": [2]}', r"the key 'a' occurs a second time"),
    "control character": ('["a\nb"]', r"\[0\]: at byte 3: .*Invalid control character"),
    "digits": (f"[{'9' * 5000}]", r"\[0\]: at byte 1: cannot be read"),
    "nested": ("[" * 200_000, r"\[0\]: at byte 1: cannot be read"),
    "cp1252": ('[1, "caf\xe9"]'.encode("cp1252"), r"\[1\]: is not utf-8 at byte 8: .*encoding: cp1252"),
    "cut character": ('[1, "é'.encode()[:-1], r"\[1\]: is not utf-8 at byte 5"),
}


@pytest.mark.parametrize("chunk_bytes", [1, 7, 2**20])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_item_and_byte(tmp_path, name, chunk_bytes):
    content, message = FAULTS[name]
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        list(stream_json(path, chunk_bytes=chunk_bytes))
    assert caught.value.kind == "json" and str(caught.value).startswith(str(path))
    assert "nothing from there on can be read" in str(caught.value)


def test_what_comes_before_a_fault_is_handed_out(tmp_path):
    path = write(tmp_path, b'[1, 2, "\xff"]')
    stream = stream_json(path)
    assert [next(stream), next(stream)] == [("", 0, 1), ("", 1, 2)]
    with pytest.raises(DataError, match=r"\[2\]: is not utf-8 at byte 8"):
        next(stream)


def test_cp1252_is_read_where_it_is_asked_for(tmp_path):
    path = write(tmp_path, '["caf\xe9 \u2019"]'.encode("cp1252"))
    assert list(stream_json(path, encoding="cp1252", chunk_bytes=1)) == [("", 0, "caf\xe9 \u2019")]
    with pytest.raises(DataError, match="is not cp1252 at byte 2"):
        list(stream_json(write(tmp_path, b'["\x81"]'), encoding="cp1252"))
    with pytest.raises(ValueError, match="encoding='latin-1' is none of utf-8, cp1252"):
        list(stream_json(path, encoding="latin-1"))


def test_files_that_cannot_be_opened_are_named(tmp_path):
    for read in (stream_json, stream_json_lines):
        with pytest.raises(ValueError, match=r"absent\.json: cannot be read \(No such file"):
            list(read(tmp_path / "absent.json"))
        with pytest.raises(ValueError, match="cannot be read"):
            list(read(tmp_path))


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2**20])
def test_an_item_beyond_the_limit_is_an_error(tmp_path, chunk_bytes):
    path = write(tmp_path, json.dumps(["a" * 98, "a" * 99]))
    stream = stream_json(path, chunk_bytes=chunk_bytes, max_item=100)
    assert next(stream)[2] == "a" * 98
    with pytest.raises(DataError, match=r"\[1\]: at byte 103: is longer than 100 characters"):
        next(stream)


def test_memory_stays_that_of_a_few_items(tmp_path):
    path = tmp_path / "x.json"
    item = json.dumps({"text": "x" * 1000})
    path.write_text("[" + ", ".join([item] * 20_000) + "]")  # 20 MB
    long = json.dumps({"text": "x" * 3_000_000})
    (tmp_path / "bad.json").write_text('[{"a" 1},' + ", ".join([long] * 7) + "]")
    tracemalloc.start()
    assert sum(1 for _ in stream_json(path, chunk_bytes=2**16)) == 20_000
    # A fault is told at once, not when the limit of an item is reached.
    with pytest.raises(DataError, match=r"at byte 6: .*Expecting ':'"):
        list(stream_json(tmp_path / "bad.json", chunk_bytes=2**10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_a_long_item_is_parsed_a_few_times_only(tmp_path, monkeypatch):
    path = write(tmp_path, json.dumps(["x" * 2**20, 1]))
    calls = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text, pos=0):
            calls.append(len(text) - pos)
            return super().raw_decode(text, pos)

    monkeypatch.setattr(json, "JSONDecoder", Counting)
    assert len(list(stream_json(path, chunk_bytes=256))) == 2
    assert len(calls) < 20 and sum(calls) < 8 * 2**20


def test_lines(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n  {"a": 2} \n \nx\xff')
    assert list(stream_json_lines(path)) == [(1, b'{"a": 1}'), (3, b'{"a": 2}'), (5, b"x\xff")]
    with pytest.raises(DataError, match=r"x\.json:1: is longer than 8 bytes") as caught:
        list(stream_json_lines(path, max_line=8))
    assert caught.value.kind == "json"
