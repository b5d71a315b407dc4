"""What a run writes down and sends to dashboards, read back from the real files; nothing leaves the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from PIL import Image

from instructsam import files
from instructsam.training import tracking as tracking_module
from instructsam.training.meters import Work
from instructsam.training.tracking import Ledger, Tracking, gallery_path, start_dashboards, tracker_names

CONFIG = {"optim": {"lr": 1e-3, "groups": {"new": {"match": ["^a$"]}}}, "seed": 0, "name": None}
START = {"step": 0, "git": {"commit": "c0ffee", "dirty": ["x.py"]}, "overrides": ["optim.lr=1e-3"]}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def record(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "terms": {"mask": loss}, "lr": {"default": 0.1}, "grad_norm": 2.0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_tracking(folder: Path, step: int = 0, names: tuple = (), log_every: int = 1, **options) -> Tracking:
    """Records and dashboards of a run that goes on after `step`."""
    AcceleratorState._reset_state(True)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    accelerator = Accelerator(log_with=list(names) or None, project_config=project)
    tracking = Tracking(folder, accelerator, 100, log_every, False, 5.0, **options)
    tracking.start(step)
    start_dashboards(accelerator, folder, "test", step, CONFIG, START)
    return tracking


def write_gallery(folder: Path, step: int) -> None:
    path = gallery_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(path)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_progress_sums_over_steps_of_different_size(tmp_path, monkeypatch):
    from instructsam.training import meters

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    tracking = open_tracking(tmp_path, log_every=2, peak_flops=1e12)
    for step, samples in enumerate((3, 5, 7, 9), start=1):
        clock.now += 2.0
        work = Work(samples, tokens=10.0 * samples, phrases=samples, flops=1e12, data_seconds=0.5)
        tracking.record_step(record(step, 1.0), samples, step / 10, work, {"default": 0.5, "new": 0.25})
    tracking.close()
    progress = [line for line in lines(tmp_path / "progress.jsonl") if "event" not in line]
    assert [line["step"] for line in progress] == [2, 4]
    assert [line["samples_per_second"] for line in progress] == [2.0, 4.0]
    assert progress[0]["tokens_per_second"] == 20.0 and progress[0]["data_wait"] == 0.25
    assert progress[0]["mfu"] == pytest.approx(0.5) and progress[0]["group_norms"] == {"default": 0.5, "new": 0.25}
    assert any(name.endswith("_gib") for name in progress[0])
    assert lines(tmp_path / "losses.jsonl") == [record(step, 1.0) for step in range(1, 5)], "no more than before"


def test_waiting_for_data_is_said(tmp_path, capsys):
    tracking = open_tracking(tmp_path)
    tracking._wants_bar = True
    tracking.record_step(record(1, 1.0), 4, 0.1, Work(4, data_seconds=1e6))
    tracking.record_step(record(2, 1.0), 4, 0.2, Work(4))
    first, second = capsys.readouterr().out.splitlines()
    assert "100% of the time waiting for data" in first and "waiting" not in second


def test_events_are_recorded_said_and_cut_back(tmp_path, capsys):
    tracking = open_tracking(tmp_path)
    spike = {"step": 3, "event": "spike", "loss": 9.0, "median": 1.0, "sample_ids": ["a"]}
    tracking.record_event(spike)
    tracking.record_event({"step": 5, "event": "skipped_step", "what": "loss", "sample_ids": ["b"]})
    tracking.close()
    assert "step 3: loss 9 after a median of 1; samples: a" in capsys.readouterr().out
    assert len(Ledger(tmp_path / "events.jsonl").read()) == 2
    open_tracking(tmp_path, step=4).close()
    assert lines(tmp_path / "events.jsonl") == [spike]


def test_starts_are_kept(tmp_path):
    for step in (0, 7):
        tracking = open_tracking(tmp_path, step=step)
        tracking.record_start({**START, "step": step})
        tracking.close()
    starts = lines(tmp_path / "starts.jsonl")
    assert [start["step"] for start in starts] == [0, 7] and starts[0]["git"] == START["git"]
    assert starts[0]["time"] <= starts[1]["time"]


def test_the_last_step_is_logged_wherever_it_comes(tmp_path):
    """A run over epochs with budgets only estimates how many steps it will take."""
    tracking = open_tracking(tmp_path, log_every=10)
    for step in range(1, 13):
        tracking.record_step(record(step, 1.0), 4, 0.1, last=step == 12)
    tracking.close()
    assert [line["step"] for line in lines(tmp_path / "progress.jsonl") if "event" not in line] == [10, 12]


@pytest.mark.parametrize("torn", ['{"step": 9, "ti', "\0\0\0"])
def test_a_torn_line_is_cut_before_records_follow(torn, tmp_path):
    for name in ("progress.jsonl", "starts.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n' + torn)
    tracking = open_tracking(tmp_path, step=3)
    tracking.record_start({"step": 3})
    tracking.close()
    for name in ("progress.jsonl", "starts.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == [0, 3]
        assert len(Ledger(tmp_path / name).read()) == 2


def test_cutting_a_ledger_reaches_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    ledger, done = Ledger(tmp_path / "losses.jsonl"), []
    for step in (1, 2, 3):
        ledger.append({"step": step})
    fsync, replace = files.os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    ledger.truncate(2)
    assert done == ["fsync", "replace"] and [line["step"] for line in lines(ledger.path)] == [1, 2]


def test_a_fresh_start_forgets_what_was_recorded_and_nothing_else(tmp_path):
    run_part(tmp_path, 1, 2, (), loss=1.0)
    tracking = open_tracking(tmp_path)
    tracking.record_start(START)
    tracking.close()
    records = {"flops.json", "wandb_id.txt", "test/events.out.tfevents.1.x.1.0"}
    others = {"config.yaml", "samples/mine.png", "test/notes.txt", "other/events.out.tfevents.1.x.1.0"}
    for name in records | others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def present() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    written = {"losses.jsonl", "evaluations.jsonl", "events.jsonl", "progress.jsonl", "starts.jsonl"}
    assert present() == records | others | written | {"samples/step_000002.png"}
    other_rank = Tracking(tmp_path, tracking.accelerator, 100, 1, False, 5.0)
    other_rank.is_main = False
    other_rank.forget("test")
    assert present() > others
    Tracking(tmp_path, tracking.accelerator, 100, 1, False, 5.0).forget("test")
    assert present() == others


# ---- dashboards -----------------------------------------------------------------------------------------------------


def run_part(folder: Path, first: int, last: int, names: tuple, loss: float) -> None:
    """Steps first..last of a run, with an event, and an evaluation with pictures in the end."""
    tracking = open_tracking(folder, first - 1, names)
    for step in range(first, last + 1):
        tracking.record_step(record(step, loss), 4, 0.1, Work(4, tokens=40), {"default": 0.5})
    tracking.record_event({"step": last, "event": "spike", "loss": 9.0, "median": 1.0})
    write_gallery(folder, last)
    tracking.record_evaluation(last, {"mAP": 0.25, "note": "text"})
    tracking.close()


def test_tensorboard_has_curves_pictures_and_configuration(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_part(tmp_path, 1, 4, ("tensorboard",), loss=1.0)
    run_part(tmp_path, 3, 6, ("tensorboard",), loss=2.0)  # killed after 4, resumed from the checkpoint of step 2
    assert [path.name for path in (tmp_path / "test").iterdir() if path.is_dir()] == [], "one run, however many starts"
    events = EventAccumulator(str(tmp_path / "test"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    scalars = set(events.Tags()["scalars"])
    assert {"train/terms/mask", "train/lr/default", "train/grad_norm", "train/grad_norm_of/default"} <= scalars
    assert {"speed/samples_per_second", "speed/tokens_per_second", "speed/data_wait", "eval/mAP"} <= scalars
    assert any(name.startswith("speed/") and name.endswith("_gib") for name in scalars)
    assert events.Scalars("events/spike")[-1].value == 9.0
    (picture,) = [event for event in events.Images("eval/samples") if event.step == 6]
    assert (picture.width, picture.height) == (30, 20)
    texts = {
        name: events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0] for name in ("config", "start")
    }
    assert json.loads(texts["config"]) == CONFIG
    assert json.loads(texts["start"]) == START
    assert all(line.startswith(b"    ") for line in texts["start"].splitlines())


def test_tensorboard_shows_only_the_last_start_from_step_0(tmp_path):
    """A run that was killed before its first checkpoint begins anew, without having been told to."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_part(tmp_path, 1, 4, ("tensorboard",), loss=1.0)
    run_part(tmp_path, 1, 2, ("tensorboard",), loss=2.0)
    events = EventAccumulator(str(tmp_path / "test"), {"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 2.0)]


@pytest.mark.parametrize("damaged", [b"", b"0123", b"\xff" * 16])
def test_a_damaged_run_id_is_made_anew(damaged, tmp_path):
    path = tmp_path / "wandb_id.txt"
    path.write_bytes(damaged)
    identity = tracking_module._wandb_id(tmp_path)
    assert len(identity) == 16 and path.read_text() == identity == tracking_module._wandb_id(tmp_path)
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


@pytest.mark.multiprocess
def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Whoever tried to talk to a server would fail there.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run_part(tmp_path, 1, 2, ("wandb",), loss=1.0)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    identity = (tmp_path / "wandb_id.txt").read_text()
    assert run.name.endswith(identity)
    for _ in range(600):  # another process writes the file
        if (found := read_wandb(run))["complete"]:
            break
        time.sleep(0.1)
    assert found["complete"]
    assert [row["train/loss"] for row in found["history"] if "train/loss" in row] == [1.0, 1.0]
    assert found["history"][-1]["eval/mAP"] == 0.25 and found["history"][-1]["_step"] == 2
    assert found["history"][-1]["eval/samples/_type"] == "images/separated"
    assert found["config"]["optim"] == CONFIG["optim"] and found["config"]["start"]["git"] == START["git"]
    assert list(run.rglob("media/images/eval/samples_*.png"))


def read_wandb(run: Path) -> dict:
    """History rows and configuration in the transaction log of an offline run."""
    from wandb.proto import wandb_internal_pb2

    def nested(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    found: dict = {"history": [], "config": {}, "complete": False}
    (log,) = run.glob("*.wandb")
    for data in leveldb_records(log.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        if message.WhichOneof("record_type") == "history":
            found["history"].append(nested(message.history.item) | {"_step": message.history.step.num})
        elif message.WhichOneof("record_type") == "config":
            found["config"] |= nested(message.config.update)
        elif message.WhichOneof("record_type") == "exit":
            found["complete"] = True
    return found


def leveldb_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: pieces of (checksum 4, length 2, type 1, bytes), none across blocks."""
    at, record = 7, b""  # after W&B's header
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little is left in the block for another piece
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [
        (None, None, "offline"),
        (None, "disabled", "disabled"),
        ("online", "offline", "online"),
        ("offline", "", "offline"),
    ],
)
def test_the_mode_of_wandb_is_the_users_or_offline(setting, variable, mode, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    accelerator = Accelerator()
    accelerator.log_with = ["wandb"]
    seen = {}
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, init_kwargs: seen.update(init_kwargs["wandb"]))
    start_dashboards(accelerator, tmp_path, "test", 0, CONFIG, START, setting)
    assert seen["mode"] == mode and seen["id"] == (tmp_path / "wandb_id.txt").read_text()
    assert ("resume" in seen) == (mode == "online")


def test_names_of_trackers():
    pytest.importorskip("tensorboard")
    assert tracker_names(True, False) == ["tensorboard"] and tracker_names(False, False) == []
