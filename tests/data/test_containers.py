"""Pickles of data sets: plain containers come through, whatever would run code does not."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_fixtures import write_benchmark

from instructsam.data.checks import Skips
from instructsam.data.containers import read_pickle
from instructsam.data.leakage import held_out_images, read_refs
from instructsam.data.referring import read_referring

PLAIN = [{"ref_id": 1, "ann_id": [-1], "sentences": [{"sent": "café", "tokens": ("a", "b")}], "x": {1.5, None, True}}]


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(PLAIN, protocol=protocol))
    assert read_pickle(path) == PLAIN


def test_an_ordered_dict_is_plain(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(collections.OrderedDict(a=1)))
    assert read_pickle(path) == {"a": 1}


@pytest.mark.parametrize("text", ["plain", "café"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_byte_strings_of_python_2_become_text(tmp_path, text, encoding):
    data = text.encode(encoding)
    (tmp_path / "refs.p").write_bytes(b"\x80\x02]q\x00U" + bytes([len(data)]) + data + b"q\x01a.")
    assert read_pickle(tmp_path / "refs.p") == [text]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {marker}",)),
        (subprocess.check_call, (["touch", "{marker}"],)),
        (eval, ("open('{marker}', 'w')",)),
        (getattr, ("", "join")),
        (Path, ("/etc/passwd",)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_does_not_run(tmp_path, function, arguments, protocol):
    marker = tmp_path / "it ran".replace(" ", "_")

    def filled(value):
        return [filled(one) for one in value] if isinstance(value, list) else value.format(marker=marker)

    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"a": Runs(function, *map(filled, arguments))}], protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\.p: is no readable pickle .*only plain containers"):
        read_pickle(path)
    assert not marker.exists()


def test_classes_that_only_look_plain_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    for value in (collections.Counter("a"), collections.defaultdict(list), collections.deque([1])):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match="only plain containers"):
            read_pickle(path)


def test_a_truncated_pickle_is_named_wherever_it_ends(tmp_path):
    path, whole = tmp_path / "refs.p", pickle.dumps(PLAIN, protocol=2)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"refs\.p: is no readable pickle"):
            read_pickle(path)


@pytest.mark.parametrize("data", [b"", b"[1, 2]", b"\xff\xfe\x00", b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."])
def test_garbage_is_named(tmp_path, data):
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(ValueError, match=r"refs\.p: is no readable pickle"):
        read_pickle(tmp_path / "refs.p")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"refs\.p: cannot be read \(No such file"):
        read_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("reader", ["read_referring", "read_refs", "held_out_images"])
def test_no_reader_of_refs_runs_their_code(tmp_path, reader):
    write_benchmark("refcoco", tmp_path)
    marker, path = tmp_path / "it_ran", tmp_path / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"split": "val", "image_id": Runs(os.system, f"touch {marker}")}], protocol=2))
    calls: dict[str, Callable[[], object]] = {
        "read_referring": lambda: read_referring(tmp_path, "val", "x", "refcoco", path.name, tmp_path, Skips("skip")),
        "read_refs": lambda: read_refs(path),
        "held_out_images": lambda: held_out_images([path]),
    }
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: is no readable pickle .*only plain containers"):
        calls[reader]()
    assert not marker.exists()
