"""Sources of a training set: settings, files that must be there, held-out pictures, tables in place of files."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import refer_set, save_json, scenes, write_benchmark

from instructsam.data.checks import Skips
from instructsam.data.leakage import coco_id, held_out_images, read_refs
from instructsam.data.samples import Mixture
from instructsam.data.sources import (
    READERS,
    Source,
    check_files,
    open_sources,
    open_tables,
    parse_sources,
    read_source,
    table_recipe,
)
from instructsam.data.table import write_table
from instructsam.errors import DataError
from instructsam.structures import PhraseTarget, Sample, Turn

LAST = len(scenes())  # the picture of the training split


def own(root: Path, split: str = "train", **settings: Any) -> dict[str, Any]:
    return {"reader": "coco_instructions", "root": str(root), "split": split, **settings}


@pytest.fixture
def refer(tmp_path) -> dict[str, Any]:
    """Settings of RefCOCO's training split; its other refs ask about other pictures."""
    write_benchmark("refcoco", tmp_path)
    files = {"root": str(tmp_path), "folder": "refcoco", "refs": "refs(unc).p"}
    return {"reader": "referring", **files, "image_root": str(tmp_path / "train2014"), "split": "train"}


def refs_file(path: Path, images: dict[int, str]) -> str:
    """A file of refs with nothing but pictures and their splits."""
    save_json(path, [{"image_id": image, "split": split} for image, split in images.items()])
    return str(path)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings_become_sources(world):
    settings = {
        "a": own(world, repeats=3, needs=["x", "y"], kinds=["counting"], form="phrase", expected=7),
        "left_out": None,
        "b": own(world, split="val", held_out=True, phrase="thing", get="a script"),
    }
    assert parse_sources(settings) == [
        Source(
            "a",
            "coco_instructions",
            {"root": str(world), "split": "train"},
            repeats=3,
            needs=("x", "y"),
            kinds=("counting",),
            form="phrase",
            expected=7,
        ),
        Source(
            "b",
            "coco_instructions",
            {"root": str(world), "split": "val"},
            held_out=True,
            phrase="thing",
            get="a script",
        ),
    ]


def test_a_reader_that_names_its_samples_gets_the_source_s_name(refer):
    (source,) = parse_sources({"my_set": refer})
    assert source.options["name"] == "my_set"
    assert all(sample.id.startswith("my_set/train/") for sample in read_source(source, Skips()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reader": "nothing"}, "data.sources.a: reader 'nothing' is none of coco_instructions, "),
        ({"reader": None}, "reader None is none of"),
        ({"colour": 1}, "data.sources.a: unknown settings colour"),
        ({"skips": 1}, "unknown settings skips"),
        ({"split": None}, "data.sources.a: not given: split"),
        ({"form": "question"}, "form='question' is none of '', 'category'"),
        ({"needs": "a/file"}, "needs must be a list, got 'a/file'"),
        ({"kinds": "counting"}, "kinds must be a list"),
    ],
)
def test_wrong_settings_are_named(world, change, reason):
    with pytest.raises(ValueError, match=reason):
        parse_sources({"a": {**own(world), **change}})


def test_nothing_to_read_is_an_error():
    for settings in ({}, {"a": None}):
        with pytest.raises(ValueError, match="data.sources is empty"):
            parse_sources(settings)


def test_files_that_are_missing_are_named_together(world, tmp_path):
    (tmp_path / "there_1.json").touch()
    settings = {
        "a": own(world, needs=[f"{tmp_path}/no.json", str(world)], get="scripts/a.sh"),
        "b": own(world, needs=[f"{tmp_path}/there_*.json"]),
        "c": own(world, needs=[f"{tmp_path}/other_*.json", f"{tmp_path}/none"]),
    }
    with pytest.raises(ValueError) as caught:
        check_files(parse_sources(settings))
    assert str(caught.value).splitlines() == [
        "2 sources lack files:",
        f"  a: {tmp_path}/no.json (scripts/a.sh says where to get it)",
        f"  c: {tmp_path}/other_*.json, {tmp_path}/none",
        "A source is left out by data.sources.NAME=null",
    ]
    check_files(parse_sources({"b": settings["b"]}))


