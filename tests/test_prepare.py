"""The command that writes tables: what it prints, what it leaves alone, what survives a failure or a kill."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import save_json, write_benchmark

from instructsam.data.leakage import coco_id
from instructsam.data.sources import READERS, open_sources
from instructsam.data.table import SampleTable
from instructsam.prepare import prepare
from instructsam.structures import PhraseTarget, Sample, Turn
from instructsam.training.lock import exclusive


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
    return subprocess.run(
        [sys.executable, "-m", "instructsam.prepare", *overrides], capture_output=True, text=True, timeout=60
    )


def test_the_command_prepares_and_leaves_alone(world, tmp_path):
    overrides = ["data=tiny_world", f"data.root={world}", f"data.prepared={tmp_path / 'p'}"]
    first = command(*overrides)
    assert first.returncode == 0, first.stderr
    assert "tiny_world: 12 samples, " in first.stdout and "up to date" not in first.stdout
    second = command(*overrides)
    assert "tiny_world: up to date (12 samples)" in second.stdout
    assert len(SampleTable(tmp_path / "p" / "tiny_world")) == 12


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
    everything = open_sources({**sharing, "prepared": None, "held_out": []})
    about = [coco_id(everything[k].image) for k in range(len(everything.parts[0]))]
    assert set(about) == {1, 2, 3, 4}
    manifests = prepare(settings_of(sharing))
    tables = {name: SampleTable(Path(sharing["prepared"]) / name) for name in manifests}
    pictures = {name: {coco_id(table[k].image) for k in range(len(table))} for name, table in tables.items()}
    assert pictures == {"guarded": {3, 4}, "other_pictures": {5}, "unguarded": {1, 2, 3, 4}}
    left_out = {name: manifest["info"]["held_out"] for name, manifest in manifests.items()}
    none, dropped = {"samples": 0, "pictures": 0}, sum(picture < 3 for picture in about)
    assert left_out == {"guarded": {"samples": dropped, "pictures": 2}, "other_pictures": none, "unguarded": none}
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
    assert manifest["info"]["held_out"] == {"samples": 6, "pictures": 2} and manifest["counts"]["samples"] == 12


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


def test_sources_are_read_side_by_side(own):
    alone = prepare(settings_of(own))
    together = prepare(settings_of(own, workers=2, force=True))
    assert {name: manifest["shards"] for name, manifest in alone.items()} == {
        name: manifest["shards"] for name, manifest in together.items()
    }
    with pytest.raises(ValueError, match="workers=0"):
        prepare(settings_of(own, workers=0))


def test_an_unexpected_number_of_samples_is_told(own, capsys):
    own["sources"]["train"]["expected"] = 13
    own["sources"]["val"]["expected"] = 6
    for _ in range(2):  # the second time it is up to date
        prepare(settings_of(own))
        assert capsys.readouterr().err.splitlines() == ["warning: train: 12 samples, expected 13"]


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
