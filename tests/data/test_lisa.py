"""LISA++ data: ids resolved in COCO's instances file, faults named and skipped, damage that never crashes."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_damage import json_values

from instructsam import masks
from instructsam.data.checks import Skips
from instructsam.data.lisa import CROWDS, read_lisa_plus
from instructsam.data.sources import parse_sources, read_source
from instructsam.errors import DataError

HEIGHT, WIDTH = 20, 30


def polygon(x: int, y: int) -> list[list[int]]:
    """A square of 4 x 4 pixels."""
    return [[x, y, x + 4, y, x + 4, y + 4, x, y + 4]]


def runs_of(array: np.ndarray) -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": [0, array.size]}


def coco() -> dict[str, Any]:
    def entry(number: int, image: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "segmentation": segmentation,
            "iscrowd": crowd,
            "bbox": [0, 0, 4, 4],
        }

    crowd = runs_of(np.ones((HEIGHT, WIDTH)))
    return {
        "info": {"year": 2017},
        "annotations": [
            entry(11, 34, 1, polygon(0, 0)),
            entry(12, 34, 1, polygon(10, 10)),
            entry(13, 34, 2, polygon(20, 4)),
            entry(14, 34, 2, crowd, crowd=1),
            entry(21, 35, 2, polygon(1, 2)),
            entry(99, 35, 1, "never asked for, never looked at"),
        ],
        "images": [
            {"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH} for number in (34, 35)
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }


def asked(ids: list[Any], image: str = "train2017/000000000034.jpg", **fields) -> dict[str, Any]:
    return {"English Question": " Which animals sleep? ", "img_path": image, "ID": ids, **fields}


@pytest.fixture
def read(tmp_path):
    def run(*records, instances=None, **options):
        (tmp_path / "lisa.json").write_text(json.dumps(list(records)))
        (tmp_path / "instances.json").write_text(json.dumps(coco() if instances is None else instances))
        return list(read_lisa_plus(tmp_path / "lisa.json", tmp_path / "instances.json", tmp_path / "images", **options))

    return run


def corners(turn) -> list[tuple[int, int]]:
    """Left upper corners of the squares found."""
    arrays = masks.decode_batch(turn.phrases[0].rles, HEIGHT, WIDTH)
    assert (arrays.sum(axis=(1, 2)) == 16).all()
    return [tuple(np.argwhere(array)[0][::-1].tolist()) for array in arrays]


def test_ids_name_the_instances_and_their_category_the_phrase(read, tmp_path):
    first, mixed, other = read(asked([12, 11]), asked([11, 13]), asked([21], "x/COCO_train2014_000000000035.jpg"))
    assert first.id == "lisa.json/0" and first.image == tmp_path / "images" / "000000000034.jpg"
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    (turn,) = first.turns
    assert (turn.instruction, turn.form, turn.kind) == ("Which animals sleep?", "sentence", "reasoning")
    assert turn.phrases[0].text == "dog" and turn.answer == () and not turn.phrases[0].box_only
    assert corners(turn) == [(10, 10), (0, 0)]
    assert mixed.turns[0].phrases[0].text == "" and corners(mixed.turns[0]) == [(0, 0), (20, 4)]
    assert other.image.name == "000000000035.jpg" and other.turns[0].phrases[0].text == "cat"
    assert corners(other.turns[0]) == [(1, 2)]


def test_the_generic_phrase_is_the_source_s(read, tmp_path):
    read(asked([11, 13]))
    files = {"file": f"{tmp_path}/lisa.json", "instances": f"{tmp_path}/instances.json", "image_root": "images"}
    for phrase in ("object", "target"):
        (source,) = parse_sources({"lisa": {"reader": "lisa_plus", **files, "phrase": phrase}})
        (sample,) = read_source(source, Skips())
        assert sample.turns[0].phrases[0].text == phrase


def test_the_answer_text_stands_before_the_phrase(read):
    record = asked([11], answer=" They lie down, so they sleep. ")
    (sample,) = read(record, answer_key="answer")
    assert sample.turns[0].answer == ("They lie down, so they sleep. ", "")
    (without,) = read(record)
    assert without.turns[0].answer == ()


def test_crowds_are_left_out(read, caplog):
    skips = Skips(max_bad=0)
    with caplog.at_level(logging.WARNING):
        (sample,) = read(asked([14, 11]), asked([14]), skips=skips)
    # The crowd is a cat, the dog's name is the phrase.
    assert corners(sample.turns[0]) == [(0, 0)] and sample.turns[0].phrases[0].text == "dog"
    assert skips.aside == {CROWDS: 1} and not skips.counts
    assert any("left out 1 records of crowd" in line for line in caplog.messages)


FAULTS: dict[str, tuple[Any, str, str]] = {
    "no object": (3, "expected an object, got int", "field"),
    "no question": (asked([11]) | {"English Question": None}, "English Question must be a string", "field"),
    "empty question": (asked([11]) | {"English Question": " "}, "English Question is empty", "text"),
    "token": (asked([11]) | {"English Question": "a [SEG]"}, r"holds the reserved token '\[SEG\]'", "text"),
    "no ids": (asked([]), "ID must be a list with at least one annotation id", "field"),
    "ids": (asked([[11]]), "ID must be a list with at least one annotation id", "field"),
    "twice": (asked([11, 11]), "ID holds an id twice", "duplicate"),
    "unknown": (asked([11, 77]), "the instances file has no annotation 77", "reference"),
    "two pictures": (asked([11, 21]), "ID names annotations of several pictures", "reference"),
    "no img_path": (asked([11], None), "img_path must be the name of a picture", "field"),
    "another picture": (asked([11], "000000000035.jpg"), "but the annotations belong to '0+34.jpg'", "reference"),
    "no answer": (asked([11], answer=None), "answer must be a string", "field"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_index_reason_and_kind(read, name):
    bad, message, kind = FAULTS[name]
    good = asked([12], answer="Because.")
    bad = {"answer": "Because.", **bad} if isinstance(bad, dict) else bad
    with pytest.raises(DataError, match=rf"lisa\.json: \[1\]: .*{message}") as caught:
        read(good, bad, good, answer_key="answer")
    assert caught.value.kind == kind
    skips = Skips("skip")
    samples = read(good, bad, good, answer_key="answer", skips=skips)
    assert [sample.id for sample in samples] == ["lisa.json/0", "lisa.json/2"] and skips.counts == {"records": 1}


def changed(key: str, index: int, **fields) -> dict[str, Any]:
    value = coco()
    value[key][index].update(fields)
    return value


SHORT = {"size": [HEIGHT, WIDTH], "counts": [1, 2]}
COCO_FAULTS: dict[str, tuple[Any, str, str, dict[str, int]]] = {
    "annotation without image": (
        changed("annotations", 0, image_id=None),
        r"instances\.json: annotations\[0\]: image_id and category_id must",
        "field",
        {"annotations": 1, "records": 1},
    ),
    "id twice": (
        changed("annotations", 1, id=11),
        r"annotations\[1\]: id 11 occurs a second",
        "duplicate",
        {"annotations": 1},
    ),
    "unknown image": (changed("annotations", 0, image_id=5), r"\[0\]: .* no image 5", "reference", {"records": 1}),
    "unknown category": (changed("annotations", 0, category_id=5), "no category 5", "reference", {"records": 1}),
    "category": (
        changed("categories", 0, name=""),
        r"instances\.json: categories\[0\]: name is empty",
        "text",
        {"categories": 1, "records": 1},
    ),
    "image size": (
        changed("images", 0, height=0),
        "image 34 of the instances file: height must be a positive number",
        "field",
        {"records": 1},
    ),
    "image pixels": (changed("images", 0, height=2**40), "image 34 .* more than a mask can", "field", {"records": 1}),
    "image": (changed("images", 0, id=None), r"images\[0\]: expected an object", "field", {"images": 1, "records": 1}),
    "mask": (
        changed("annotations", 0, segmentation=SHORT),
        r"\[0\]: annotations\[0\] \(id 11\): counts sum to 3",
        "rle short",
        {"records": 1},
    ),
    "empty mask": (
        changed("annotations", 0, segmentation=dict(masks.empty_rle(HEIGHT, WIDTH))),
        r"annotations\[0\] \(id 11\): the mask is empty",
        "mask empty",
        {"records": 1},
    ),
    "two points": (
        changed("annotations", 0, segmentation=[[1, 2, 3, 4]]),
        r"annotations\[0\] \(id 11\)\[0\]: has 2 points",
        "polygon points",
        {"records": 1},
    ),
}


@pytest.mark.parametrize("name", COCO_FAULTS)
def test_faults_of_the_instances_file(read, name):
    instances, message, kind, counts = COCO_FAULTS[name]
    with pytest.raises(DataError, match=message) as caught:
        read(asked([11]), asked([21], "000000000035.jpg"), instances=instances)
    assert caught.value.kind == kind
    skips = Skips("skip")
    samples = read(asked([11]), asked([21], "000000000035.jpg"), instances=instances, skips=skips)
    assert samples[-1].id == "lisa.json/1"
    if name != "id twice":
        assert len(samples) == 1 and skips.counts == counts


def test_cp1252_files(read, tmp_path):
    records = [asked([11]) | {"English Question": "The caf\xe9\u2019s dog?"}]
    read(asked([11]))
    (tmp_path / "lisa.json").write_bytes(json.dumps(records, ensure_ascii=False).encode("cp1252"))
    files = (tmp_path / "lisa.json", tmp_path / "instances.json", tmp_path)
    (sample,) = read_lisa_plus(*files, encoding="cp1252")
    assert sample.turns[0].instruction == "The caf\xe9\u2019s dog?"
    with pytest.raises(DataError, match=r"lisa\.json: \[0\]: is not utf-8 at byte \d+: .*encoding: cp1252"):
        list(read_lisa_plus(*files))


def test_files_of_another_form_are_an_error(read, tmp_path):
    with pytest.raises(ValueError, match=r"lisa\.json: no usable record"):
        read()
    with pytest.raises(ValueError, match=r"instances\.json: images must be a list"):
        read(asked([11]), instances={"images": {}}, skips=Skips("skip"))
    (tmp_path / "instances.json").write_text(json.dumps(coco()))
    (tmp_path / "lisa.json").write_text('{"a": []}')
    with pytest.raises(ValueError, match=r"no usable record"):
        list(read_lisa_plus(tmp_path / "lisa.json", tmp_path / "instances.json", tmp_path))
    (tmp_path / "lisa.json").write_text('{"a": [1]}')
    with pytest.raises(DataError, match="expected a list of records, got an object with the key 'a'"):
        list(read_lisa_plus(tmp_path / "lisa.json", tmp_path / "instances.json", tmp_path, skips=Skips("skip")))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_gives_samples_or_a_named_error(read, tmp_path, data):
    records: list[Any] = [asked([11, 12], answer="So."), asked([13], answer="Yes.")]
    untouched = read(asked([21], "000000000035.jpg", answer="No."), answer_key="answer")[0].turns[0].phrases
    instances = copy.deepcopy(coco())
    holder: Any = data.draw(st.sampled_from([*records, *instances["annotations"][:4], instances["images"][0]]))
    key = data.draw(st.sampled_from(sorted(holder)))
    holder[key] = data.draw(json_values)
    if data.draw(st.booleans()):
        del holder[key]
    records.append(asked([21], "000000000035.jpg", answer="No."))
    options: dict[str, Any] = {"instances": instances, "answer_key": "answer"}
    *_, last = read(*records, skips=Skips("skip"), **options)
    # A damaged id may be that of another annotation; else the record that does not need what is damaged stays.
    assert last.id == "lisa.json/2" and last.turns[0].phrases == untouched
    try:
        read(*records, **options)
    except DataError as error:
        assert str(tmp_path) in str(error)
