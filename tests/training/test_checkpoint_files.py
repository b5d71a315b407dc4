"""Folders of checkpoints: whole or invisible, damage found, the right ones kept, whenever the process is killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from instructsam import files
from instructsam.training import checkpoint_files
from instructsam.training.checkpoint_files import (
    BEST_FILE,
    FOLDER,
    FORMAT,
    STATE_FILE,
    clean,
    find_damage,
    fingerprint_differences,
    forget_best_after,
    latest,
    list_checkpoints,
    note_best,
    path_of,
    prune,
    publish,
    read_best,
    read_state,
    remove,
    write_state,
)

STATE = {"step": 5, "samples": 40, "fingerprint": {"lr": 0.1}, "frozen": None, "numbers": {"a": 1e-9}}
FILES = {"weights.safetensors": b"weights " * 20, "rng.pt": b"random"}


def write(folder: Path, step: int) -> Path:
    """An unfinished checkpoint with everything in it."""
    temporary = path_of(folder, step).with_name(path_of(folder, step).name + ".tmp")
    temporary.mkdir(parents=True)
    for name, content in FILES.items():
        (temporary / name).write_bytes(content)
    write_state(temporary, {**STATE, "step": step})
    return temporary


def save(folder: Path, step: int) -> Path:
    publish(write(folder, step), path_of(folder, step))
    return path_of(folder, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).iterdir())


# ---------------------------------------------------------------------- reading


def test_state_comes_back_as_it_was(tmp_path):
    state = read_state(save(tmp_path, 7))
    files = state.pop("files")
    assert state == {"format": FORMAT, **STATE, "step": 7}
    assert {name: entry["bytes"] for name, entry in files.items()} == {k: len(v) for k, v in FILES.items()}


def test_order_is_by_number_not_by_name(tmp_path):
    save(tmp_path, 1_000_000)
    save(tmp_path, 999_999)
    assert latest(tmp_path).name == "step_1000000"
    prune(tmp_path, 1, 1_000_000)
    assert names(tmp_path) == ["step_1000000"]


def test_no_run_has_no_checkpoint(tmp_path):
    assert latest(tmp_path / "nothing") is None and list_checkpoints(tmp_path) == []
    prune(tmp_path, 1, 5)
    clean(tmp_path)


@pytest.mark.parametrize("name", [*FILES, STATE_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer", "a flipped bit"])
def test_damage_of_any_file_is_found_and_the_older_checkpoint_taken(tmp_path, caplog, name, damage):
    save(tmp_path, 5)
    path = save(tmp_path, 10) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "a flipped bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes({"truncated": content[:-3], "empty": b"", "longer": content + b"x"}[damage])
    found = find_damage(path.parent)
    assert found is not None and name in found
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == path_of(tmp_path, 5)
    assert "step_000010" in caplog.text and found in caplog.text


def test_no_flipped_bit_of_the_state_goes_unseen(tmp_path):
    """Or it changes nothing: it may hit the white space between the values."""
    path = save(tmp_path, 5) / STATE_FILE
    content, before = path.read_bytes(), read_state(path.parent)
    unseen = 0
    for position in range(len(content)):
        for bit in (0, position % 8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            if find_damage(path.parent) is None:
                assert read_state(path.parent) == before
                unseen += 1
    assert unseen < len(content) / 4


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "is not the state of a checkpoint"), ('{"step": 1}', "is not the state")],
)
def test_other_files_in_place_of_the_state(tmp_path, text, message):
    (save(tmp_path, 5) / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_state(path_of(tmp_path, 5))


def test_checkpoint_of_another_version_says_what_to_do(tmp_path, caplog):
    path = save(tmp_path, 5) / STATE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT - 1}))
    message = f"is of format {FORMAT - 1}, this version continues format {FORMAT}: finish the run with the version"
    with pytest.raises(ValueError, match=message):
        read_state(path.parent)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) is None
    assert message in caplog.text


def test_fingerprint_differences_of_nested_settings():
    assert fingerprint_differences({"a": {"b": 1}, "c": {}}, {"a": {"b": 1}, "c": {}}) == []
    assert fingerprint_differences({"a": {"b": 1}}, {"a": {}}) == [
        "a is 'absent' there and {} here",
        "a.b is 1 there and 'absent' here",
    ]
    assert fingerprint_differences({"a": {"b": [1, 2]}, "lr": 0.1}, {"a": {"b": [1, 3]}, "lr": 0.1}) == [
        "a.b is [1, 2] there and [1, 3] here"
    ]


# ---------------------------------------------------------------------- writing, and kills in the middle


class Killed(BaseException):
    """Not an error that anything could handle."""


def kill_at(monkeypatch, owner, name: str, call: int) -> None:
    """Die before the given call (from 1) of a function."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def test_unfinished_checkpoint_is_ignored_then_removed(tmp_path):
    save(tmp_path, 5)
    write(tmp_path, 10)
    assert latest(tmp_path) == path_of(tmp_path, 5)
    assert list_checkpoints(tmp_path) == [path_of(tmp_path, 5)]
    (tmp_path / FOLDER / f"{BEST_FILE}.tmp").write_text("{")
    clean(tmp_path)
    assert names(tmp_path) == ["step_000005"]


