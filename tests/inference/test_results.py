"""What can be made of a result: arrays, plain data, COCO, labelme, supervision, pictures."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instructsam.inference.coco import coco_dataset
from instructsam.inference.results import Result
from instructsam.masks import decode, encode
from instructsam.structures import Instance, Prediction

HEIGHT, WIDTH = 12, 20


def mask_at(x: int, y: int, side: int = 5) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + side, x : x + side] = True
    return mask


RING = mask_at(10, 3, 7)
RING[5:7, 12:14] = False
MASKS = [mask_at(0, 0), mask_at(2, 1), RING]


@pytest.fixture
def result() -> Result:
    rows = [("circles", 0, 0.9), ("circles", 0, 0.4), ("red rings", 1, 0.7)]
    instances = tuple(
        Instance(encode(mask), score, (1.0, 2.0, 3.0, 4.5), phrase, index)
        for mask, (phrase, index, score) in zip(MASKS, rows, strict=True)
    )
    prediction = Prediction("circles, red rings, stars", ("circles", "red rings", "stars"), instances, HEIGHT, WIDTH)
    return Result.of(prediction, Image.new("RGB", (WIDTH, HEIGHT), "white"), "a.png", "all of it")


def test_back_from_plain_data(result):
    again = Result.from_dict(json.loads(json.dumps(result.to_dict())), result.image)
    assert again.to_dict() == result.to_dict() and again.finished and again.image is result.image
    np.testing.assert_array_equal(again.masks, result.masks)


@pytest.fixture
def empty(result) -> Result:
    return result.where(threshold=0.95)


def test_a_sequence_of_instances(result):
    assert len(result) == 3 and result[2].phrase == "red rings" and result[-1] is result[2]
    assert [one.area for one in result] == [mask.sum() for mask in MASKS]
    for one, mask in zip(result, MASKS, strict=True):
        np.testing.assert_array_equal(one.mask, mask)
    assert result[:2] == (result[0], result[1])
    assert (
        repr(result) == "<Result a.png: 'all of it' → 3 instances ['circles' 0.90, 'circles' 0.40, 'red rings' 0.70]>"
    )


def test_arrays(result, empty):
    assert result.masks.shape == (3, HEIGHT, WIDTH) and result.masks.dtype == bool
    np.testing.assert_array_equal(result.masks, MASKS)
    assert result.boxes.shape == (3, 4) and result.boxes.dtype == np.float32
    np.testing.assert_allclose(result.scores, [0.9, 0.4, 0.7])
    assert empty.masks.shape == (0, HEIGHT, WIDTH) and empty.boxes.shape == (0, 4) and empty.scores.shape == (0,)


def test_fewer_of_them(result):
    assert [one.score for one in result.where(0.5)] == [0.9, 0.7]
    assert [one.score for one in result.where(top_k=1)] == [0.9]
    assert [one.score for one in result.where(nms_iou=0.1)] == [0.9, 0.7]
    assert [one.score for one in result.where(phrases=["red rings", "stars"])] == [0.7]
    assert len(result) == 3
    with pytest.raises(ValueError, match="no phrase 'dogs', only 'circles', 'red rings', 'stars'"):
        result.where(phrases=["dogs"])


def test_plain_data(result):
    values = json.loads(json.dumps(result.to_dict()))
    assert values["phrases"] == ["circles", "red rings", "stars"] and values["finished"]
    np.testing.assert_array_equal(decode(values["instances"][2]["segmentation"]), RING)
    assert values["instances"][1] | {"segmentation": 0} == {
        "phrase": "circles",
        "phrase_index": 0,
        "score": 0.4,
        "box": [1.0, 2.0, 3.0, 4.5],
        "area": 25,
        "segmentation": 0,
    }


def load_coco(values, path) -> COCO:
    path.write_text(json.dumps(values))
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco_is_read_by_pycocotools(result, tmp_path):
    coco = load_coco(result.to_coco(), tmp_path / "coco.json")
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["circles", "red rings"]
    annotations = coco.loadAnns(coco.getAnnIds())
    for one, mask in zip(annotations, MASKS, strict=True):
        np.testing.assert_array_equal(coco.annToMask(one).astype(bool), mask)
        assert one["area"] == mask.sum() and one["instruction"] == "all of it"
    assert annotations[2]["bbox"] == [10, 3, 7, 7] and annotations[2]["score"] == 0.7
    assert coco.loadRes(annotations).getAnnIds() == [1, 2, 3]


def test_coco_of_several(result, empty, tmp_path):
    other = Result(result.prediction, result.image, "b.png", "again", result.found[2:])
    coco = load_coco(coco_dataset([one.to_dict() for one in (result, empty, other)]), tmp_path / "coco.json")
    assert [one["file_name"] for one in coco.loadImgs(coco.getImgIds())] == ["a.png", "b.png"]
    assert len(coco.getAnnIds(imgIds=[1])) == 3 and len(coco.getAnnIds(imgIds=[2])) == 1
    assert len(set(coco.getAnnIds())) == 4
    larger = Result.of(Prediction("", (), (), 3, 3), result.image, "a.png", "x")
    with pytest.raises(ValueError, match="two pictures are called a.png, of different sizes"):
        coco_dataset([result.to_dict(), larger.to_dict()])


def test_coco_of_a_picture_that_is_asked_about_again_later(result):
    other = Result.from_dict({**result.to_dict(), "image": "b.png"}, result.image)
    values = coco_dataset([one.to_dict() for one in (result, other, result)])
    assert [one["image_id"] for one in values["annotations"]] == [1] * 3 + [2] * 3 + [1] * 3


def test_coco_of_nothing(empty, tmp_path):
    coco = load_coco(empty.to_coco(), tmp_path / "coco.json")
    assert coco.getAnnIds() == [] and len(coco.getImgIds()) == 1


def check_labelme(values) -> None:
    """What labelme 6.3's `_label_file.py` demands of a file."""
    values = json.loads(json.dumps(values))
    assert isinstance(values["version"], str) and isinstance(values["imagePath"], str) and values["flags"] == {}
    if values["imageData"] is not None:
        with Image.open(io.BytesIO(base64.b64decode(values["imageData"]))) as image:
            assert image.size == (values["imageWidth"], values["imageHeight"])
    for shape in values["shapes"]:
        assert isinstance(shape["label"], str) and shape["shape_type"] in ("mask", "polygon")
        assert shape["points"] and all(len(point) == 2 for point in shape["points"])
        assert isinstance(shape["flags"], dict) and isinstance(shape["description"], str)
        assert isinstance(shape["group_id"], int)
        assert (shape["mask"] is not None) == (shape["shape_type"] == "mask")


