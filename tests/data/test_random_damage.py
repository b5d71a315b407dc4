"""Whatever stands in a published file: samples, or an error that names it; with "skip", sound records are read as ever.

What a record has to do with the rest of its file is found by putting null in its place: turns that are still the same
without it must not change with it, whatever is damaged in it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import (
    gseval_lines,
    reasonseg_entry,
    refer_set,
    release_records,
    saco_set,
    save_json,
    scenes,
    write_benchmark,
    write_refs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_damage import damaged_bytes, damaged_record, scalars

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.coco_instructions import stream_coco_instructions
from instructsam.data.coco_parts import read_coco_parts
from instructsam.data.gseval import read_gseval
from instructsam.data.reasonseg import read_reasonseg
from instructsam.data.referring import read_referring
from instructsam.data.release_eval import LAYOUTS, read_release_eval
from instructsam.data.saco import read_saco
from instructsam.errors import KINDS
from instructsam.structures import Sample

pytestmark = pytest.mark.slow

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Content = dict[str, list[Any]]  # records by the name of their list


@dataclass(frozen=True)
class Format:
    """A published format with a valid small set.

    Attributes:
        make: writes its pictures below a folder and returns the records.
        write: writes the records.
        read: all samples.
        fatal: a list, and a damaged record of it that keeps the whole file from being read: nobody can tell then what
            else is to be read.
    """

    make: Callable[[Path], Content]
    write: Callable[[Path, Content], None]
    read: Callable[[Path, Skips], list[Sample]]
    fatal: Callable[[str, Any], bool] = lambda part, record: False


def _benchmark(name: str, content: Callable[[], Content]) -> Callable[[Path], Content]:
    def make(folder: Path) -> Content:
        write_benchmark(name, folder)
        return content()

    return make


# ---- formats --------------------------------------------------------------------------------------------------------


def referring(lists: bool) -> Format:
    folder, file = ("grefcoco", "grefs(unc).json") if lists else ("refcoco", "refs(unc).p")

    def content() -> Content:
        refs, instances = refer_set(lists)
        return {"refs": refs, "images": instances["images"], "annotations": instances["annotations"]}

    def write(root: Path, content: Content) -> None:
        instances = {key: content[key] for key in ("images", "annotations")}
        write_refs(root / folder, file, content["refs"], instances)

    def read(root: Path, skips: Skips) -> list[Sample]:
        return read_referring(root, "val", folder, folder, file, root / "train2014", skips).samples

    def without_split(part: str, record: Any) -> bool:
        return part == "refs" and not (isinstance(record, dict) and isinstance(record.get("split"), str))

    return Format(_benchmark(folder, content), write, read, without_split)


def release(layout: str) -> Format:
    def read(root: Path, skips: Skips) -> list[Sample]:
        return read_release_eval(root, "val", "x", layout, "x.json", root / "images", skips).samples

    written = {"reasonseg": "reasonseg_release", "grefcoco": "grefcoco_release"}.get(layout, layout)
    return Format(
        _benchmark(written, lambda: {"records": release_records(layout)}),
        lambda root, content: save_json(root / "x.json", content["records"]),
        read,
    )


def write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def read_lines(root: Path, skips: Skips) -> list[Sample]:
    classes = {0: "stuff", 1: "part", 2: "multi", 3: "single"}
    return read_gseval(root, "test", "gseval", "x.jsonl", root / "images", classes, skips).samples


def make_questions(root: Path) -> Content:
    write_benchmark("reasonseg", root)
    return {"files": [reasonseg_entry(scene, number % 2 == 0) for number, scene in enumerate(scenes())]}


def write_questions(root: Path, content: Content) -> None:
    for scene, entry in zip(scenes(), content["files"], strict=True):
        save_json(root / "val" / f"{scene.name}.json", entry)


def make_own(root: Path) -> Content:
    write_benchmark("coco_instructions", root)
    coco = json.loads((root / "val" / "instances.json").read_text())
    lines = map(json.loads, (root / "val" / "instructions.jsonl").read_text().splitlines())
    return {**coco, "lines": list(lines)}


def write_own(root: Path, content: Content) -> None:
    save_json(root / "val" / "instances.json", {key: content[key] for key in ("images", "annotations")})
    write_lines(root / "val" / "instructions.jsonl", content["lines"])


def make_parts(root: Path) -> Content:
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": 20, "width": 40, "neg_category_ids": []} for i in (1, 2, 3, 4)
    ]
    annotations = []
    for identity, image, category, owner in [
        (11, 1, 60, 11), (12, 1, 60, 12), (13, 1, 500, 11), (14, 1, 500, 12), (15, 1, 501, 12), (21, 2, 60, 21),
        (22, 2, 500, 21), (31, 3, 40, 31), (32, 3, 510, 31), (41, 4, 60, 41), (42, 4, 501, 41),
    ]:  # fmt: skip
        x = identity % 10 * 5
        polygon = [x, 2, x + 3, 2, x + 3, 9, x, 9]
        entry = {"id": identity, "image_id": image, "category_id": category, "iscrowd": 0, "obj_ann_id": owner}
        annotations.append({**entry, "segmentation": [polygon], "bbox": [x, 2, 3, 7]})
    return {"images": images, "annotations": annotations}


def write_parts(root: Path, content: Content) -> None:
    names = {60: "mug", 40: "dog", 500: "mug:handle", 501: "mug:inner_body", 510: "dog:ear"}
    categories = [{"id": identity, "name": name} for identity, name in names.items()]
    save_json(root / "parts.json", {**content, "categories": categories})


FORMATS: dict[str, Format] = {
    "referring pickle": referring(lists=False),
    "referring JSON": referring(lists=True),
    **{f"release {layout}": release(layout) for layout in LAYOUTS},
    "gseval": Format(
        _benchmark("gseval", lambda: {"lines": gseval_lines()}),
        lambda root, content: write_lines(root / "x.jsonl", content["lines"]),
        read_lines,
    ),
    "reasonseg": Format(
        make_questions,
        write_questions,
        lambda root, skips: read_reasonseg(root, "val", questions="all", skips=skips).samples,
    ),
    "saco": Format(
        _benchmark("saco", saco_set),
        lambda root, content: save_json(root / "x.json", content),
        lambda root, skips: read_saco(root, "test", "saco", "x.json", root / "images", skips).samples,
    ),
    "coco_instructions": Format(
        make_own, write_own, lambda root, skips: list(stream_coco_instructions(root, "val", skips))
    ),
    "coco_parts": Format(
        make_parts, write_parts, lambda root, skips: list(read_coco_parts(root / "parts.json", root, "p", skips=skips))
    ),
}


# ---- the property ---------------------------------------------------------------------------------------------------

Turns = dict[tuple[str, str, str], Any]


def turns_of(samples: list[Sample]) -> Turns:
    """All that is asked, by sample, id and words."""
    return {
        (sample.id, turn.id, turn.instruction): (sample.image, sample.height, sample.width, turn)
        for sample in samples
        for turn in sample.turns
    }


def check(samples: list[Sample]) -> None:
    """What holds for every sample, whatever it was read from."""
    for sample in samples:
        assert sample.turns and sample.height * sample.width <= masks.MAX_PIXELS
        for turn in sample.turns:
            (turn.instruction + "".join(phrase.text for phrase in turn.phrases) + str(sample.image)).encode()
            assert turn.instruction.strip() and turn.phrases
            rles = [rle for phrase in turn.phrases for rle in phrase.rles]
            assert (masks.areas(masks.check_rles(rles, sample.height, sample.width)) > 0).all()


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".p"))


@pytest.fixture(scope="module", params=FORMATS)
def small_set(request, tmp_path_factory) -> tuple[Format, Path, Content, dict[tuple[str, int], set[Any]], Turns]:
    """A format with its folder, its records, what depends on each of them, and all that is asked."""
    one, folder = FORMATS[request.param], tmp_path_factory.mktemp("damaged")
    content = one.make(folder)
    for path in data_files(folder):  # the fixture may name them otherwise
        path.unlink()
    one.write(folder, content)
    whole = turns_of(one.read(folder, Skips()))
    assert len(whole) >= 4
    depending = {}
    for part, records in content.items():
        for index, record in enumerate(records):
            if one.fatal(part, None):  # then what it says itself, and no other says it
                ids = {str(sentence["sent_id"]) for sentence in record["sentences"]}
                depending[part, index] = {key for key in whole if key[1].rsplit("/", 1)[-1] in ids}
                continue
            one.write(folder, {**content, part: [*records[:index], None, *records[index + 1 :]]})
            left = turns_of(one.read(folder, Skips("skip")))
            depending[part, index] = {key for key, value in whole.items() if left.get(key) != value}
    return one, folder, content, depending, whole


@given(data=st.data())
@RELAXED
def test_damage_to_a_record(small_set, data):
    one, folder, content, depending, whole = small_set
    part = data.draw(st.sampled_from(sorted(content)))
    index = data.draw(st.integers(0, len(content[part]) - 1))
    before = content[part][index]
    after = damaged_record(data.draw, before)
    one.write(folder, {**content, part: [*content[part][:index], after, *content[part][index + 1 :]]})
    try:
        strict = one.read(folder, Skips())
    except ValueError as error:
        strict = None
        assert str(folder) in str(error)
    problems: list[Any] = []
    try:
        found = one.read(folder, Skips("skip", report=problems.append))
    except ValueError as error:
        assert one.fatal(part, after), error
        assert str(folder) in str(error)
        return
    check(found)
    assert strict is None or (strict == found and not problems)
    assert {problem.kind for problem in problems} <= KINDS.keys()
    # It may now be taken for another record, name another one, or say another size of the same picture.
    named = {value for value in (*scalars(before), *scalars(after)) if isinstance(value, str) or abs(value) < 2**64}
    hurt = set(depending[part, index])
    for (other, place), turns in depending.items():
        record = content[other][place]
        if any(record.get(key) in named for key in ("id", "idx", "image", "image_path", "file_name") if key in record):
            hurt |= turns
    left = turns_of(found)
    for key, value in whole.items():
        assert key in hurt or left.get(key) == value, (part, index, after)


@given(data=st.data())
@RELAXED
def test_damage_to_bytes(small_set, data):
    one, folder, content, _, _ = small_set
    one.write(folder, content)
    file = data.draw(st.sampled_from(data_files(folder)))
    file.write_bytes(damaged_bytes(data.draw, file.read_bytes()))
    for skips in (Skips(), Skips("skip")):
        try:
            check(one.read(folder, skips))
        except ValueError as error:
            assert str(folder) in str(error)


def test_the_damage_reaches_every_list():
    """Nothing of a record is spared, and a damaged copy leaves the record as it was."""
    record = {"a": [1, {"b": "c"}], "d": None}
    original, seen = copy.deepcopy(record), set()

    @given(st.data())
    @settings(max_examples=200)
    def look(data: Any) -> None:
        changed = damaged_record(data.draw, record)
        if isinstance(changed, dict):
            seen.update(key for key in record if changed.get(key, ...) != record[key])

    look()
    assert record == original and seen == set(record)