def test_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    temporary, done = write(tmp_path, 5), []
    monkeypatch.setattr(checkpoint_files, "_flush_to_disk", lambda path: done.append(path.name))
    rename = Path.rename

    def noted(self, target):
        done.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    publish(temporary, path_of(tmp_path, 5))
    assert set(done[:-2]) == {*FILES, STATE_FILE, temporary.name}
    assert done[-2:] == ["renamed", FOLDER]


def test_damaged_checkpoint_is_replaced_when_the_run_comes_past_it_again(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 10) / "rng.pt").unlink()
    assert latest(tmp_path) == path_of(tmp_path, 5)
    save(tmp_path, 10)
    assert latest(tmp_path) == path_of(tmp_path, 10)
    assert names(tmp_path) == ["step_000005", "step_000010"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_around_the_renames_of_publish_loses_nothing(tmp_path, monkeypatch, damaged, call):
    """With a damaged checkpoint in the place of the new one there are two renames, else one."""
    save(tmp_path, 5)
    if damaged:
        (save(tmp_path, 10) / "rng.pt").unlink()
    temporary, last = write(tmp_path, 10), 2 if damaged else 1
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "rename", call)
        try:
            publish(temporary, path_of(tmp_path, 10))
            assert call > last
        except Killed:
            assert call <= last
    clean(tmp_path)
    assert not list((tmp_path / FOLDER).glob("*.tmp"))
    assert latest(tmp_path) == path_of(tmp_path, 10 if call > last else 5)
    assert find_damage(path_of(tmp_path, 5)) is None
    save(tmp_path, 10)
    assert latest(tmp_path) == path_of(tmp_path, 10)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_while_old_checkpoints_are_removed_leaves_no_half_one(tmp_path, monkeypatch, call):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    removed = []

    def rmtree(path: Path) -> None:
        removed.append(path)
        for number, file in enumerate(sorted(path.iterdir())):
            if len(removed) == call and number == 1:
                raise Killed
            file.unlink()
        path.rmdir()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.shutil, "rmtree", rmtree)
        try:
            prune(tmp_path, 2, 4)
            assert call == 3
        except Killed:
            assert call < 3
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))
    clean(tmp_path)
    prune(tmp_path, 2, 4)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is kept


def test_the_newest_are_kept_and_the_best(tmp_path):
    for step, value in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3), (5, 0.4)):
        save(tmp_path, step)
        note_best(tmp_path, "AP", {"step": step, "metrics": {"AP": value}})
        prune(tmp_path, 2, step)
    assert names(tmp_path) == [BEST_FILE, "step_000002", "step_000004", "step_000005"]
    assert read_best(tmp_path) == {"step": 2, "metric": "AP", "value": 0.9}
    save(tmp_path, 6)
    note_best(tmp_path, "AP", {"step": 6, "metrics": {"AP": 0.95}})
    prune(tmp_path, 2, 6)
    assert names(tmp_path) == [BEST_FILE, "step_000005", "step_000006"], "the one that was best before is gone"


