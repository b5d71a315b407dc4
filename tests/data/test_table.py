"""Tables of samples: what is written is read back, a wrong table is refused with the reason, memory stays flat."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam import masks
from instructsam.data.checks import Problem, Skips
from instructsam.data.samples import SIZES, SampleSizes
from instructsam.data.table import SampleTable, write_table
from instructsam.errors import DataError
from instructsam.structures import PhraseTarget, Sample, Turn

RECIPE = {"reader": "referring", "options": {"split": "train", "refs": ["a", "b"]}, "held_out": True}
BOX = [1, 2, 4, 5]


def plain(name: str, *phrases: PhraseTarget, kind: str = "phrase") -> Sample:
    return Sample(name, Path(f"images/{name}.jpg"), 6, 8, (Turn("the thing", phrases, kind, f"{name}/0"),))


def several(count: int) -> list[Sample]:
    """Samples with 0, 1, 2, 0, ... instances."""
    rle = masks.box_to_rle(BOX, 6, 8)
    return [plain(f"s{k}", PhraseTarget(f"thing {k}", (rle,) * (k % 3))) for k in range(count)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A table of ten samples in three files."""
    write_table(tmp_path / "table", several(10), RECIPE, batch_rows=2, shard_bytes=4000)
    return tmp_path / "table"


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder]


# ---- what is written is read ----------------------------------------------------------------------------------------


@st.composite
def phrases(draw, height: int, width: int) -> PhraseTarget:
    box_only, rles = draw(st.booleans()), []
    for _ in range(draw(st.integers(0, 3))):
        if box_only and draw(st.integers(0, 4)):  # else any mask, which must come back too
            x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            x2, y2 = draw(st.integers(x + 1, width)), draw(st.integers(y + 1, height))
            rles.append(masks.box_to_rle([x, y, x2, y2], height, width))
        else:
            bits = draw(st.integers(0, 2 ** (height * width) - 1))
            flat = [bits >> k & 1 for k in range(height * width)]
            rles.append(masks.encode(np.array(flat).reshape(height, width)))
    return PhraseTarget(draw(st.text(max_size=8)), tuple(rles), box_only)


@st.composite
def samples(draw) -> Sample:
    text, height, width = st.text(max_size=12), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    image = draw(st.none() | st.text(min_size=1, max_size=12).map(Path))
    turns = []
    for _ in range(draw(st.integers(0, 3))):
        asked = tuple(draw(st.lists(phrases(height, width), max_size=3))) if image else ()
        answer = tuple(draw(text) for _ in range(len(asked) + 1)) if draw(st.booleans()) else ()
        form = draw(st.sampled_from(["", "category", "phrase", "sentence", "ocr"]))
        turns.append(Turn(draw(text), asked, draw(text), draw(text), form, answer))
    values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
    objects = draw(st.lists(st.dictionaries(text, values | st.lists(values, max_size=2), max_size=3), max_size=2))
    size = (height, width) if image else (0, 0)
    return Sample(draw(text), image, *size, tuple(turns), tuple(objects), draw(st.booleans()))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(samples(), min_size=1, max_size=7), st.integers(1, 3), st.sampled_from([1, 4000, 10**6]))
def test_samples_come_back_as_they_were(written, batch_rows, shard_bytes):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "t", iter(written), {}, batch_rows=batch_rows, shard_bytes=shard_bytes)
        table = SampleTable(Path(folder) / "t", {})
        assert len(table) == len(written)
        assert [table[row] for row in range(len(table))] == written
        assert table[np.int64(len(table) - 1)] == written[-1]  # as samplers index
        expected = SampleSizes.of(written)
        for name in SIZES:
            np.testing.assert_array_equal(getattr(table.sizes, name), getattr(expected, name))
            assert getattr(table.sizes, name).dtype == np.int32
        table.verify()


def test_many_files_hold_the_rows_in_order(folder):
    table = SampleTable(folder, RECIPE)
    assert [shard["rows"] for shard in table.manifest["shards"]] == [4, 4, 2]
    assert [table[row] for row in range(10)] == several(10)
    for wrong in (-1, 10):
        with pytest.raises(IndexError, match=f"sample {wrong} of 10"):
            table[wrong]


