"""Scripts that fetch data: what they call, that they do it once, and what their check says of small trees."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import refer_set, save_json, write_refs

SCRIPTS = Path(__file__).parents[1] / "scripts" / "prepare"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.sh") if path.stem != "common")

# What stands in for the commands of the same name. Each writes down how it was called.
CURL = """
url="${@: -1}"
while [ "$1" != -o ]; do shift; done
case "$url" in $FAILING) echo half >>"$2"; exit 22 ;; esac
echo whole >"$2"
"""
UNZIP = 'mkdir -p "$5"\n'  # unzip -q -o ARCHIVE -d FOLDER
TAR = ""
HF = """
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2/somewhere" && cp -r "$HUB"/. "$2/somewhere"
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout with nothing but the scripts."""
    shutil.copytree(SCRIPTS, tmp_path / "checkout" / "scripts" / "prepare")
    return tmp_path / "checkout"


@pytest.fixture
def run(tree, tmp_path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Run a script of the tree with pretended commands, and tell which of them it called how."""
    commands, log = tmp_path / "commands", tmp_path / "log"
    commands.mkdir()
    for name, body in {"curl": CURL, "unzip": UNZIP, "tar": TAR, "hf": HF, "checker": 'exit "$CHECKED"'}.items():
        (commands / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$LOG"\n{body}\n')
        (commands / name).chmod(0o755)
    (tmp_path / "hub").mkdir()

    def run(name: str, *arguments: str, failing: str = "nothing", checked: int = 0):
        log.write_text("")
        variables = {"PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(log), "FAILING": failing}
        variables |= {"PYTHON": "checker", "CHECKED": str(checked), "HUB": str(tmp_path / "hub")}
        done = subprocess.run(
            ["bash", str(tree / "scripts" / "prepare" / f"{name}.sh"), *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, log.read_text().splitlines()

    return run


@pytest.fixture
def check(tree, monkeypatch, capsys) -> Callable[..., tuple[int, dict[str, list[str]]]]:
    """Run check.py there: its exit status, and what it prints by the first column."""
    spec = importlib.util.spec_from_file_location("check", SCRIPTS / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tree)

    def check(*groups: str) -> tuple[int, dict[str, list[str]]]:
        monkeypatch.setattr(sys, "argv", ["check.py", *groups])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        rows = [
            [cell.strip() for cell in line.split("  ") if cell.strip()] for line in capsys.readouterr().out.splitlines()
        ]
        return int(stopped.value.code or 0), {row[0]: row[1:] for row in rows if len(row) == 4}

    return check


# ---- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [*NAMES, "common"])
def test_scripts_are_sound_bash(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / f"{name}.sh")], check=True)


def test_every_script_that_a_configuration_names_is_there():
    configs = (SCRIPTS.parents[1] / "configs").rglob("*.yaml")
    named = {line.split("scripts/prepare/")[1].split(".sh")[0] for f in configs for line in f.read_text().splitlines()
             if "scripts/prepare/" in line}  # fmt: skip
    assert named and named <= set(NAMES)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_check_mode_downloads_nothing_and_hands_on_what_the_check_says(name, run, tree):
    for status in (0, 1):
        done, calls = run(name, "--check", checked=status)
        assert done.returncode == status and calls == [f"checker scripts/prepare/check.py {name}"]
    assert not (tree / "data").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_refused(name, run):
    done, calls = run(name, "--chek")
    assert done.returncode == 2 and "usage" in done.stderr and not calls


@pytest.mark.multiprocess
def test_archives_are_downloaded_and_unpacked_once(run, tree):
    done, calls = run("coco")
    assert done.returncode == 0, done.stderr
    site = "http://images.cocodataset.org"
    urls = [call.split()[-1] for call in calls if call.startswith("curl")]
    assert urls == [
        f"{site}/annotations/annotations_trainval2017.zip",
        f"{site}/zips/train2014.zip",
        f"{site}/zips/train2017.zip",
    ]
    assert all("-C -" in call for call in calls if call.startswith("curl"))  # goes on with a part
    assert [call.split()[3] for call in calls if call.startswith("unzip")] == [
        f"data/downloads/{url.rsplit('/')[-1]}" for url in urls
    ]
    assert (tree / "data/downloads/train2014.zip").read_text() == "whole\n"
    assert calls[-1] == "checker scripts/prepare/check.py coco"

    shutil.rmtree(tree / "data/downloads")  # not needed any more
    assert run("coco")[1] == ["checker scripts/prepare/check.py coco"]


@pytest.mark.multiprocess
def test_an_archive_that_was_not_unpacked_to_its_end_is_unpacked_again(run, tree, tmp_path):
    (tmp_path / "commands" / "unzip").write_text('#!/bin/sh\necho "unzip $*" >>"$LOG"\nexit 3\n')
    done, calls = run("lvis")
    assert done.returncode == 3 and calls[-1].startswith("unzip")
    assert run("lvis")[1][-1].startswith("unzip") and not list((tree / "data").rglob(".unpacked-*"))


@pytest.mark.multiprocess
def test_another_address_is_tried_and_parts_of_two_are_not_mixed(run, tree):
    done, calls = run("refer", failing="https://bvisionweb1*")
    assert done.returncode == 0, done.stderr
    refclef = [call for call in calls if call.startswith("curl") and call.endswith("refclef.zip")]
    assert [call.split()[-1].split("/")[2] for call in refclef] == ["bvisionweb1.cs.unc.edu", "web.archive.org"]
    assert (tree / "data/downloads/refclef.zip").read_text() == "whole\n"
    assert "by hand: gRefCOCO" in done.stdout and "data/refer/grefcoco/grefs(unc).json" in done.stdout


@pytest.mark.multiprocess
def test_what_cannot_be_downloaded_stops_the_script_and_goes_on_later(run, tree):
    done, calls = run("lvis", failing="*lvis*")
    assert done.returncode == 2 and "data/downloads/lvis_v1_train.json.zip: no address answered" in done.stderr
    (part,) = (tree / "data/downloads").iterdir()
    done, again = run("lvis")
    assert done.returncode == 0 and str(part.relative_to(tree)) in again[0] and not part.exists()


@pytest.mark.multiprocess
def test_what_is_there_is_not_asked_for_by_hand(run, tree):
    target = tree / "data/lisa_plus/instance.json"
    assert "by hand" in run("lisa", checked=1)[0].stdout
    save_json(target, [])
    done, _ = run("lisa")
    assert "by hand" not in done.stdout and done.returncode == 0


@pytest.mark.multiprocess
def test_reasonseg_s_archives_are_unpacked_where_they_were_put(run, tree):
    archive = tree / "data/downloads/reasonseg/val.zip"
    archive.parent.mkdir(parents=True)
    archive.touch()
    done, calls = run("reasonseg", checked=1)
    assert done.returncode == 1 and "not complete yet" in done.stderr
    assert [call for call in calls if call.startswith("unzip")] == [
        "unzip -q -o data/downloads/reasonseg/val.zip -d data/reasonseg"
    ]


@pytest.mark.multiprocess
def test_the_release_is_downloaded_once_and_linked_by_name(run, tree, tmp_path):
    hub = tmp_path / "hub"
    for name in ("a/refcoco.json", "a/mapillary_1.json", "b/mapillary_2.json", "eval/grefcoco_val.json", "odd.json"):
        save_json(hub / name, [name])
    save_json(hub / "c/refclef.json", [])
    save_json(hub / "d/refclef.json", [])
    done, calls = run("release", checked=1)
    assert done.returncode == 1
    downloads = [call.split() for call in calls if call.startswith("hf")]
    names = ["instructsam_training_eval_data", "Inst2Seg", "Inst2Seg-Bench"]
    assert [call[4] for call in downloads] == [f"CircleRadon/{name}" for name in names]
    assert all(call[1:4] == ["download", "--repo-type", "dataset"] for call in downloads)
    train = tree / "data/instructsam_train"
    assert json.loads((train / "refcoco.json").read_text()) == ["a/refcoco.json"]
    assert sorted(path.name for path in train.glob("mapillary*")) == ["mapillary_1.json", "mapillary_2.json"]
    assert (tree / "data/instructsam_eval/grefcoco_val.json").is_file()
    assert not (train / "refclef.json").exists() and "refclef.json: several of that name" in done.stdout
    assert "lvis_v1_train.json: not found by that name" in done.stdout
    unplaced = [line.strip() for line in done.stdout.splitlines() if line.endswith("odd.json")]
    assert "data/hub/instructsam/somewhere/odd.json" in unplaced
    assert (tree / "data/inst2seg/somewhere").is_dir()

    shutil.rmtree(tree / "data/downloads")  # what is linked does not lie there
    assert (train / "refcoco.json").is_file()
    again, calls = run("release", checked=0)
    assert again.returncode == 0 and calls == ["checker scripts/prepare/check.py release"]


@pytest.mark.multiprocess
def test_a_data_set_that_the_hub_refuses_stops_the_script(run, tree, tmp_path):
    (tmp_path / "commands" / "hf").write_text('#!/bin/sh\necho "hf $*" >>"$LOG"\nexit 1\n')
    for _ in range(2):
        done, calls = run("release")
        assert done.returncode == 2 and "hf auth login" in done.stderr
        assert len(calls) == 1 and "instructsam_training_eval_data" in calls[0]


# ---- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_empty_folder_lacks_everything(check):
    status, rows = check()
    assert status == 1
    paths = ["data/refer/refcoco/refs(unc).p", "data/refer/grefcoco/instances.json", "data/coco/train2014"]
    paths += ["data/coco/annotations/instances_train2017.json", "data/lvis/lvis_v1_train.json", "data/reasonseg/test"]
    paths += ["data/instructsam_train/obj365_phrase*.json", "data/instructsam_train/inst2seg.json"]
    paths += ["data/partimagenet/train.json", "data/objects365/train", "data/roborefit/roborefit_testB.json"]
    paths += ["data/gseval/GroundingSuite-Eval.jsonl", "data/inst2seg/test.json", "data/lisa_plus/instance.json"]
    for path in paths:
        assert rows[path] == ["–", "there", "missing"], path


SETS = {
    "refcoco": ("refcoco", "refs(unc).p", "train val testA testB"),
    "refcoco_plus": ("refcoco+", "refs(unc).p", "train val testA testB"),
    "refcocog": ("refcocog", "refs(umd).p", "train val test"),
    "grefcoco": ("grefcoco", "grefs(unc).json", "train val testA testB"),
}


@pytest.fixture
def refer(tree) -> dict[str, list[dict[str, Any]]]:
    """The four sets, small, with refs in every split; ref k of all is about picture k % 5 + 1."""
    written = {}
    for name, (folder, file, splits) in SETS.items():
        refs, instances = refer_set(lists=file.endswith(".json"))
        for number, ref in enumerate(refs):
            ref["split"] = splits.split()[number % len(splits.split())]
        write_refs(tree / "data/refer" / folder, file, refs, instances)
        written[name] = refs
    return written


@pytest.mark.slow
def test_sentences_are_counted_and_other_numbers_are_wrong(refer, check):
    status, rows = check("refer")
    assert status == 1  # RefCOCO's numbers are known
    for name, refs in refer.items():
        for split in SETS[name][2].split():
            count = sum(len(ref["sentences"]) for ref in refs if ref["split"] == split)
            known = {"val": "10,834", "testA": "5,657", "testB": "5,059"}.get(split) if name == "refcoco" else None
            assert rows[f"{name} {split} (sentences)"] == [str(count), known or "–", "WRONG" if known else "ok"]


@pytest.mark.slow
def test_the_right_number_of_sentences_is_ok(refer, check, tree):
    refs = []
    for split, count in {"val": 10834, "testA": 5657, "testB": 5059}.items():
        refs.append({"split": split, "image_id": 1, "sentences": [{"sent": "left", "sent_id": 0}] * count})
    (tree / "data/refer/refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    status, rows = check("refer")
    assert status == 0 and rows["refcoco val (sentences)"] == ["10,834", "10,834", "ok"]


@pytest.mark.slow
@pytest.mark.parametrize("contents", [b"no pickle", pickle.dumps({"a": 1}), pickle.dumps([{"split": 3}])])
def test_files_that_cannot_be_read_are_wrong_with_the_reason(refer, check, tree, contents):
    (tree / "data/refer/refcoco/refs(unc).p").write_bytes(contents)
    status, rows = check("refer")
    found, expected, state = rows["refcoco testA (sentences)"]
    assert (status, expected, state) == (1, "5,657", "WRONG") and "cannot be read" in found and "refs(unc).p" in found
    assert rows["grefcoco val (sentences)"][2] == "ok"


def test_reasonseg_s_pictures_are_counted(check, tree):
    counts = {"train": 239, "val": 200, "test": 779}
    for split, count in counts.items():
        folder = tree / "data/reasonseg" / split
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").touch()
            (folder / f"{number}.json").touch()
    status, rows = check("reasonseg")
    assert status == 0 and len(rows) == 4
    (tree / "data/reasonseg/val/7.jpg").unlink()
    status, rows = check("reasonseg")
    assert status == 1 and rows["reasonseg val (pictures with questions)"] == ["199", "200", "WRONG"]
    assert rows["reasonseg test (pictures with questions)"] == ["779", "779", "ok"]


def test_parts_and_first_pictures_of_the_release(check, tree):
    train, images = tree / "data/instructsam_train", tree / "data/images"
    for number in range(4):
        save_json(train / f"mapillary{number}.json", [])
    for number in range(11):
        save_json(train / f"obj365_phrase_{number:02}.json", [])
    save_json(train / "refcoco.json", [{"image": f"coco/{number}.jpg"} for number in range(30)] + [{"image": None}])
    (images / "coco").mkdir(parents=True)
    for number in range(19):
        (images / f"coco/{number}.jpg").touch()
    save_json(tree / "data/instructsam_eval/reasonseg_val.json", [{}] * 200)
    status, rows = check("release")
    assert status == 1
    assert rows["data/instructsam_train/mapillary*.json (files)"] == ["4", "5", "WRONG"]
    assert rows["data/instructsam_train/obj365_phrase*.json (files)"] == ["11", "11", "ok"]
    assert rows["data/instructsam_train/refcoco.json"] == ["there", "there", "ok"]
    pictures = rows["data/instructsam_train/refcoco.json: pictures of the first 20 records"]
    assert pictures == ["19 (none at data/images/coco/19.jpg)", "20", "missing"]
    assert rows["reasonseg_release val (records)"] == ["200", "200", "ok"]


def test_held_out_pictures_of_training_sets_are_counted(refer, check, tree):
    """Ids as the sets have them: 1 to 5; COCO's file has some of these and others."""
    held_out = {ref["image_id"] for refs in refer.values() for ref in refs if ref["split"] != "train"}
    train = {ref["image_id"] for ref in refer["refcoco"] if ref["split"] == "train"}
    assert held_out
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (1, 2, 77)]
    save_json(tree / "data/coco/annotations/instances_train2017.json", {"images": images, "annotations": []})
    urls = [{"id": number, "coco_url": f"http://host/train2017/{number:012}.jpg"} for number in (3, 88)]
    save_json(tree / "data/lvis/lvis_v1_train.json", {"annotations": [], "images": urls})
    save_json(tree / "data/lisa_plus/instance.json", [{"img_path": "x/000000000001.jpg"}] * 2)
    save_json(
        tree / "data/instructsam_train/refcoco.json", [{"image": "COCO_train2014_000000000002.jpg"}, {"image": None}]
    )
    status, rows = check("leakage")
    assert status == 1  # other files are not there
    assert rows["data/instructsam_train/inst2seg.json"][2] == "missing"

    def dropped(*ids: int) -> str:
        return f"{len(held_out.intersection(ids))} of {len(ids)}"

    expected = {
        "originals: coco": dropped(1, 2, 77),
        "originals: lvis": dropped(3, 88),
        "originals: lisa_plus": dropped(1),
        "stage1: refcoco": dropped(2),
        "originals: refcoco": dropped(*train),
    }
    for name, found in expected.items():
        assert rows[f"{name}: pictures to be left out"] == [found, "–", "ok"]
    own = {ref["image_id"] for ref in refer["refcocog"] if ref["split"] != "train"}
    assert rows["data/refer/refcocog/refs(umd).p: pictures held out"] == [str(len(own)), "–", "ok"]
    assert rows["pictures held out, all sets together"] == [str(len(held_out)), "–", "ok"]


def test_unknown_names_are_refused(check, capsys):
    status, _ = check("refcoco")
    assert status == 2