def test_labelme_masks(result, tmp_path):
    values = result.to_labelme()
    check_labelme(values)
    for shape, mask in zip(values["shapes"], MASKS, strict=True):
        (x1, y1), (x2, y2) = shape["points"]
        found = np.zeros((HEIGHT, WIDTH), bool)
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as cut:
            found[y1 : y2 + 1, x1 : x2 + 1] = np.asarray(cut)
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("shape_type", ["mask", "polygon"])
def test_an_instance_without_a_pixel_has_no_shape_in_labelme(result, shape_type):
    first, *others = result.prediction.instances
    empty = dataclasses.replace(first, rle=encode(np.zeros((HEIGHT, WIDTH), bool)))
    changed = dataclasses.replace(result.prediction, instances=(empty, *others))
    values = Result.of(changed, result.image, result.name, "x").to_labelme(shape_type)
    assert [shape["group_id"] for shape in values["shapes"]] == [1, 2]


def test_labelme_polygons(result):
    values = result.to_labelme("polygon", image_path="../a.png")
    check_labelme(values)
    assert values["imageData"] is None and values["imagePath"] == "../a.png"
    assert values["shapes"][2]["points"] == [[10, 3], [17, 3], [17, 10], [10, 10]]  # its hole is filled
    with pytest.raises(ValueError, match="shape_type='circle' is not one of mask, polygon"):
        result.to_labelme("circle")


@pytest.mark.parametrize("shape_type", ["mask", "polygon"])
def test_labelme_itself_opens_it(result, shape_type, tmp_path):
    labelme = pytest.importorskip("labelme._label_file")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result.to_labelme(shape_type)))
    assert [shape["label"] for shape in labelme.LabelFile(str(path)).shapes] == ["circles", "circles", "red rings"]


def test_supervision(result, empty):
    pytest.importorskip("supervision")
    found = result.to_supervision()
    np.testing.assert_array_equal(found.mask, MASKS)
    assert found.class_id.tolist() == [0, 0, 1] and found.data["class_name"].tolist()[2] == "red rings"
    assert len(empty.to_supervision()) == 0


def test_supervision_is_said_to_be_missing(result, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install supervision"):
        result.to_supervision()


def test_files(result, tmp_path):
    assert result.save(tmp_path / "new" / "a.png").exists()
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == result.plot().size == (480, 288)
    for form, key in (("result", "phrases"), ("coco", "annotations"), ("labelme", "shapes")):
        assert key in json.loads(result.save(tmp_path / f"{form}.json", format=form).read_text())
    with pytest.raises(ValueError, match="the suffix must be .json or one of .png"):
        result.save(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="format='coco' is JSON, the suffix must be .json"):
        result.save(tmp_path / "a.png", format="coco")
    with pytest.raises(ValueError, match="format='yolo' is not one of result, coco, labelme"):
        result.save(tmp_path / "a.json", format="yolo")