def test_filled_boxes_are_kept_as_four_numbers(tmp_path):
    box, whole = masks.box_to_rle(BOX, 6, 8), masks.box_to_rle([0, 0, 8, 6], 6, 8)
    shape = masks.encode(np.eye(6, 8, dtype=bool))
    written = plain(
        "a",
        PhraseTarget("boxes", (box, whole), True),
        PhraseTarget("a mask", (box,)),
        PhraseTarget("no box at all", (box, shape), True),
        PhraseTarget("empty", (masks.empty_rle(6, 8),), True),
    )
    write_table(tmp_path / "t", [written], {})
    with pa.ipc.open_file(tmp_path / "t" / "00000.arrow") as file:
        (row,) = file.read_all().to_pylist()
    stored = [(phrase["boxes"], phrase["masks"]) for phrase in row["turns"][0]["phrases"]]
    counts = box["counts"], shape["counts"], masks.empty_rle(6, 8)["counts"]
    assert stored == [([*BOX, 0, 0, 8, 6], []), ([], [counts[0]]), ([], [*counts[:2]]), ([], [counts[2]])]
    assert SampleTable(tmp_path / "t")[0] == written


def test_the_manifest_counts(tmp_path):
    rle = masks.box_to_rle(BOX, 6, 8)
    one, two, none = PhraseTarget("one", (rle,)), PhraseTarget("two", (rle, rle)), PhraseTarget("none")
    turns = (Turn("x", (one, none), "phrase"), Turn("y", (two,), "phrase"), Turn("z", (none,), "ocr"))
    first = Sample("a", Path("a.jpg"), 6, 8, turns)
    live = {"skipped": 0}

    def read():
        yield first
        live["skipped"] = 3
        yield plain("b", two)

    manifest = write_table(tmp_path / "t", read(), RECIPE, info=live)
    assert manifest == json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "samples": 2,
        "turns": 4,
        "phrases": 5,
        "masks": 5,
        "no_target": 2,
        "samples_by_kind": {"ocr": 1, "phrase": 2},
    }
    assert manifest["instances_per_phrase"] == {"0": 2, "1": 1, "2": 2}
    assert manifest["recipe"] == RECIPE and manifest["info"] == {"skipped": 3}


# ---- what cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        (plain("x", PhraseTarget("a", (masks.empty_rle(8, 6),))), "mask size", r"of 'a' has size \[8, 6\], the .*6, 8"),
        (plain("x", PhraseTarget("half \ud83d")), "text", "not valid Unicode, near .*half"),
        (Sample("x", Path("\udcff.jpg"), 1, 1, ()), "text", "not valid Unicode"),
        (Sample("x", None, 0, 0, (), ({"box": (1, 2)},)), "field", "JSON does not keep"),
        (Sample("x", None, 0, 0, (), ({1: 2},)), "field", "JSON does not keep"),
        (Sample("x", None, 0, 0, (), ({"a": np.ones(2)},)), "field", "cannot be written as JSON"),
    ],
)
def test_a_sample_that_cannot_be_written_is_named_or_left_out(tmp_path, bad, kind, reason):
    written = [*several(3), bad, *several(2)]
    with pytest.raises(DataError, match=f"^x: .*{reason}") as caught:
        write_table(tmp_path / "t", written, {})
    assert caught.value.kind == kind and list(tmp_path.iterdir()) == []
    skips = Skips("skip")
    manifest = write_table(tmp_path / "t", written, {}, skips=skips)
    assert manifest["counts"]["samples"] == 5 and skips.counts == {"samples": 1}
    table = SampleTable(tmp_path / "t")
    assert [table[row] for row in range(5)] == [*several(3), *several(2)] and len(table.sizes) == 5


def test_a_table_of_no_samples_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sample to write"):
        write_table(tmp_path / "t", [], {})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_older_table(folder):
    def failing():
        yield from several(3)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_table(folder, failing(), {})
    assert len(SampleTable(folder, RECIPE)) == 10 and leftovers(folder) == []
    write_table(folder, several(2), {})
    assert len(SampleTable(folder, {})) == 2 and leftovers(folder) == []


def test_leftovers_of_a_killed_process_are_taken_care_of(folder):
    unfinished, old = folder.with_name(".table.tmp"), folder.with_name(".table.old")
    unfinished.mkdir()
    (unfinished / "00000.arrow").write_bytes(b"half")
    folder.rename(old)  # killed just between the two renames
    with pytest.raises(ValueError, match="no sample"):
        write_table(folder, [], {})
    assert len(SampleTable(folder, RECIPE)) == 10 and leftovers(folder) == []


