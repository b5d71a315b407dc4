"""Sources of a training set: settings, files that must be there, held-out pictures, tables in place of files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import refer_set, save_json, scenes, write_benchmark

from instructsam.data.checks import Place, Skips
from instructsam.data.leakage import Leakage, coco_id, held_out_images, read_refs
from instructsam.data.samples import Mixture
from instructsam.data.source_files import FILES
from instructsam.data.sources import (
    _OWN,
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
from instructsam.prepare import prepare
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
        ({"repeats": 2, "weight": 1.5}, "has repeats and a weight; give one of them"),
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
    leakage = Leakage()
    left = list(read_source(dataclasses.replace(source, held_out=True), Skips(), {1, 3, 99}, leakage))
    assert left == [whole[1], whole[3]] and [coco_id(sample.image) for sample in left] == [2, 4]
    assert leakage == Leakage(samples=2, pictures={1, 3}, known=2)


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
    def recipe(held=("refs.p",), on_bad="raise", **changes):
        (source,) = parse_sources({"a": {**own(world), **changes}})
        return json.dumps(table_recipe(source, {"held_out": list(held), "on_bad": on_bad}))

    assert (
        recipe()
        == recipe(repeats=5)
        == recipe(weight=5.5)
        == recipe(needs=["x"], get="y", expected=3)
        == recipe(held=["other.p"])
    )
    changes: list[dict[str, Any]] = [
        {"split": "val"},
        {"form": "phrase"},
        {"phrase": "thing"},
        {"kinds": ["counting"]},
        {"held_out": True},
        {"held_out": True, "held": ["other.p"]},
        {"on_bad": "skip"},
    ]
    assert len({recipe(), *(recipe(**change) for change in changes)}) == 1 + len(changes)


# ---- the training set -----------------------------------------------------------------------------------------------


def everything(mixture: Mixture) -> list[Sample]:
    """What an epoch sees of it."""
    return [mixture[index] for index in mixture.draws().of_epoch(0).tolist()]


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
    assert read.names == ("own", "refcoco") and read.repeats == {"own": 2, "refcoco": 3}
    assert {coco_id(sample.image) for sample in read.parts[1]} == {1, 3, 4}
    for opened in (open_sources({**data, "limit": 2}), open_sources({**prepared, "limit": 2})):
        assert [len(part) for part in opened.parts] == [2, 2] and len(everything(opened)) == 10
        assert everything(opened)[:2] == everything(read)[:2]
    with pytest.raises(ValueError, match="data.limit=0: must be at least 1"):
        open_sources({**data, "limit": 0})


def test_a_limit_beyond_what_there_is_takes_all(world, tmp_path):
    data = {"sources": {"own": own(world, split="val")}, "prepared": None, "limit": 1000}
    write_tables(prepared := {**data, "prepared": str(tmp_path / "prepared")})
    assert everything(open_sources(prepared)) == everything(open_sources(data)) != []


def test_what_cannot_be_used_is_counted_apart_from_what_is_bad(tmp_path):
    def entry(kind: str, shape: list[int]) -> dict[str, Any]:
        return {"type": "phrase", "text": "a cup", "ann_type": kind, "ann": [shape]}

    annotations = [entry("point", [1, 1]), entry("bbox", [1, 1, 9, 9]), entry("bbox", [1, 1, 0, 0])]
    save_json(tmp_path / "a.json", [{"image": "a.jpg", "height": 40, "width": 40, "annotation": annotations}] * 2)
    source = {"reader": "release_train", "file": f"{tmp_path}/a.json", "image_root": str(tmp_path)}
    skips = Skips("skip")
    open_sources({"sources": {"a": source, "b": source}}, skips)
    assert skips.aside == {"point annotations": 4} and skips.counts == {"annotations": 4}


def test_sources_are_mixed_by_weight_or_by_repeats(world):
    """A configuration's repeats are taken back by null. A weight that nothing comes of is an error."""
    first, second = own(world, repeats=None, weight=1), own(world, split="val", weight=3)
    mixture = open_sources({"sources": {"a": first, "b": second}, "epoch_samples": 40})
    drawn = [mixture.locate(number)[0] for number in mixture.draws().of_epoch(2).tolist()]
    assert (drawn.count("a"), drawn.count("b")) == (10, 30)
    halves = open_sources({"sources": {"a": own(world, repeats=0.5), "b": own(world, repeats=None)}})
    assert halves.repeats == {"a": 0.5, "b": 1} and len(halves.draws()) == 6 + 12
    for settings, reason in (
        ({"sources": {"a": first, "b": own(world)}, "epoch_samples": 40}, "all sources need a weight.* without: b"),
        ({"sources": {"a": first}}, "data.epoch_samples=None: goes with the weights"),
        ({"sources": {"b": own(world)}, "epoch_samples": 40}, "data.epoch_samples=40: goes with the weights"),
        ({"sources": {"a": own(world, repeats=0)}}, "source a: repeats must be a number above 0, got 0"),
        ({"sources": {"a": own(world, weight="x")}, "epoch_samples": 9}, "source a: weights must be a number above 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_sources(settings)


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
        ("obj365_train_000000226592.jpg", None),
        ("train_000000226592.jpg", None),
        ("COCO_val2014_000000000042.png", 42),
        ("COCO_test2015_000000000042.jpg", 42),
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


def test_pictures_that_cannot_be_told_are_counted_and_a_source_of_nothing_else_refused(
    world, tmp_path, caplog, monkeypatch
):
    def pictures(*names: str | None) -> None:
        turn = Turn("dog", (PhraseTarget("dog"),))
        made = [Sample(str(k), name and Path(name), 2, 2, (turn,)) for k, name in enumerate(names)]
        monkeypatch.setitem(READERS, "listed", lambda skips=None: iter(made))

    held_out = [refs_file(tmp_path / "held.json", {2: "val"})]
    data = {"sources": {"a": {"reader": "listed", "held_out": True}}, "held_out": held_out, "prepared": None}
    pictures(f"{2:012}.jpg", f"{2:012}.png", f"{3:012}.jpg", "dog.jpg", None)
    assert [sample.id for sample in everything(open_sources(data))] == ["2", "3", "4"]
    (record,) = caplog.records
    assert record.message == (
        "a: left out 2 samples about 1 pictures of validation and test splits; "
        "kept 1 samples though their pictures' names give no COCO id to tell by"
    )
    pictures("dog.jpg", None)
    with pytest.raises(
        DataError, match=r"no picture of a is named by a COCO id .* data.sources.a.held_out=false"
    ) as caught:
        open_sources(data)
    assert caught.value.kind == "leakage"
    assert len(open_sources({**data, "sources": {"a": {"reader": "listed"}}})) == 2
    pictures(None)
    assert len(open_sources(data)) == 1


def test_held_out_without_a_file_that_says_what_is_an_error(world, tmp_path):
    sources = {"a": own(world, held_out=True), "b": own(world)}
    for prepared in (None, str(tmp_path)):
        for held_out in ([], None):
            with pytest.raises(ValueError, match=r"^a: held_out is true, but .*: data.held_out=\[data/refer"):
                open_sources({"sources": sources, "held_out": held_out, "prepared": prepared})
    assert len(open_sources({"sources": {"b": own(world)}, "held_out": [], "prepared": None})) == 12


# ---- readers and files ----------------------------------------------------------------------------------------------


def test_no_argument_of_a_reader_is_hidden_by_a_setting_of_sources():
    for name, reader in READERS.items():
        hidden = set(inspect.signature(reader).parameters) & _OWN - {"name"}  # the name is handed over
        assert not hidden, name


def test_the_release_s_layouts_and_lisa_s_phrase_can_be_given(tmp_path):
    write_benchmark("inst2seg", tmp_path)
    files = {"root": str(tmp_path), "split": "test", "file": "{split}.json", "image_root": str(tmp_path / "images")}
    (source,) = parse_sources({"a": {"reader": "release_eval", "layout": "inst2seg", "form": "phrase", **files}})
    turns = [turn for sample in read_source(source, Skips()) for turn in sample.turns]
    assert {turn.form for turn in turns} == {"phrase"} and {turn.phrases[0].text for turn in turns} == {"object"}


def test_every_reader_names_its_files():
    assert set(FILES) == set(READERS)


@pytest.fixture
def tabled(world, tmp_path) -> dict[str, Any]:
    """A source without ``needs`` on a copy of the tiny world, and its table."""
    shutil.copytree(world / "val", tmp_path / "world" / "val")
    data = {"sources": {"a": own(tmp_path / "world", split="val")}, "prepared": str(tmp_path / "tables")}
    prepare({"data": data, "only": None, "force": False, "workers": 1})
    return data


@pytest.mark.parametrize("name", ["instances.json", "instructions.jsonl"])
def test_training_refuses_a_table_whose_files_have_changed(tabled, tmp_path, name):
    file = tmp_path / "world" / "val" / name
    assert len(open_sources(tabled)) == 6
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    with pytest.raises(
        ValueError, match=rf"1 sources are not prepared:\n  a: .*{name}: new or changed since the table was"
    ):
        open_sources(tabled)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    file.write_bytes(file.read_bytes() + b"\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="new or changed"):  # of the same time, but longer
        open_sources(tabled)
    file.unlink()
    assert len(open_sources(tabled)) == 6  # tables do without their files


def test_files_of_patterns_and_of_held_out_pictures_are_compared_too(refer, tmp_path):
    write_benchmark("reasonseg", tmp_path)
    held = refs_file(tmp_path / "held.json", {1: "val"})
    sources = {
        "questions": {"reader": "reasonseg", "root": str(tmp_path), "split": "val"},
        "refcoco": {**refer, "split": "val", "held_out": True},
    }
    data = {"sources": sources, "prepared": str(tmp_path / "tables"), "held_out": [held]}
    prepare({"data": data, "only": None, "force": False, "workers": 1})
    assert len(open_sources(data)) > 5
    first = sorted((tmp_path / "val").glob("*.json"))[0]
    (tmp_path / "val" / "new.json").write_bytes(first.read_bytes())
    refs_file(tmp_path / "held.json", {1: "val", 2: "val"})
    with pytest.raises(ValueError) as caught:
        open_sources(data)
    lines = str(caught.value).splitlines()
    assert "new.json: new or changed" in lines[1] and "held.json: new or changed" in lines[2]


def test_crowd_regions_of_training_sources_are_no_instances(tmp_path):
    """Of a referring set they are left out of the list; in COCO they leave out their category in that picture."""
    write_benchmark("grefcoco", tmp_path)
    refs, instances = refer_set(lists=True)
    several = next(ref for ref in refs if len(ref["ann_id"]) > 1)
    first = several["ann_id"][0]
    for entry in instances["annotations"]:
        entry["iscrowd"] = int(entry["id"] == first)
    save_json(tmp_path / "grefcoco" / "grefs(unc).json", [{**several, "split": "train"}])
    save_json(tmp_path / "grefcoco" / "instances.json", instances)
    files = {"folder": "grefcoco", "refs": "grefs(unc).json", "image_root": str(tmp_path / "train2014")}
    file = str(tmp_path / "grefcoco" / "instances.json")
    sources = {
        "grefcoco": {"reader": "referring", "root": str(tmp_path), "split": "train", **files},
        "coco": {"reader": "coco_categories", "file": file, "image_root": files["image_root"]},
    }
    grefcoco, coco = open_sources({"sources": sources, "prepared": None}).parts
    assert {len(turn.phrases[0].rles) for turn in grefcoco[0].turns} == {len(several["ann_id"]) - 1}
    asked = {sample.id for sample in (coco[k] for k in range(len(coco)))}
    assert asked == {f"coco/{k}" for k in range(1, LAST + 1)} - {f"coco/{several['image_id']}"}


def test_max_bad_counts_for_each_source_by_itself(monkeypatch):
    def read(count: int, skips: Skips) -> Any:
        for k in range(count):
            with skips.entry("records", Place("x.json", f"[{k}]")):
                raise DataError("bad")
        yield Sample("s", None, 0, 0, (Turn("hello", answer=("Good day.",)),))

    monkeypatch.setitem(READERS, "bad", read)
    data = {"sources": {name: {"reader": "bad", "count": 2} for name in "ab"}, "prepared": None}
    skips = Skips("skip", 2)
    assert len(open_sources(data, skips)) == 2 and skips.counts["records"] == 4
    with pytest.raises(DataError, match="2 bad entries, more than the 1 allowed"):
        open_sources(data, Skips("skip", 1))
