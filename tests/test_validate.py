"""The validate command: planted damage is found, all of it and nothing else; reports, exit status, what it refuses."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from planted_damage import OWN, RELEASE, TALKS, World, plant_all

from instructsam.validate import entry_point, validate


def settings(output: Path, sources: dict[str, Any], **values: Any) -> dict[str, Any]:
    data = {"name": "test", "sources": sources, "prepared": None, "held_out": []}
    own = {"output_dir": str(output), "only": None, "workers": 0, "num_queries": 10}
    return {"data": {**data, **values.pop("data", {})}, **own, **values}


def sources_of(world: World) -> dict[str, Any]:
    return {
        "own": {"reader": "coco_instructions", "root": str(world.root), "split": "train"},
        "release": {"reader": "release_train", "file": str(world.release), "image_root": str(world.pictures)},
    }


def found_in(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def places(entries: list[dict[str, str]]) -> Counter:
    return Counter((entry["source"], entry["kind"], entry["file"], entry["index"]) for entry in entries)


@pytest.mark.slow
def test_all_of_the_planted_damage_is_found_and_nothing_else(tmp_path):
    world = World(tmp_path / "data", images=2500, records=5000)  # two instructions an image: 10,000 records
    planted = plant_all(world, times=2)
    assert len(OWN) + len(RELEASE) + len(TALKS) >= 60 and len({kind for _, kind, _, _ in planted}) >= 20
    report = validate(settings(tmp_path / "out", sources_of(world), workers=2))
    found = places(found_in(tmp_path / "out"))
    assert found - Counter(planted) == Counter(), "reported, but not planted"
    assert Counter(planted) - found == Counter(), "planted, but not reported"
    assert report.total == len(planted) and sum(sum(of.values()) for of in report.by_kind().values()) == len(planted)


def run(monkeypatch: Any, *arguments: object) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["validate", "workers=0", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        entry_point()
    return stop.value.code


def test_the_exit_status_says_what_was_found(world, tmp_path, monkeypatch, capsys):
    asked = [f"data.root={world}", f"output_dir={tmp_path}"]
    assert run(monkeypatch, *asked) == 0
    said = capsys.readouterr().out
    assert "tiny_world: 12 samples" in said and "val: 6 samples" in said and "nothing found" in said
    assert (tmp_path / "validation.jsonl").read_text() == ""
    assert "Nothing found." in (tmp_path / "validation.md").read_text()

    assert run(monkeypatch, *asked, "num_queries=1", "data.too_many_instances=raise") == 1
    said = capsys.readouterr().out
    assert "too many instances: a phrase has more instances" in said
    assert {entry["kind"] for entry in found_in(tmp_path)} == {"too many instances"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root=/nowhere"], "/nowhere/train/instances.json"),
        (["data=coco_instructions"], "not given: data.root=..."),
        (["data=no_such_data"], "no_such_data"),
        (["only=[tiny]"], "no source 'tiny'; there are tiny_world, val"),
        (["workers=-1"], "workers=-1: must be a whole number"),
        (["num_queries=0"], "num_queries=0: must be at least 1"),
        (["no_such_setting=1"], "no_such_setting"),
    ],
)
def test_what_keeps_it_from_running_is_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, f"output_dir={tmp_path / 'out'}", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_that_kills_a_worker_is_named(tmp_path, monkeypatch):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    from instructsam.data.picture_checks import Picture, PictureChecks

    class Dying:
        def submit(self, *_: Any) -> Future:
            done: Future = Future()
            done.set_exception(BrokenProcessPool())
            return done

    checks = PictureChecks(2)
    monkeypatch.setattr(checks, "_pool", Dying())
    with pytest.raises(RuntimeError, match="at one of these 1: huge.png"):
        list(checks.add(Picture("huge.png", 1, 1, "a"))) + list(checks.finish())


def test_only_the_sources_asked_for_are_read(tmp_path):
    world = World(tmp_path / "data", images=8, records=30)
    plant = OWN["empty mask"](world, 4)
    world.write()
    sources = sources_of(world)
    assert validate(settings(tmp_path / "out", sources, only=["release"])).total == 0
    assert validate(settings(tmp_path / "out", sources)).total == 1
    assert places(found_in(tmp_path / "out")) == Counter([("own", *plant)])


@pytest.mark.parametrize("damage", ["RLE overrun", "RLE short", "RLE truncated"])
@pytest.mark.parametrize("source", ["own", "release"])
def test_bad_codes_are_found(tmp_path, source, damage):
    world = World(tmp_path / "data", images=8, records=30)
    plant = {"own": OWN, "release": RELEASE}[source][damage](world, 4)
    world.write()
    assert plant[0] == damage.lower()
    validate(settings(tmp_path / "out", sources_of(world)))
    assert places(found_in(tmp_path / "out")) == Counter([(source, *plant)])


def test_a_file_that_is_cut_off_does_not_keep_others_from_being_read(tmp_path):
    world = World(tmp_path / "data", images=8, records=300)
    world.write()
    world.release.write_text(world.release.read_text()[:-500])
    sources = dict(reversed(sources_of(world).items()))
    report = validate(settings(tmp_path / "out", sources))
    (entry,) = found_in(tmp_path / "out")
    assert entry["kind"] == "json" and entry["source"] == "release" and "release.json" in entry["reason"]
    assert report.notes["own"]["samples"] == 8 and report.notes["release"]["samples"] > 100


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_phrases_that_training_takes_care_of_are_no_problem(world, tmp_path, policy):
    sources = {"own": {"reader": "coco_instructions", "root": str(world), "split": "train"}}
    of = settings(tmp_path, sources, num_queries=1)
    raised = validate({**of, "data": {**of["data"], "too_many_instances": "raise"}})
    noted = validate({**of, "data": {**of["data"], "too_many_instances": policy}})
    assert raised.total > 0 and noted.total == 0
    note = f"phrases of more than 1 instances (training: {policy})"
    assert noted.notes["own"][note] == raised.total and note in (tmp_path / "validation.md").read_text()
    with pytest.raises(ValueError, match="data.too_many_instances='cut' is not one of raise, drop, truncate"):
        validate({**of, "data": {**of["data"], "too_many_instances": "cut"}})


def test_the_limit_is_that_of_training(world, tmp_path):
    sources = {"own": {"reader": "coco_instructions", "root": str(world), "split": "train"}}
    val = {"reader": "coco_instructions", "root": str(world), "split": "val"}
    report = validate(settings(tmp_path, sources, data={"limit": 2, "val": val}))
    assert [notes["samples"] for notes in report.notes.values()] == [2, 6]  # held-out samples are all asked
    with pytest.raises(ValueError, match="data.limit=0: must be at least 1"):
        validate(settings(tmp_path, sources, data={"limit": 0}))


def test_a_source_must_not_take_the_name_of_the_held_out_instructions(world, tmp_path):
    own = {"reader": "coco_instructions", "root": str(world)}
    sources = {"val": {**own, "split": "train"}}
    with pytest.raises(ValueError, match="data.sources.val: that is what data.val is called here"):
        validate(settings(tmp_path, sources, data={"val": {**own, "split": "val"}}))
    assert validate(settings(tmp_path, sources, num_queries=1)).total > 0  # without them it is a name as any other


def test_what_cannot_be_used_and_what_cannot_be_told_are_notes(tmp_path):
    point = {"type": "phrase", "text": "a cup", "ann_type": "point", "ann": [[1, 1]]}
    none = {"type": "phrase", "text": "a cup", "ann_type": "mask", "ann": None}
    record = {"height": 40, "width": 40, "annotation": [point, none]}
    names = [f"{1:012}.jpg", f"{2:012}.jpg", "cup.jpg"]
    (tmp_path / "a.json").write_text(json.dumps([{**record, "image": name} for name in names]))
    (tmp_path / "refs.json").write_text(json.dumps([{"image_id": 1, "split": "val"}]))
    source = {"reader": "release_train", "file": f"{tmp_path}/a.json", "image_root": str(tmp_path), "held_out": True}
    held_out = [str(tmp_path / "refs.json")]
    report = validate(settings(tmp_path / "out", {"a": source}, data={"held_out": held_out}))
    notes = report.notes["a"]
    assert notes["point annotations cannot be used"] == 3
    assert notes["samples left out: their pictures are in a validation or test split"] == 1
    assert notes["samples kept although their pictures' names give no COCO id (held_out is true)"] == 1
    assert {kind for kind, _ in report.counts} == {"image missing"}
