"""The release's training JSON: every kind of record as published, faults named, damage that never crashes."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_damage import damaged_bytes, damaged_record
from turned_pictures import exif_of

from instructsam import masks
from instructsam.data.checks import Place, Skips
from instructsam.data.release_markup import split_marked
from instructsam.data.release_masks import check_each
from instructsam.data.release_train import POINTS, _Reader, read_release_train
from instructsam.errors import DataError
from instructsam.structures import PhraseTarget

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 3, 12, 3, 12, 9, 2, 9]  # 10 x 6 pixels


def mask(k: int) -> np.ndarray:
    array = np.zeros((HEIGHT, WIDTH), dtype=bool)
    array[k : k + 4, 2 * k : 2 * k + 5] = True
    return array


def rle(k: int) -> dict[str, Any]:
    return dict(masks.encode(mask(k)))


def runs(k: int) -> list[int]:
    flat = mask(k).T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def annotation(text="The Brown dog.", ann=(0,), ann_type="mask", **fields) -> dict[str, Any]:
    """An annotation as published; numbers stand for masks."""
    shapes = None if ann is None else [json.dumps(rle(one) if isinstance(one, int) else one) for one in ann]
    return {"type": "phrase", "text": text, "ann_type": ann_type, "ann": shapes, **fields}


def record(*annotations, **fields) -> dict[str, Any]:
    return {"image": "a/b.jpg", "height": HEIGHT, "width": WIDTH, "annotation": list(annotations), **fields}


def talk(*texts: str, roles: bool = False) -> list[dict[str, str]]:
    return [{"value": text, **({"from": ("human", "gpt")[k % 2]} if roles else {})} for k, text in enumerate(texts)]


def grounded(answer: str, shapes: list[Any], **fields) -> dict[str, Any]:
    turns = talk("<image>\nWhich animals sleep?", answer)
    return {"image": "a/b.jpg", "height": HEIGHT, "width": WIDTH, "mask": shapes, "conversations": turns, **fields}


@pytest.fixture
def read(tmp_path):
    def run(*records, **options):
        (tmp_path / "train.json").write_text(json.dumps(list(records)))
        return list(read_release_train(tmp_path / "train.json", tmp_path / "images", **options))

    return run


def decoded(phrase: PhraseTarget) -> np.ndarray:
    return masks.decode_batch(phrase.rles, HEIGHT, WIDTH)


# ---- annotations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_annotations_are_turns_by_themselves(read, tmp_path, as_text):
    entries = [
        annotation(),
        annotation("Which one barks at the cat?", [1, 2], type="sentence", category="dog"),
        annotation("STOP", [3], type="OCR"),
        annotation("two cats", None),
        annotation("no birds", []),
    ]
    (sample,) = read({**record(), "annotation": json.dumps(entries) if as_text else entries})
    assert (sample.id, sample.image) == ("train.json/0", tmp_path / "images" / "a" / "b.jpg")
    assert (sample.height, sample.width, sample.joint) == (HEIGHT, WIDTH, False)
    phrase, sentence, ocr, absent, empty = sample.turns
    assert (phrase.form, phrase.kind, phrase.instruction) == ("phrase", "phrase", "the Brown dog")
    assert phrase.phrases[0].text == "the Brown dog" and phrase.answer == () and phrase.id == "train.json/0-0"
    np.testing.assert_array_equal(decoded(phrase.phrases[0]), [mask(0)])
    assert (sentence.form, sentence.instruction) == ("sentence", "Which one barks at the cat?")
    assert sentence.phrases[0].text == "dog"
    np.testing.assert_array_equal(decoded(sentence.phrases[0]), [mask(1), mask(2)])
    assert (ocr.form, ocr.kind, ocr.instruction, ocr.phrases[0].text) == ("ocr", "ocr", "STOP", "STOP")
    for turn in (absent, empty):
        assert turn.form == "phrase" and turn.kind == "no-target" and turn.phrases[0].rles == ()
    assert not any(turn.phrases[0].box_only for turn in sample.turns)


@pytest.mark.parametrize(
    "shape",
    [
        {"size": [HEIGHT, WIDTH], "counts": runs(0)},
        rle(0),
        {"segmentation": rle(0)},
    ],
    ids=["list", "str", "wrapped"],
)
@pytest.mark.parametrize("parsed", [False, True])
def test_every_form_of_rle(read, shape, parsed):
    (sample,) = read(record(annotation(ann=[]) | {"ann": [shape if parsed else json.dumps(shape)]}))
    assert sample.turns[0].phrases[0].rles == (masks.encode(mask(0)),)


def test_counts_may_be_bytes_in_memory():
    coded = {"size": (HEIGHT, WIDTH), "counts": rle(0)["counts"].encode()}
    reader = _Reader(Path("images"), (), Skips())
    planned = reader.plan(record(annotation() | {"ann": [coded]}), Place("x.json", "[0]"), "x.json/0")
    (sample,) = reader.finish([planned])
    assert sample.turns[0].phrases[0].rles == (masks.encode(mask(0)),)


@pytest.mark.parametrize(
    "shape",
    [
        SQUARE,
        [SQUARE],
        [[[2, 3], [12, 3], [12, 9], [2, 9]]],
        {"polygons": [SQUARE]},
        [[2, 3, 7, 3, 7, 9, 2, 9], [7, 3, 12, 3, 12, 9, 7, 9]],
    ],
    ids=["flat", "one", "points", "object", "two of one instance"],
)
def test_every_form_of_polygons(read, shape):
    (sample,) = read(record(annotation(ann=[shape])))
    (array,) = decoded(sample.turns[0].phrases[0])
    assert array.sum() == 60 and array[3:9, 2:12].all()


def test_boxes_are_filled_and_marked(read):
    none = annotation(ann=None, ann_type="bbox")
    (sample,) = read(record(annotation(ann=[[2, 3, 10, 6], [0.0, 0.0, 5.0, 5.0]], ann_type="BBox"), annotation(), none))
    boxes, *others = (turn.phrases[0] for turn in sample.turns)
    assert boxes.box_only and [one.box_only for one in others] == [False, False]
    first, second = decoded(boxes)
    assert first.sum() == 60 and first[3:9, 2:12].all() and second.sum() == 25 and second[:5, :5].all()


def test_joint_needs_phrases_only(read):
    sentence = annotation("Where is it?", type="sentence", category="dog")
    samples = read(
        record(annotation(), annotation("a cat", None), type="instseg"),
        record(annotation(), sentence, type="instseg"),
        record(annotation(), type="other"),
    )
    assert [sample.joint for sample in samples] == [True, False, False]


def test_a_joint_sample_keeps_what_is_left(read):
    skips = Skips("skip")
    (sample,) = read(record(annotation(""), annotation("a cat"), annotation("two"), type="instseg"), skips=skips)
    assert sample.joint and [turn.instruction for turn in sample.turns] == ["a cat", "two"]
    assert [turn.id for turn in sample.turns] == ["train.json/0-1", "train.json/0-2"]
    assert skips.counts == {"annotations": 1}


def test_points_are_left_out_counted_and_logged(read, caplog):
    point = annotation(ann=[[3, 4]], ann_type="point")
    skips = Skips(max_bad=0)
    with caplog.at_level(logging.WARNING):
        (sample,) = read(record(point, annotation("a cat"), point), record(point), skips=skips)
    assert [turn.instruction for turn in sample.turns] == ["a cat"] and skips.aside == {POINTS: 3} and not skips.counts
    assert [line for line in caplog.messages if "left out 3 point annotations" in line] == caplog.messages
    with pytest.raises(ValueError, match=r"train\.json: no usable record \(1 point annotations cannot be trained on\)"):
        read(record(point))


def test_size_from_rles_else_from_the_picture(read, tmp_path):
    boxed = record(annotation(ann=[[1, 1, 3, 3]], ann_type="bbox"), height=None, width=None)
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a" / "b.jpg", exif=exif_of(6))
    without = {key: value for key, value in record(annotation()).items() if key not in ("height", "width")}
    for sample in read(without, boxed, grounded("<p>a</p>", [[SQUARE]], height=None, width=None)):
        assert (sample.height, sample.width) == (HEIGHT, WIDTH)
    (tmp_path / "images" / "a" / "b.jpg").unlink()
    assert len(read(without)) == 1
    with pytest.raises(DataError, match=r"\[0\]: no file .*b\.jpg") as caught:
        read(boxed)
    assert caught.value.kind == "image missing"


# ---- conversations ----------------------------------------------------------------------------------------------

BLOCK = "<|mask_start|>[SEG][SEG]<|mask_end|>"
FORMS = {
    "p": "It is <p>the dog</p> on <p> a sofa </p>.",
    "p and SEG": "It is <p>the dog</p> [SEG] on <p> a sofa </p>[SEG][SEG].",
    "p and REGION": "\nIt is <p>the dog</p><REGION> on <p>a sofa</p> <REGION>.",
    "ref": "It is <|object_ref_start|>the dog<|object_ref_end|> on <|object_ref_start|>a sofa<|object_ref_end|>.",
    "ref and block": f"It is <|object_ref_start|>the dog<|object_ref_end|>{BLOCK} on <p>a sofa</p> {BLOCK}. ",
}


@pytest.mark.parametrize("name", FORMS)
def test_the_kth_phrase_has_the_kth_mask(read, name):
    (sample,) = read(grounded(FORMS[name], [rle(1), [SQUARE]]))
    (turn,) = sample.turns
    assert (turn.instruction, turn.form, turn.kind) == ("Which animals sleep?", "", "conversation")
    assert turn.answer == ("It is ", " on ", ".")
    assert [phrase.text for phrase in turn.phrases] == ["the dog", "a sofa"]
    np.testing.assert_array_equal(decoded(turn.phrases[0]), [mask(1)])
    assert decoded(turn.phrases[1]).sum() == 60


def test_entries_of_mask_may_be_several_or_none(read):
    answer = "<p>dogs</p>, <p>a cat</p>, <p>birds</p>"
    (sample,) = read(grounded(answer, [[rle(0), rle(1)], None, [[SQUARE], json.dumps(rle(2))]]))
    (turn,) = sample.turns
    assert turn.answer == () and [len(phrase.rles) for phrase in turn.phrases] == [2, 0, 2]
    np.testing.assert_array_equal(decoded(turn.phrases[0]), [mask(0), mask(1)])


def test_one_marked_phrase_has_all_masks(read):
    spoken = grounded("", [rle(0), [rle(1), rle(2)]])
    turns = talk("<image>Hello.", "Good day.", "What is it?", "These: <p>dogs</p>", roles=True)
    (sample,) = read({**spoken, "conversations": turns})
    plain, marked = sample.turns
    assert (plain.instruction, plain.answer, plain.phrases) == ("Hello.", ("Good day.",), ())
    assert marked.answer == ("These: ", "") and len(marked.phrases[0].rles) == 3


def test_masks_are_counted_over_all_turns(read):
    turns = talk("Who?", "<p>a man</p>", "And what?", "A <p>dog</p> and <p>a cat</p>.")
    (sample,) = read({**grounded("", [rle(0), rle(1), rle(2)]), "conversations": turns})
    found = [decoded(phrase)[0] for turn in sample.turns for phrase in turn.phrases]
    np.testing.assert_array_equal(found, [mask(0), mask(1), mask(2)])


def test_plain_conversations_with_and_without_a_picture(read):
    words = talk(" How are you? ", "Fine, <p>as HTML has it</p>. ")
    samples = read(
        {"image": None, "conversations": words},
        {"image": "x.jpg", "height": 3, "width": 4, "conversations": talk("<image>\nWhat is it?", "A cat.")},
    )
    assert [sample.image is None for sample in samples] == [True, False]
    assert (samples[0].height, samples[0].width) == (0, 0) and (samples[1].height, samples[1].width) == (3, 4)
    assert samples[0].turns[0].instruction == "How are you?"
    assert samples[0].turns[0].answer == ("Fine, <p>as HTML has it</p>.",) and samples[0].turns[0].phrases == ()
    assert samples[1].turns[0].instruction == "What is it?"


def test_marks_can_be_configured(read):
    (sample,) = read(grounded("It is [[a dog]] [SEG].", [rle(0)]), phrase_marks=[["[[", "]]"]])
    assert sample.turns[0].answer == ("It is ", ".") and sample.turns[0].phrases[0].text == "a dog"


@given(st.lists(st.sampled_from(["<p>", "</p>", "[SEG]", "<|mask_start|>", "<|mask_end|>", "x", " "]), max_size=12))
@settings(max_examples=300, deadline=None)
def test_marked_text_is_split_or_refused(tokens):
    text = "".join(tokens)
    try:
        pieces, phrases = split_marked(text)
    except DataError as error:
        assert error.kind in ("markup", "text")
    else:
        assert len(pieces) == len(phrases) + 1 and len(phrases) == text.count("<p>") == text.count("</p>")
        letters = "".join((*pieces, *phrases)).replace(" ", "")
        assert letters == "x" * text.count("x")  # neither lost nor doubled


# ---- faults -----------------------------------------------------------------------------------------------------

EMPTY = dict(masks.empty_rle(HEIGHT, WIDTH))
A0 = r"\[1\] annotation\[0\]: "
FAULTS: dict[str, tuple[Any, str, str]] = {
    "no object": (3, r"\[1\]: expected an object, got int", "field"),
    "no image name": (record(annotation(), image=""), r"\[1\]: image must be the name of a picture", "field"),
    "nul": (record(annotation(), image="a\0"), r"\[1\]: no file can be called", "text"),
    "long name": (record(annotation(), image="a" * 256), r"\[1\]: no file can be called", "text"),
    "pixels": (record(annotation(), height=2**40), r"\[1\]: 1099511627776x\d+ pixels are more than a mask", "field"),
    "marks without masks": (
        {"image": "x.jpg", "height": 3, "width": 4, "conversations": talk("what?", "It is <p>a cup</p>.")},
        r"\[1\]: conversations\[1\]: a phrase is marked with <p> ... </p>, but the record has no mask",
        "markup",
    ),
    "no picture": (record(annotation(), image=None), r"\[1\]: has an annotation, but no image", "field"),
    "neither": (record(), r"\[1\]: has neither annotation nor conversations", "field"),
    "both": (
        grounded("<p>a</p>", [rle(0)], annotation=[annotation()]),
        r"\[1\]: has both annotation and conversations",
        "field",
    ),
    "empty list": ({**record(), "annotation": "[]"}, r"\[1\]: annotation is an empty list", "field"),
    "no list": ({**record(), "annotation": {"a": 1}}, r"\[1\]: annotation must be a list", "field"),
    "not JSON": ({**record(), "annotation": "[{"}, r"\[1\]: annotation: is not valid JSON", "json"),
    "height": (record(annotation(), height=0), r"\[1\]: height must be a positive number", "field"),
    "only height": (record(annotation(), width=None), r"\[1\]: width must be a positive number", "field"),
    "entry": (record(5), A0 + "expected an object, got int", "field"),
    "type": (record(annotation(type="caption")), A0 + "type must be phrase, sentence or OCR", "annotation type"),
    "no text": (record(annotation(None)), A0 + "text must be a string, got None", "field"),
    "empty text": (record(annotation(" ")), A0 + "text is empty", "text"),
    "period": (record(annotation(".")), A0 + "text is empty", "text"),
    "token": (record(annotation("a dog<|im_end|>")), A0 + r"text holds the reserved token '<\|im_end\|>'", "text"),
    "half character": (record(annotation("a \ud800")), A0 + "text holds half a character", "text"),
    "no category": (record(annotation(type="sentence")), A0 + "category .* must be a string", "field"),
    "empty category": (record(annotation(type="sentence", category="")), A0 + "category .* is empty", "text"),
    "ann": (record({**annotation(), "ann": "x"}), A0 + "ann must be null or a list, got str", "field"),
    "ann_type": (record(annotation(ann_type="line")), A0 + "ann_type must be mask, bbox or point", "annotation type"),
    "no ann_type": (record(annotation(ann_type=None)), A0 + "ann_type must be mask, bbox", "annotation type"),
    "mask not JSON": (record({**annotation(), "ann": ["{"]}), A0 + r"ann\[0\]: is not valid JSON", "json"),
    "mask form": (
        record(annotation() | {"ann": [True]}),
        A0 + r"ann\[0\]: expected an RLE or polygons",
        "polygon form",
    ),
    "no counts": (record(annotation(ann=[{"size": [HEIGHT, WIDTH]}])), A0 + r"ann\[0\]: has no counts", "rle form"),
    "mask size": (record(annotation(ann=[dict(masks.empty_rle(4, 4))])), A0 + r"ann\[0\]: size is 4x4", "mask size"),
    "short": (
        record(annotation(ann=[{"size": [HEIGHT, WIDTH], "counts": [10, 5]}])),
        A0 + r"ann\[0\]: counts sum to 15",
        "rle short",
    ),
    "truncated": (
        record(annotation(ann=[0, {**rle(1), "counts": rle(1)["counts"] + "o"}])),
        A0 + r"ann\[1\]: counts is truncated",
        "rle truncated",
    ),
    "empty mask": (record(annotation(ann=[0, EMPTY])), A0 + r"ann\[1\]: the mask is empty", "mask empty"),
    "all empty": (record(annotation(ann=[EMPTY])), A0 + r"ann\[0\]: the mask is empty", "mask empty"),
    "empty polygon": (record(annotation(ann=[[]])), A0 + r"ann\[0\]: expected a list with", "polygon form"),
    "words": (record(annotation(ann=[["1"] * 6])), A0 + r"ann\[0\]: expected an RLE or polygons", "polygon form"),
    "two points": (record(annotation(ann=[[[1, 2, 3, 4]]])), A0 + r"ann\[0\]\[0\]: has 2 points", "polygon points"),
    "odd": (record(annotation(ann=[[[1, 2, 3, 4, 5, 6, 7]]])), A0 + r"ann\[0\]\[0\]: expected", "polygon form"),
    "polygon nan": (record(annotation(ann=[[1, 2, 9, float("nan"), 3, 8]])), A0 + "ann.*NaN", "polygon nan"),
    "far polygon": (record(annotation(ann=[[99, 99, 120, 99, 110, 120]])), A0 + "ann.*outside", "polygon outside"),
    "huge": (record(annotation(ann=[[10**400, 1, 2, 3, 4, 5]])), A0 + r"ann\[0\]\[0\]: expected", "polygon form"),
    "box of three": (
        record(annotation(ann=[[1, 2, 3]], ann_type="bbox")),
        A0 + r"ann\[0\] must be four numbers, got \[1, 2, 3\]",
        "box form",
    ),
    "box nan": (record(annotation(ann=[[1, 2, float("nan"), 3]], ann_type="bbox")), A0 + "ann.*NaN", "box nan"),
    "box outside": (record(annotation(ann=[[90, 2, 3, 3]], ann_type="bbox")), A0 + "ann.*outside", "box outside"),
    "no extent": (record(annotation(ann=[[1, 2, 0, 3]], ann_type="bbox")), A0 + "ann.*no extent", "box extent"),
    "huge box": (record(annotation(ann=[[1, 2, 10**400, 3]], ann_type="bbox")), A0 + "ann.*beyond", "box outside"),
    "two marks, one mask": (
        grounded("<p>a</p> <p>b</p>", [rle(0)]),
        r"\[1\]: 2 phrases are marked in the answers, but there are 1 masks",
        "markup",
    ),
    "no mark": (grounded("a dog", [rle(0)]), r"\[1\]: 0 phrases are marked .* 1 masks", "markup"),
    "open": (grounded("<p>a dog", [rle(0)]), r"\[1\]: conversations\[1\]: <p> is not closed", "markup"),
    "closed": (grounded("a dog</p>", [rle(0)]), r"conversations\[1\]: </p> closes nothing", "markup"),
    "nested": (grounded("<p>a <p>dog</p></p>", [rle(0)]), r"conversations\[1\]: <p> stands within <p>", "markup"),
    "lone SEG": (grounded("It is [SEG].", [rle(0)]), r"\[SEG\] stands behind no marked phrase", "markup"),
    "words in a block": (
        grounded("<p>a</p><|mask_start|>b<|mask_end|>", [rle(0)]),
        r"conversations\[1\]: a mask block holds 'b'",
        "markup",
    ),
    "empty phrase": (grounded("<p> </p>", [rle(0)]), r"conversations\[1\]: a phrase is empty", "text"),
    "token in answer": (grounded("<p>a</p><|im_end|>", [rle(0)]), "reserved token", "text"),
    "bad mask": (grounded("<p>a</p> <p>b</p>", [rle(0), EMPTY]), r"\[1\]: mask\[1\]: the mask is empty", "mask empty"),
    "mask is no list": (grounded("<p>a</p>", rle(0)), r"\[1\]: mask must be a list of masks, got dict", "field"),
    "masks of nothing": (grounded("<p>a</p>", [rle(0)], image=None), r"\[1\]: has masks, but no image", "field"),
    "no turns": ({"image": None, "conversations": "hello"}, r"\[1\]: conversations must be a list", "field"),
    "no value": ({"image": None, "conversations": [{}, {}]}, r"conversations\[0\]: expected an object with", "field"),
    "no answer": ({"image": None, "conversations": talk("a", "b", "c")}, "3 turns: the last question", "field"),
    "roles": (
        {"image": None, "conversations": [{"value": "a", "from": "gpt"}, {"value": "b"}]},
        r"conversations\[0\]: is from 'gpt', expected human or user",
        "field",
    ),
    "empty question": (grounded("", [], conversations=talk("<image>", "b")), r"conversations\[0\] is empty", "text"),
    "empty answer": ({"image": None, "conversations": talk("a", " ")}, r"conversations\[1\] is empty", "text"),
    "empty marked answer": (grounded(" ", []), r"\[1\]: conversations\[1\] is empty", "text"),
    "two pictures": (
        {"image": "x", "height": 2, "width": 2, "conversations": talk("<image><image> a", "b")},
        r"conversations\[0\]: holds <image> 2 times, but the picture belongs once",
        "markup",
    ),
    "late picture": (
        {"image": "x", "height": 2, "width": 2, "conversations": talk("a", "b", "<image>c", "d")},
        r"conversations\[2\]: holds <image> 1 times",
        "markup",
    ),
    "absent picture": ({"image": None, "conversations": talk("<image>a", "b")}, "there is no picture", "markup"),
    "picture in text": (record(annotation("a <image>")), A0 + "text holds the reserved token '<image>'", "text"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_index_reason_and_kind(read, name):
    bad, message, kind = FAULTS[name]
    good = record(annotation("a good one"))
    with pytest.raises(DataError, match=message) as caught:
        read(good, bad, good)
    assert caught.value.kind == kind and re.search(r"train\.json: \[1\][: ]", str(caught.value))
    problems: list = []
    samples = read(good, bad, good, skips=Skips("skip", report=problems.append))
    assert [sample.id for sample in samples] == ["train.json/0", "train.json/2"]
    assert [problem.kind for problem in problems] == [kind] and str(problems[0].place.index).startswith("[1]")


def test_one_bad_annotation_loses_itself_only(read):
    annotations = [annotation(str(k) + " dogs", [k % 5]) for k in range(9)]
    annotations[4]["ann"][0] = json.dumps({**rle(0), "counts": "00"})
    skips = Skips("skip")
    samples = read(*[record(*annotations)] * 70, skips=skips)
    assert len(samples) == 70 and skips.counts == {"annotations": 70}
    for sample in samples:
        assert [int(turn.instruction[0]) for turn in sample.turns] == [0, 1, 2, 3, 5, 6, 7, 8]
        for turn in sample.turns:
            np.testing.assert_array_equal(decoded(turn.phrases[0]), [mask(int(turn.instruction[0]) % 5)])


def test_a_bad_mask_does_not_spoil_the_check_of_the_others():
    codes = [rle(k % 5) for k in range(20)]
    codes[7] = {**codes[7], "counts": "\x01"}
    codes[19] = 3
    found = check_each(codes)
    assert [k for k, one in enumerate(found) if one is None] == [7, 19]
    assert [one for one in found if one] == masks.check_rles(rle(k % 5) for k in range(20) if k not in (7, 19))


def test_faults_come_in_the_order_of_the_file(read):
    problems: list = []
    bad_mask, bad_record = record(annotation(ann=[EMPTY]), annotation("")), 3
    read(bad_mask, bad_record, bad_mask, record(annotation()), skips=Skips("skip", report=problems.append))
    places = [problem.place.index for problem in problems]
    assert places == ["[0] annotation[0]", "[0] annotation[1]", "[1]", "[2] annotation[0]", "[2] annotation[1]"]


# ---- files ------------------------------------------------------------------------------------------------------


def test_parts_come_in_natural_order_and_are_counted(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"map{number}.json").write_text(json.dumps([record(annotation(f"part {number}"))] * 2))
    pattern = tmp_path / "map*.json"
    expected = [f"map{number}.json/{k}" for number in (1, 2, 10) for k in range(2)]
    for parts in (None, 3):
        samples = list(read_release_train(pattern, tmp_path, parts=parts))
        assert [sample.id for sample in samples] == expected
    assert samples[-1].turns[0].instruction == "part 10"
    with pytest.raises(ValueError, match=r"expected 5 files, found 3: map1\.json, map2\.json, map10\.json"):
        list(read_release_train(str(pattern), tmp_path, parts=5))
    with pytest.raises(ValueError, match=r"none\*\.json: no such file"):
        list(read_release_train(tmp_path / "none*.json", tmp_path))


def test_parts_of_one_name_keep_their_folders_in_ids(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x[1].json").write_text(json.dumps([record(annotation())]))
    samples = list(read_release_train(tmp_path / "*" / "*.json", tmp_path))
    assert [sample.id for sample in samples] == ["a/x[1].json/0", "b/x[1].json/0"]
    assert len(list(read_release_train(tmp_path / "a" / "x[1].json", tmp_path))) == 1  # a name, no pattern


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [1]}', r"train\.json: expected a list of records, got an object with the key 'images'"),
        (b'{"a": 1}', r"train\.json: expected a list of records, got an object with the key 'a'"),
        (b'{"": [1]}x', "expected a list of records|the value ends here|image|got int"),
        (b"[]", r"train\.json: no usable record$"),
        (b"[{}, ", r"train\.json: \[1\]: at byte 5: .*nothing from there on can be read"),
        (b'["caf\xe9"]', r"is not utf-8 at byte 5"),
    ],
)
def test_files_that_cannot_be_read_are_an_error_with_skip_too(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_release_train(tmp_path / "train.json", tmp_path, skips=Skips("skip")))


def test_cp1252_files(tmp_path):
    text = json.dumps([record(annotation("the caf\xe9"))], ensure_ascii=False)
    (tmp_path / "train.json").write_bytes(text.encode("cp1252"))
    (sample,) = read_release_train(tmp_path / "train.json", tmp_path, encoding="cp1252")
    assert sample.turns[0].instruction == "the caf\xe9"


# ---- damage -----------------------------------------------------------------------------------------------------

VALID = (
    record(annotation(), annotation("a cat", [1, [SQUARE]]), annotation("birds", None), type="instseg"),
    record(annotation(ann=[[2, 3, 10, 6]], ann_type="bbox"), annotation("Where?", type="sentence", category="dog")),
    {**record(), "annotation": json.dumps([annotation("STOP", type="OCR"), annotation()])},
    grounded(FORMS["ref and block"], [rle(1), [rle(2), rle(3)]]),
    {"image": None, "conversations": talk("Hello.", "Good day.", roles=True)},
)
RELAXED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_samples(samples) -> None:
    """What holds for every sample, whatever it was read from."""
    for sample in samples:
        assert sample.turns and (sample.image is None) == (sample.height == 0) == (sample.width == 0)
        for turn in sample.turns:
            texts = [turn.instruction, *(phrase.text for phrase in turn.phrases)]
            assert all(text and text == text.strip() for text in texts)
            assert "".join(turn.answer).strip() or turn.phrases
            rles = [one for phrase in turn.phrases for one in phrase.rles]
            assert (masks.areas(masks.check_rles(rles, sample.height, sample.width)) > 0).all()


@pytest.mark.slow
@given(st.data())
@RELAXED
def test_damage_to_a_record_leaves_the_others_whole(tmp_path, data):
    records = copy.deepcopy(list(VALID))
    index = data.draw(st.integers(0, len(records) - 1))
    records[index] = damaged_record(data.draw, records[index])
    path = tmp_path / "train.json"
    path.write_text(json.dumps(list(VALID)))
    whole = {sample.id: sample for sample in read_release_train(path, tmp_path)}
    assert len(whole) == len(VALID)
    path.write_text(json.dumps(records))
    found = list(read_release_train(path, tmp_path, skips=Skips("skip")))
    check_samples(found)
    others = {sample.id: sample for sample in found if sample.id != f"train.json/{index}"}
    assert others == {key: sample for key, sample in whole.items() if key != f"train.json/{index}"}
    try:
        assert list(read_release_train(path, tmp_path)) == found
    except DataError as error:
        assert f"{path}: [{index}]" in str(error)


@pytest.mark.slow
@given(st.data())
@RELAXED
def test_damage_to_bytes_gives_samples_or_a_named_error(tmp_path, data):
    path = tmp_path / "train.json"
    path.write_bytes(damaged_bytes(data.draw, json.dumps(list(VALID)).encode()))
    for skips in (Skips(), Skips("skip")):
        try:
            check_samples(read_release_train(path, tmp_path, skips=skips))
        except ValueError as error:
            assert str(path) in str(error)
