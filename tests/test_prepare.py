"""The command that writes tables: what it prints, what it leaves alone, what survives a failure or a kill."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from benchmark_fixtures import save_json, write_benchmark

from instructsam.data.leakage import coco_id
from instructsam.data.sources import READERS, open_sources
from instructsam.data.table import SampleTable
from instructsam.lock import exclusive
from instructsam.prepare import prepare
from instructsam.structures import PhraseTarget, Sample, Turn


def settings_of(data: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"data": data, "only": None, "force": False, "workers": 1, **others}


@pytest.fixture
def own(world, tmp_path) -> dict[str, Any]:
    """Two sources from the tiny world."""
    files = {"reader": "coco_instructions", "root": str(world)}
    sources = {
        split: {**files, "split": split, "needs": [f"{world}/{split}/instances.json"]} for split in ("train", "val")
    }
    return {"name": "own", "prepared": str(tmp_path / "prepared"), "sources": sources}


@pytest.fixture
def sharing(tmp_path) -> dict[str, Any]:
    """Referring sets about the same five pictures, of which another set has 1 and 2 in its validation split."""
    for name in ("refcoco", "refcocog"):
        write_benchmark(name, tmp_path)
    save_json(tmp_path / "held.json", [{"image_id": k, "split": "val" if k < 3 else "train"} for k in range(1, 6)])
    files = {"reader": "referring", "root": str(tmp_path), "image_root": str(tmp_path / "train2014"), "split": "val"}
    refcoco, refcocog = ({"folder": f"refcoco{g}", "refs": f"refs({who}).p"} for g, who in (("", "unc"), ("g", "umd")))
    sources = {
        "guarded": {**files, **refcoco, "held_out": True},
        "other_pictures": {**files, **refcocog, "split": "train", "held_out": True},
        "unguarded": {**files, **refcocog},
    }
    return {"prepared": str(tmp_path / "prepared"), "held_out": [str(tmp_path / "held.json")], "sources": sources}


def make(count: int) -> list[Sample]:
    return [
        Sample(f"s{k}", Path(f"{k:012d}.jpg"), 4, 4, (Turn("x", (PhraseTarget("x"),), "no-target"),))
        for k in range(count)
    ]


# ---- the command ----------------------------------------------------------------------------------------------------


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    return forked.run(["-m", "instructsam.prepare", *overrides])


@pytest.mark.multiprocess
def test_the_command_prepares_and_leaves_alone(world, tmp_path):
    overrides = ["data=tiny_world", f"data.root={world}", f"data.prepared={tmp_path / 'p'}"]
    first = command(*overrides)
    assert first.returncode == 0, first.stderr
    assert "tiny_world: 12 samples, " in first.stdout and "up to date" not in first.stdout
    second = command(*overrides)
    assert "tiny_world: up to date (12 samples)" in second.stdout
    assert len(SampleTable(tmp_path / "p" / "tiny_world")) == 12


@pytest.mark.multiprocess
def test_the_command_fails_with_one_line(world, tmp_path):
    overrides = ["data=tiny_world", f"data.root={tmp_path}", f"data.prepared={tmp_path / 'p'}"]
    failed = command(*overrides)
    assert failed.returncode == 1 and failed.stderr.startswith("error: 1 sources lack files:")
    assert "Traceback" not in failed.stderr and not (tmp_path / "p").exists()


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_tables_hold_what_the_files_say(own, capsys):
    manifests = prepare(settings_of(own))
    read, prepared = open_sources({**own, "prepared": None}), open_sources(own)
    assert [prepared[k] for k in range(len(prepared))] == [read[k] for k in range(len(read))]
    assert list(manifests) == ["train", "val"] and manifests["train"]["counts"]["samples"] == 12
    counts = manifests["train"]["counts"]
    lines = capsys.readouterr().out.splitlines()
    words = f"{counts['turns']} turns, {counts['masks']} masks, {counts['no_target']} no-target"
    assert lines[0].startswith(f"train: 12 samples, {words}; ")
    assert lines[-1].split()[:2] == ["total", "18"]


def test_pictures_of_other_splits_are_left_out_and_counted(sharing, capsys):
    unguarded = {name: {**source, "held_out": False} for name, source in sharing["sources"].items()}
    everything = open_sources({**sharing, "prepared": None, "sources": unguarded})
    about = [coco_id(everything[k].image) for k in range(len(everything.parts[0]))]
    assert set(about) == {1, 2, 3, 4}
    manifests = prepare(settings_of(sharing))
    tables = {name: SampleTable(Path(sharing["prepared"]) / name) for name in manifests}
    pictures = {name: {coco_id(table[k].image) for k in range(len(table))} for name, table in tables.items()}
    assert pictures == {"guarded": {3, 4}, "other_pictures": {5}, "unguarded": {1, 2, 3, 4}}
    left_out = {name: manifest["info"]["held_out"] for name, manifest in manifests.items()}
    none, dropped = {"samples": 0, "pictures": 0, "unknown": 0}, sum(picture < 3 for picture in about)
    assert left_out == {
        "guarded": {"samples": dropped, "pictures": 2, "unknown": 0},
        "other_pictures": none,
        "unguarded": none,
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 pictures of validation and test splits, from 1 files"
    assert f"left out {dropped} samples about 2 pictures of validation and test splits" in lines[1]
    assert not any("left out" in line for line in lines[2:4])
    assert lines[4].split()[6:8] == ["held", "out"] and [line.split()[6] for line in lines[5:]] == ["2", "0", "0", "2"]
    assert (
        Path(sharing["held_out"][0]).stat().st_mtime_ns in manifests["guarded"]["info"]["files"][sharing["held_out"][0]]
    )


def test_a_picture_of_several_samples_is_counted_once(sharing, monkeypatch):
    samples = [dataclasses.replace(sample, id=f"{sample.id}/{n}") for sample in make(6) for n in range(3)]
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter(samples))
    sharing["sources"] = {"listed": {"reader": "listed", "held_out": True}}
    manifest = prepare(settings_of(sharing))["listed"]
    assert (
        manifest["info"]["held_out"] == {"samples": 6, "pictures": 2, "unknown": 0}
        and manifest["counts"]["samples"] == 12
    )


def test_up_to_date_means_settings_and_files(own, world, monkeypatch, capsys):
    first = prepare(settings_of(own))
    folder = Path(own["prepared"])

    def made(data: dict[str, Any], **others: Any) -> set[str]:
        """Names of the tables that a run makes anew."""
        before = {path.name: path.stat().st_ino for path in folder.iterdir()}
        prepare(settings_of(data, **others))
        return {path.name for path in folder.iterdir() if before.get(path.name) != path.stat().st_ino}

    assert made(own) == set()
    assert "train: up to date (12 samples)" in capsys.readouterr().out
    assert made(own, force=True, only=["val"]) == {"val"}
    repeated = {**own, "sources": {name: {**entry, "repeats": 4} for name, entry in own["sources"].items()}}
    assert made(repeated) == set()
    changed = {**own, "sources": {**own["sources"], "val": {**own["sources"]["val"], "form": "phrase"}}}
    assert made(changed) == {"val"} and made(own) == {"val"}
    instances = world / "train" / "instances.json"
    times = instances.stat()
    try:
        os.utime(instances, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        assert made(own) == {"train"}
    finally:
        os.utime(instances, ns=(times.st_atime_ns, times.st_mtime_ns))
    shard = folder / "train" / first["train"]["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert made(own) == {"train"}
    SampleTable(folder / "train").verify()


def test_only_some_sources(own):
    assert list(prepare(settings_of(own, only=["val"]))) == ["val"]
    assert list(prepare(settings_of(own, only="train"))) == ["train"]
    with pytest.raises(ValueError, match="only: no source .test.; there are train, val"):
        prepare(settings_of(own, only=["val", "test"]))


@pytest.mark.slow
def test_sources_are_read_side_by_side(own):
    alone = prepare(settings_of(own))
    together = prepare(settings_of(own, workers=2, force=True))
    assert {name: manifest["shards"] for name, manifest in alone.items()} == {
        name: manifest["shards"] for name, manifest in together.items()
    }
    assert list(prepare(settings_of(own, workers=None))) == ["train", "val"]  # one a core
    for workers in (0, -1, "2", True):
        with pytest.raises(ValueError, match=f"workers={workers}: must be a whole number of at least 1, or null"):
            prepare(settings_of(own, workers=workers))


def test_an_unexpected_number_of_samples_is_told(own, capsys):
    own["sources"]["train"]["expected"] = 13
    own["sources"]["val"]["expected"] = 6
    for _ in range(2):  # the second time it is up to date
        prepare(settings_of(own))
        assert capsys.readouterr().err.splitlines() == ["warning: train: 12 samples, expected 13"]


def test_pictures_that_cannot_be_told_from_held_out_ones_are_told(sharing, monkeypatch, capsys):
    other = dataclasses.replace(make(1)[0], id="other", image=Path("dog.jpg"))
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter([*make(6), other]))
    sharing["sources"] = {"listed": {"reader": "listed", "held_out": True}}
    manifest = prepare(settings_of(sharing))["listed"]
    assert manifest["info"]["held_out"] == {"samples": 2, "pictures": 2, "unknown": 1}
    assert "warning: kept 1 samples though their pictures' names give no COCO id" in capsys.readouterr().out
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter([other]))
    with pytest.raises(ValueError, match="listed: held_out is true, but no picture of listed is named by a COCO id"):
        prepare(settings_of(sharing, force=True))
    with pytest.raises(ValueError, match="^listed: held_out is true, but data.held_out names no file"):
        prepare(settings_of({**sharing, "held_out": []}))


def test_what_cannot_be_used_is_in_the_manifest_and_told(own, tmp_path, capsys):
    def entry(kind: str, shape: list[int]) -> dict[str, Any]:
        return {"type": "phrase", "text": "a cup", "ann_type": kind, "ann": [shape]}

    record = {
        "image": "a.jpg",
        "height": 40,
        "width": 40,
        "annotation": [entry("point", [1, 1]), entry("bbox", [1, 1, 9, 9])],
    }
    save_json(tmp_path / "a.json", [record] * 3)
    own["sources"] = {"a": {"reader": "release_train", "file": f"{tmp_path}/a.json", "image_root": str(tmp_path)}}
    manifest = prepare(settings_of(own))["a"]
    assert manifest["info"]["aside"] == {"point annotations": 3} and manifest["counts"]["turns"] == 3
    assert "; cannot be used: 3 point annotations; " in capsys.readouterr().out


@pytest.mark.multiprocess
def test_tables_that_training_would_not_open_are_not_made(own, world):
    with pytest.raises(ValueError, match="data.prepared is null: training .* give data.prepared=FOLDER"):
        prepare(settings_of({**own, "prepared": None}))
    failed = command("data=tiny_world", f"data.root={world}")
    assert failed.returncode == 1 and failed.stderr.startswith("error: data.prepared is null")


def test_a_table_holds_everything_and_its_readers_take_a_part(own):
    manifests = prepare(settings_of({**own, "limit": 2}))
    assert [manifest["counts"]["samples"] for manifest in manifests.values()] == [12, 6]
    assert [len(part) for part in open_sources({**own, "limit": 2}).parts] == [2, 2]


def test_the_files_of_a_source_without_needs_are_compared(own, world):
    del own["sources"]["train"]["needs"]
    instructions = world / "train" / "instructions.jsonl"
    first = prepare(settings_of(own))["train"]["info"]["files"]
    assert {Path(name).name for name in first} == {"instances.json", "instructions.jsonl"}
    times = instructions.stat()
    try:
        os.utime(instructions, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        assert prepare(settings_of(own))["train"]["info"]["files"] != first
    finally:
        os.utime(instructions, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_sizes_that_no_table_can_hold_cost_their_record_alone(own, tmp_path):
    annotation = [{"type": "phrase", "text": "a cup", "ann_type": "mask", "ann": None}]
    record = {"image": "a.jpg", "height": 40, "width": 40, "annotation": annotation}
    save_json(
        tmp_path / "a.json", [record, {**record, "height": 2**40}, record, {**record, "height": 2**20, "width": 2**20}]
    )
    own["sources"] = {"a": {"reader": "release_train", "file": f"{tmp_path}/a.json", "image_root": str(tmp_path)}}
    with pytest.raises(ValueError, match=r"a.json: \[1\]: 1099511627776x40 pixels are more than a mask can have"):
        prepare(settings_of(own))
    manifest = prepare(settings_of({**own, "on_bad": "skip"}))["a"]
    assert manifest["info"]["skipped"] == {"records": 2} and manifest["counts"]["samples"] == 2


# ---- failures -------------------------------------------------------------------------------------------------------


def test_all_missing_files_are_named_before_anything_is_read(own, tmp_path):
    for name in ("train", "val"):
        own["sources"][name] |= {"needs": [f"{tmp_path}/{name}.json"], "get": f"scripts/{name}.sh"}
    with pytest.raises(ValueError, match=r"2 sources lack files:\n  train: .*train.sh.*\n  val: .*val.json .*val.sh"):
        prepare(settings_of(own))
    assert not Path(own["prepared"]).exists()


def test_a_source_that_fails_does_not_keep_the_others_from_being_made(own, tmp_path, capsys):
    own["sources"] = {"bad": {**own["sources"]["train"], "root": str(tmp_path), "needs": []}, **own["sources"]}
    with pytest.raises(ValueError, match=r"1 of 3 sources could not be prepared:\n  bad: .*instances.json"):
        prepare(settings_of(own))
    assert sorted(path.name for path in Path(own["prepared"]).glob("[!.]*")) == ["train", "val"]


def test_bad_records_follow_the_policy(own, monkeypatch, capsys):
    broken = Sample("broken", Path("x.jpg"), 4, 4, (Turn("half \udc00"),))
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter([*make(2), broken, broken]))
    own["sources"] = {"listed": {"reader": "listed"}}
    with pytest.raises(ValueError, match="listed: broken: text that is not valid Unicode"):
        prepare(settings_of(own))
    with pytest.raises(ValueError, match="2 bad entries, more than the 1 allowed"):
        prepare(settings_of({**own, "on_bad": "skip", "max_bad": 1}))
    manifest = prepare(settings_of({**own, "on_bad": "skip", "max_bad": 2}))["listed"]
    assert manifest["info"]["skipped"] == {"samples": 2} and manifest["counts"]["samples"] == 2
    out = capsys.readouterr().out
    assert "listed: 2 samples, 2 turns, 0 masks, 2 no-target; skipped 2 samples; " in out


def killed(settings: dict[str, Any]) -> None:
    def samples(skips=None):
        yield from make(1000)
        os.kill(os.getpid(), signal.SIGKILL)

    READERS["listed"] = samples
    prepare(settings)


@pytest.mark.multiprocess
def test_a_kill_leaves_the_older_table(own, monkeypatch):
    monkeypatch.setitem(READERS, "listed", lambda skips=None: iter(make(10)))
    own["sources"] = {"listed": {"reader": "listed"}}
    prepare(settings_of(own))
    process = multiprocessing.get_context("fork").Process(target=killed, args=(settings_of(own, force=True),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = Path(own["prepared"])
    assert (folder / ".listed.tmp").exists()  # it was in the middle
    assert len(open_sources(own)) == 10
    prepare(settings_of(own, force=True))
    assert len(open_sources(own)) == 10 and not (folder / ".listed.tmp").exists()


def test_an_interrupt_leaves_nothing_half_written(own, monkeypatch):
    def samples(skips=None):
        yield from make(1000)
        raise KeyboardInterrupt

    monkeypatch.setitem(READERS, "listed", samples)
    own["sources"] = {"listed": {"reader": "listed"}}
    with pytest.raises(KeyboardInterrupt):
        prepare(settings_of(own))
    assert [path.name for path in Path(own["prepared"]).iterdir()] == [".locks"]


def test_one_process_at_a_time_makes_a_table(own):
    with exclusive(Path(own["prepared"]) / ".locks" / "train"):
        with pytest.raises(ValueError, match=r"1 of 2 .*\n  train: .*train: another process is at work there"):
            prepare(settings_of(own))
        assert list(prepare(settings_of(own, only=["val"]))) == ["val"]