# ---- reading --------------------------------------------------------------------------------------------------------


def test_form_kinds_and_the_answer_s_phrase_are_the_source_s(world, monkeypatch):
    turns = (
        Turn("the dog", (PhraseTarget(""), PhraseTarget("dog")), "a"),
        Turn("what barks?", (PhraseTarget("dog"),), "b", form="sentence"),
    )
    samples = [Sample("1", Path("1.jpg"), 2, 2, turns), Sample("2", Path("2.jpg"), 2, 2, turns[1:])]
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter(samples))
    assert list(read_source(Source("x", "listed", {}, kinds=("b",)), Skips()))[1] is samples[1]
    (first, _) = read_source(Source("x", "listed", {}, phrase="thing"), Skips())
    assert [phrase.text for phrase in first.turns[0].phrases] == ["thing", "dog"]
    assert first.turns[1] == turns[1] and first.turns[0].form == ""
    (only,) = read_source(Source("x", "listed", {}, kinds=("a",), form="phrase"), Skips())
    assert [turn.kind for turn in only.turns] == ["a"] and only.turns[0].form == "phrase"
    (first, second) = read_source(Source("x", "listed", {}, form=""), Skips())
    assert {turn.form for turn in (*first.turns, *second.turns)} == {""}
    assert list(read_source(Source("x", "listed", {}, kinds=("c",)), Skips())) == []


def test_pictures_of_other_splits_are_left_out_where_the_source_says_so(refer):
    source = parse_sources({"refcoco": {**refer, "split": "val"}})[0]
    whole = list(read_source(source, Skips(), {1, 3}))
    assert [coco_id(sample.image) for sample in whole] == [1, 2, 3, 4]
    dropped: list[Sample] = []
    left = list(read_source(dataclasses.replace(source, held_out=True), Skips(), {1, 3, 99}, dropped.append))
    assert [coco_id(sample.image) for sample in left] == [2, 4]
    assert left + dropped == [whole[1], whole[3], whole[0], whole[2]]


def test_bad_entries_go_through_skips(refer, tmp_path):
    refs, instances = refer_set(lists=False)
    mine = [ref for ref in refs if ref["split"] == "train"]
    mine[0]["image_id"] = 77
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (source,) = parse_sources({"refcoco": refer})
    with pytest.raises(DataError, match="unknown image_id 77"):
        list(read_source(source, Skips()))
    skips = Skips("skip")
    read = list(read_source(source, skips))
    assert sum(len(sample.turns) for sample in read) == sum(len(ref["sentences"]) for ref in mine[1:])
    assert skips.counts["refs"] == 1


def test_the_recipe_is_all_that_samples_depend_on(world):
    def recipe(held=("refs.p",), **changes):
        (source,) = parse_sources({"a": {**own(world), **changes}})
        return json.dumps(table_recipe(source, {"held_out": list(held)}))

    assert recipe() == recipe(repeats=5) == recipe(needs=["x"], get="y", expected=3) == recipe(held=["other.p"])
    changes: list[dict[str, Any]] = [
        {"split": "val"},
        {"form": "phrase"},
        {"phrase": "thing"},
        {"kinds": ["counting"]},
        {"held_out": True},
        {"held_out": True, "held": ["other.p"]},
    ]
    assert len({recipe(), *(recipe(**change) for change in changes)}) == 1 + len(changes)


# ---- the training set -----------------------------------------------------------------------------------------------


def everything(mixture: Mixture) -> list[Sample]:
    return [mixture[index] for index in range(len(mixture))]


def write_tables(data: dict[str, Any]) -> None:
    for source in parse_sources(data["sources"]):
        held = held_out_images(data.get("held_out", ()))
        write_table(
            Path(data["prepared"]) / source.name, read_source(source, Skips(), held), table_recipe(source, data)
        )