def test_zero_keeps_all(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
        prune(tmp_path, 0, step)
    assert len(list_checkpoints(tmp_path)) == 3


def test_damaged_ones_ahead_of_a_resumed_run_push_out_no_sound_one(tmp_path):
    """Step 10 and 12 are damaged, the run resumes from step 5, and keeps one checkpoint: the one it has just saved."""
    for step in (5, 10, 12):
        save(tmp_path, step)
    for step in (10, 12):
        (path_of(tmp_path, step) / "rng.pt").unlink()
    save(tmp_path, 6)
    prune(tmp_path, 1, 6)
    assert latest(tmp_path) == path_of(tmp_path, 6)
    assert names(tmp_path) == ["step_000006", "step_000010", "step_000012"]
    save(tmp_path, 13)
    prune(tmp_path, 1, 13)
    assert names(tmp_path) == ["step_000013"]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("AP", [0.1, 0.3, 0.2], 2),
        ("AP", [0.3, 0.3], 1),  # the earlier of equals
        ("-error", [0.5, 0.2, 0.4], 2),
        ("AP", [None, -1.0, None], 2),  # not a number: null in the records
        ("-error", [None], None),
    ],
)
def test_best_is_highest_or_lowest(tmp_path, metric, values, best):
    (tmp_path / FOLDER).mkdir()
    name = metric.removeprefix("-")
    for step, value in enumerate(values, start=1):
        note_best(tmp_path, metric, {"step": step, "metrics": {name: value, "other": 9.0}})
    found = read_best(tmp_path)
    assert (found and found["step"]) == best
    assert found is None or found["value"] == values[best - 1], "without the sign"


def test_another_metric_starts_a_new_comparison(tmp_path):
    (tmp_path / FOLDER).mkdir()
    note_best(tmp_path, "AP", {"step": 1, "metrics": {"AP": 0.9, "error": 3.0}})
    note_best(tmp_path, "-error", {"step": 2, "metrics": {"AP": 0.1, "error": 4.0}})
    assert read_best(tmp_path) == {"step": 2, "metric": "-error", "value": 4.0}


def test_a_figure_that_an_evaluation_lacks_is_no_better_one(tmp_path):
    (tmp_path / FOLDER).mkdir()
    note_best(tmp_path, "AP", {"step": 1, "metrics": {"AP": 0.5}})
    note_best(tmp_path, "AP", {"step": 2, "metrics": {"count_error": 2.0}})
    assert read_best(tmp_path) == {"step": 1, "metric": "AP", "value": 0.5}


def test_a_best_that_the_run_has_gone_back_behind_is_forgotten(tmp_path):
    (tmp_path / FOLDER).mkdir()
    note_best(tmp_path, "AP", {"step": 3, "metrics": {"AP": 0.5}})
    checkpoint = path_of(tmp_path, 3)
    checkpoint.mkdir()
    write_state(checkpoint, {"step": 3, "fingerprint": {}})
    forget_best_after(tmp_path, checkpoint)
    assert read_best(tmp_path) is not None
    earlier = path_of(tmp_path, 2)
    earlier.mkdir()
    write_state(earlier, {"step": 2, "fingerprint": {}})
    forget_best_after(tmp_path, earlier)
    assert read_best(tmp_path) is None


def test_best_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / FOLDER).mkdir()
    note_best(tmp_path, "AP", {"step": 1, "metrics": {"AP": 0.1}})
    for owner, name in ((files.os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, 1)
            with pytest.raises(Killed):
                note_best(tmp_path, "AP", {"step": 2, "metrics": {"AP": 0.2}})
        assert read_best(tmp_path) == {"step": 1, "metric": "AP", "value": 0.1}
        clean(tmp_path)
        assert names(tmp_path) == [BEST_FILE]
    note_best(tmp_path, "AP", {"step": 2, "metrics": {"AP": 0.2}})
    assert read_best(tmp_path)["step"] == 2