# ---- what cannot be opened ------------------------------------------------------------------------------------------


def test_a_folder_without_a_table_is_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="nothing: is not prepared"):
        SampleTable(tmp_path / "nothing")


def test_another_recipe_is_refused_by_what_differs(folder):
    other = {"reader": "referring", "options": {"split": "val", "refs": ("a", "b")}, "held_out": True, "form": "phrase"}
    with pytest.raises(ValueError) as caught:
        SampleTable(folder, other)
    assert str(caught.value) == (
        f'{folder}: was prepared with other settings: options.split: "train", now "val"; form: null, now "phrase"'
    )
    SampleTable(folder, {**RECIPE, "options": {"split": "train", "refs": ("a", "b")}})  # tuples are lists in JSON
    SampleTable(folder)


def test_missing_and_shortened_files_are_told_at_once(folder):
    shard = folder / "00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"00001.arrow: has {len(content) - 1} bytes instead of {len(content)}"):
        SampleTable(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="00001.arrow: is missing; prepare the table anew"):
        SampleTable(folder)


def test_changed_content_is_found_by_verify(folder):
    content = bytearray((folder / "00002.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "00002.arrow").write_bytes(content)
    with pytest.raises(ValueError, match="table: 00002.arrow changed"):
        SampleTable(folder).verify()


@pytest.mark.parametrize("content", ['{"version": 99}', "[]", "{}"])
def test_another_format_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="was prepared by another version"):
        SampleTable(folder)
    (folder / "manifest.json").write_text(content[:-1])
    with pytest.raises(ValueError, match="manifest.json: is not valid JSON"):
        SampleTable(folder)


# ---- processes and memory -------------------------------------------------------------------------------------------


def _read(table: SampleTable, rows: range) -> list[Sample]:
    return [table[row] for row in rows]


@pytest.mark.multiprocess
def test_an_open_table_goes_to_other_processes(folder):
    table = SampleTable(folder, RECIPE)
    assert table[9] == several(10)[9] and len(table.sizes) == 10
    assert len(pickle.dumps(table)) < 5000
    assert _read(pickle.loads(pickle.dumps(table)), range(10)) == several(10)
    with multiprocessing.get_context("fork").Pool(1) as pool:  # as workers of a DataLoader get it
        assert pool.apply(_read, (table, range(10))) == several(10)
    assert _read(table, range(10)) == several(10)


def resident(folder: Path) -> int:
    """Bytes of a table's shards that this process holds in memory."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = str(folder) in line and line.endswith(".arrow")
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux' /proc")
def test_pages_that_were_read_do_not_stay_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    counts = ["".join(map(chr, rng.integers(48, 112, 20_000))) for _ in range(50)]  # never decoded here
    rles = [{"size": [6, 8], "counts": text} for text in counts]
    write_table(tmp_path / "t", (plain(f"s{k}", PhraseTarget("x", (rles[k % 50],))) for k in range(3000)), {})
    table = SampleTable(tmp_path / "t")
    assert sum(shard["bytes"] for shard in table.manifest["shards"]) > 60e6
    most, first = 0, resident(tmp_path)
    for number, row in enumerate(rng.permutation(3000)):
        assert len(table[row].turns[0].phrases[0].rles[0]["counts"]) == 20_000
        if number % 100 == 99:
            most = max(most, resident(tmp_path))
    assert first == 0 and 0 < most < 20e6


def test_what_no_table_can_hold_costs_its_sample_alone(tmp_path):
    """Arrow would refuse a whole block of rows for one of them."""
    turn = Turn("dog", (PhraseTarget("dog"),))
    good = Sample("good", Path("a.jpg"), 4, 4, (turn,))
    bad = [
        dataclasses.replace(good, id="high", height=2**40),
        dataclasses.replace(good, id="large", height=2**20, width=2**20),
        dataclasses.replace(good, id="half", objects=({"category": "a \ud83d"},)),
    ]
    problems: list[Problem] = []
    write_table(tmp_path / "t", [good, *bad, good], {}, skips=Skips("skip", report=problems.append))
    assert len(SampleTable(tmp_path / "t")) == 2
    assert [(str(problem.place), problem.kind) for problem in problems] == [
        ("high", "field"),
        ("large", "field"),
        ("half", "text"),
    ]
    for one in bad:
        with pytest.raises(DataError, match=f"^{one.id}: "):
            write_table(tmp_path / "u", [good, one], {})