def test_tables_give_what_the_files_give(world, refer, tmp_path):
    held_out = [refs_file(tmp_path / "held.json", {2: "val", LAST: "train"})]
    sources = {
        "own": own(world, repeats=2),
        "refcoco": {**refer, "split": "val", "held_out": True, "repeats": 3, "form": "phrase"},
        "no": None,
    }
    data = {"sources": sources, "held_out": held_out, "prepared": None}
    read = open_sources(data)
    prepared = {**data, "prepared": str(tmp_path / "prepared")}
    write_tables(prepared)
    tables = open_sources(prepared)
    assert everything(tables) == everything(read)
    assert read.names == ("own", "refcoco") and read.repeats == (2, 3)
    assert {coco_id(sample.image) for sample in read.parts[1]} == {1, 3, 4}
    for opened in (open_sources({**data, "limit": 2}), open_sources({**prepared, "limit": 2})):
        assert [len(part) for part in opened.parts] == [2, 2] and len(opened) == 10
        assert everything(opened)[:2] == everything(read)[:2]
    with pytest.raises(ValueError, match="data.limit=0: must be at least 1"):
        open_sources({**data, "limit": 0})


def test_tables_that_are_missing_or_out_of_date_are_named_together(world, tmp_path):
    data = {"name": "mine", "sources": {"a": own(world), "b": own(world)}, "prepared": str(tmp_path)}
    write_tables({**data, "sources": {"a": own(world)}})
    changed = parse_sources({"a": own(world, split="val"), "b": own(world)})
    with pytest.raises(ValueError) as caught:
        open_tables(changed, data)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 sources are not prepared:"
    assert "  a:" in lines[1] and 'options.split: "train", now "val"' in lines[1]
    assert lines[2] == f"  b: {tmp_path}/b: is not prepared"
    assert "python -m instructsam.prepare data=mine; or read the files each time: data.prepared=null" in lines[3]


def test_missing_files_are_found_before_anything_is_read(world, tmp_path):
    with pytest.raises(ValueError, match="1 sources lack files"):
        open_sources({"sources": {"a": own(world), "b": own(tmp_path, needs=[str(tmp_path / "no")])}})


# ---- held-out pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("data/train2014/COCO_train2014_000000581857.jpg", 581857),
        (Path("train2017/000000000009.jpg"), 9),
        ("000000581857_3.jpg", None),
        ("0000000581857.jpg", None),  # 13 digits
        ("ADE_train_00000001.jpg", None),
        ("000000581857", None),
        (None, None),
    ],
)
def test_coco_ids_are_read_from_file_names(image, expected):
    assert coco_id(image) == expected


def test_held_out_are_all_splits_but_train(tmp_path):
    first = refs_file(tmp_path / "a.json", {1: "train", 2: "val", 3: "testA"})
    second = tmp_path / "b.p"
    second.write_bytes(pickle.dumps([{"image_id": "4", "split": "test"}, {"image_id": 2, "split": "train"}], 2))
    assert held_out_images([first, second]) == {2, 3, 4}
    assert held_out_images([]) == frozenset()


@pytest.mark.parametrize(
    ("refs", "reason"),
    [
        ({}, "expected a list of refs, got dict"),
        ([{"image_id": 1, "split": "val"}, {"image_id": 1}], r"\[1\]: expected an object with a split"),
        ([3], r"\[0\]: expected an object with a split, got 3"),
        ([{"split": "val"}], r"\[0\]: image_id must be a number, got None"),
        ([{"split": "val", "image_id": "x.jpg"}], "image_id must be a number, got 'x.jpg'"),
        ([{"split": "val", "image_id": 1.5}], "image_id must be a number"),
    ],
)
def test_refs_that_cannot_be_trusted_are_errors(tmp_path, refs, reason):
    save_json(tmp_path / "refs.json", refs)
    with pytest.raises(DataError, match=reason) as caught:
        held_out_images([tmp_path / "refs.json"])
    assert "refs.json" in str(caught.value)


def test_refs_are_read_from_pickles_and_json(tmp_path):
    refs, _ = refer_set(lists=True)
    save_json(tmp_path / "refs.json", refs)
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, 2))
    assert read_refs(tmp_path / "refs.json") == read_refs(tmp_path / "refs.p") == refs
