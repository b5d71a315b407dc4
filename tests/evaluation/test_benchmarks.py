"""Every benchmark reads a small set in its published shape, asks in its own words and states its conventions."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from benchmark_fixtures import WRITERS, write_benchmark
from tiny_fixtures import CONFIGS, settings_of

from instructsam.evaluation.benchmarks import READERS, expand, load_benchmark
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.runner import EvalItem, make_record
from instructsam.structures import Instance, Prediction

GROUPS = ("referring", "all")
CONCEPT_F1 = {"cgf1", "pmf1", "il_mcc"}
NAMES = sorted(path.stem for path in (CONFIGS / "benchmark").glob("*.yaml"))


def configured(name: str, *overrides: str) -> dict:
    """The settings of ``benchmark=NAME`` with overrides, as the evaluation has them."""
    given = [f"benchmark.root={name}"] if name == "coco_instructions" else []
    return settings_of(f"benchmark/{name}", *given, *overrides)["benchmark"]


def written(name: str, folder: Path, *overrides: str) -> dict:
    choice, *others = write_benchmark(name, folder)
    assert choice == f"benchmark={name}"
    return configured(name, *others, *overrides)


def load(name: str, folder: Path, *overrides: str):
    (single,) = expand(written(name, folder, *overrides))
    return load_benchmark(single)


def truth(item: EvalItem) -> Prediction:
    """The answer that a perfect model gives."""
    rles = [rle for phrase in item.turn.phrases for rle in phrase.rles]
    instances = tuple(Instance(rle, 0.9, (0.0, 0.0, 1.0, 1.0), "x", 0) for rle in rles)
    return Prediction("", ("x",), instances, item.sample.height, item.sample.width)


def test_every_configuration_has_a_small_set_or_is_a_group():
    assert set(NAMES) == set(WRITERS) | set(GROUPS)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_perfect_answer_to_a_small_set_has_perfect_figures(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    assert len(items) >= 5 and len({item.id for item in items}) == len(items)
    assert all(item.sample.image.is_file() for item in items)
    records = [make_record(item, truth(item)) for item in items]
    metrics = evaluate_records(records, min_area=benchmark.min_area)
    for figure in benchmark.headline:
        if figure in metrics["overall"]:
            assert metrics["overall"][figure] == 1 or figure in CONCEPT_F1
        else:
            assert figure in CONCEPT_F1
    assert all(record["text"] for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_items_are_asked_in_the_configured_words_and_keep_their_own(name, tmp_path):
    _, items = load(name, tmp_path, "benchmark.prompt='{text} {0}? {text}'")
    for item in items:
        assert item.turn.instruction == f"{item.text} {{0}}? {item.text}"
    _, plain = load(name, tmp_path, "benchmark.prompt='{text}'")
    assert [item.text for item in items] == [item.turn.instruction for item in plain]


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"tiny_world", "coco_instructions"}))
def test_ids_say_benchmark_and_split(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    assert all(item.id.startswith(f"{benchmark.name}/{benchmark.split}/") for item in items)
    assert [item.id for item in items] == [item.id for item in load(name, tmp_path)[1]]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_conventions_thresholds_and_published_figures_are_stated(name, tmp_path):
    benchmark, items = load(name, tmp_path)
    assert benchmark.threshold == (0.5 if name in ("roborefit", "saco") else 0.3)
    assert benchmark.conventions["kept"] == f"score {'>=' if name == 'saco' else '>'} {benchmark.threshold}"
    assert benchmark.conventions["instructions"].startswith(str(len(items)))
    assert benchmark.conventions["unit"] and "{text}" in benchmark.conventions["prompt"]
    assert all(isinstance(text, str) for text in benchmark.conventions.values())
    for entry in benchmark.published:
        assert entry.keys() - {"kind"} == {"system", "figure", "value"} and 0 < entry["value"] < 1
        assert entry["figure"] in benchmark.headline


def test_published_figures_are_those_of_the_split(tmp_path):
    one = {
        split: {entry["system"]: entry["value"] for entry in load_split("refcoco", split, tmp_path).published}
        for split in ("val", "testA", "testB")
    }
    assert [one[split]["L-DIT-B"] for split in one] == [0.7198, 0.7451, 0.6877]
    assert "SAM 3 agent (Qwen2.5-VL-7B)" in one["val"] and "SAM 3 agent (Qwen2.5-VL-7B)" not in one["testA"]


def load_split(name: str, split: str, folder: Path):
    """A benchmark whose small set was given to another split."""
    import pickle

    settings = written(name, folder, f"benchmark.split={split}")
    path = folder / name / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps([{**ref, "split": split} for ref in refs]))
    return load_benchmark(expand(settings)[0])[0]


def test_an_inclusive_threshold_keeps_a_score_on_it(tmp_path):
    import torch

    saco, _ = load("saco", tmp_path)
    assert torch.tensor(0.5) > saco.keep_above and not torch.tensor(0.4999) > saco.keep_above
    assert math.isclose(saco.keep_above, 0.5, rel_tol=1e-6)
    roborefit, _ = load("roborefit", tmp_path / "r")
    assert roborefit.keep_above == 0.5


def test_reasonseg_s_ignored_pixels_reach_the_records(tmp_path):
    _, items = load("reasonseg", tmp_path)
    for item in items:
        assert make_record(item, truth(item))["ignore_rle"]["size"] == [item.sample.height, item.sample.width]
    assert {item.turn.kind for item in items} == {"short", "long"}


def test_a_limit_spreads_over_the_whole_set_and_warns_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        benchmark, items = load("refcoco", tmp_path, "benchmark.limit=3")
        assert not caplog.records
        whole = load("refcoco", tmp_path)[1]
    assert [item.id for item in items] == [whole[k * len(whole) // 3].id for k in range(3)]
    assert benchmark.conventions["instructions"] == f"3 of {len(whole)}, spread evenly"
    assert "24, but the published split has 10,834" in caplog.text


def test_the_published_number_of_instructions_passes_without_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        benchmark, _ = load("refcoco", tmp_path, "benchmark.expected={val: 24}")
    assert not caplog.records and benchmark.conventions["instructions"] == "24"


def test_what_was_left_out_as_bad_is_stated(tmp_path):
    settings = written("gseval", tmp_path, "benchmark.on_bad=skip")
    path = tmp_path / "GroundingSuite-Eval.jsonl"
    path.write_text(path.read_text() + '{"idx": 99}\n')
    benchmark, items = load_benchmark(expand(settings)[0])
    assert len(items) == 5 and benchmark.conventions["left out as bad"] == "1 instructions"
    with pytest.raises(ValueError, match=r"jsonl:6: "):
        load_benchmark({**settings, "on_bad": "raise"})


# ---- splits and groups --------------------------------------------------------------------------------------------


def asked(settings: dict) -> list[tuple[str, str]]:
    return [(single["name"], single["split"]) for single in expand(settings)]


def test_one_several_and_all_splits():
    assert asked(configured("refcoco")) == [("refcoco", "val")]
    assert asked(configured("refcoco", "benchmark.split=[testB,val]")) == [("refcoco", "testB"), ("refcoco", "val")]
    assert asked(configured("refcocog", "benchmark.split=all")) == [("refcocog", "val"), ("refcocog", "test")]
    assert asked(configured("coco_instructions", "benchmark.split=mine")) == [("coco_instructions", "mine")]


REFERRING = {"refcoco": 3, "refcoco_plus": 3, "refcocog": 2, "grefcoco": 3}
EVERY = {**REFERRING, "reasonseg": 2, "inst2seg": 1, "roborefit": 2, "gseval": 1, "saco": 1}


@pytest.mark.parametrize(("name", "counts"), [("referring", REFERRING), ("all", EVERY)])
def test_groups_ask_every_split_of_every_member(name, counts):
    found = [single for single, _ in asked(configured(name))]
    assert {member: found.count(member) for member in dict.fromkeys(found)} == counts


def test_what_a_group_sets_holds_for_every_member_and_the_rest_stays():
    settings = configured("referring", "benchmark.root=elsewhere", "benchmark.split=val", "benchmark.on_bad=skip")
    singles = expand(settings)
    assert {(single["root"], single["split"], single["on_bad"]) for single in singles} == {("elsewhere", "val", "skip")}
    assert [single["folder"] for single in singles] == ["refcoco", "refcoco+", "refcocog", "grefcoco"]
    assert {single["image_root"] for single in singles} == {"data/coco/train2014"}


def test_a_member_can_be_changed_or_left_out():
    changed = configured("all", "benchmark.members.saco.root=there", "~benchmark.members.gseval")
    roots = {single["name"]: single["root"] for single in expand(changed)}
    assert roots["saco"] == "there" and "gseval" not in roots


def test_a_group_is_read_from_one_root(tmp_path):
    for name in REFERRING:
        write_benchmark(name, tmp_path)
    overrides = [f"benchmark.root={tmp_path}", f"benchmark.image_root={tmp_path / 'train2014'}", "benchmark.split=val"]
    loaded = [load_benchmark(single) for single in expand(configured("referring", *overrides))]
    ids = [item.id for _, items in loaded for item in items]
    assert [benchmark.name for benchmark, _ in loaded] == list(REFERRING) and len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("refcoco", ["benchmark.split=test"], "'refcoco' has no split 'test', only val, testA, testB"),
        ("refcoco", ["benchmark.split=[val,val]"], "asked for more than once: refcoco val"),
        ("refcoco", ["benchmark.split=[]"], "split must be a name, a list of names or 'all'"),
        ("tiny_world", ["benchmark.split=all"], "does not list its splits"),
        ("referring", ["benchmark.split=test"], "'refcoco' has no split 'test'"),
        ("referring", ["+benchmark.colour=red"], "'refcoco' has no setting colour"),
        ("all", ["benchmark.members={}"], None),
    ],
)
def test_splits_and_groups_that_make_no_sense_are_refused(name, overrides, message):
    settings = configured(name, *overrides)
    if message is None:  # Hydra merges an empty mapping, so emptied by hand
        settings["members"], message = {}, "benchmark 'all' has no members"
    with pytest.raises(ValueError, match=message):
        expand(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Segment it."}, "prompt must hold {text}, got 'Segment it.'"),
        ({"prompt": None}, "'gseval': not given: prompt"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1"),
        ({"min_area": -1}, "min_area must be a number of pixels"),
        ({"reader": "voc"}, f"reader 'voc' is none of {', '.join(READERS)}"),
        ({"root": None}, "'gseval': not given: root"),
        ({"refs": "x"}, "'gseval': unknown settings refs"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"on_bad": "ignore"}, "on_bad must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    settings = written("gseval", tmp_path)
    with pytest.raises(ValueError, match=message):
        load_benchmark({**settings, **changes})
