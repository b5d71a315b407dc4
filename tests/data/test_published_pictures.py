"""Pictures as cameras and data sets store them, through a reader and the processor: size, pixels and masks agree.

How a picture of each mode is read is tested in tests/processing/test_images.py. Here it is that annotations refer to
the upright picture: the brightest pixels that the detector is shown are those of the target.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from turned_pictures import STORED, save_turned

from instructsam.data.coco_categories import read_coco_categories
from instructsam.data.coco_instructions import read_coco_instructions
from instructsam.data.png_masks import read_png_masks
from instructsam.data.referring import read_referring
from instructsam.data.release_train import read_release_train
from instructsam.errors import kind_of
from instructsam.processing.processor import InstructSAMProcessor
from instructsam.structures import Sample

HEIGHT, WIDTH = 72, 96
TARGET = np.zeros((HEIGHT, WIDTH), dtype=bool)
TARGET[6:30, 48:84] = True  # in no turned or mirrored picture at the same place
BOX = [48, 6, 36, 24]
SIDE = 96


@pytest.fixture(scope="module")
def processor(world) -> InstructSAMProcessor:
    tokenizer = AutoTokenizer.from_pretrained(str(world / "tokenizer"))
    image = {"patch_size": 8, "min_pixels": 4096, "max_pixels": 65536}
    return InstructSAMProcessor(tokenizer, 3, (SIDE, SIDE), image, SIDE, max_length=400, mask_resize="nearest-exact")


def upright() -> Image.Image:
    return Image.fromarray(np.where(TARGET, 220, 30).astype(np.uint8)).convert("RGB")


def save(path: Path, mode: str = "RGB", orientation: int = 1) -> None:
    """The picture as a camera or a data set stores it."""
    save_turned(upright(), path, orientation, mode)


def read_masks(folder: Path, image: str, height: int = HEIGHT, width: int = WIDTH) -> Sample:
    x, y, w, h = BOX
    entry = {"id": 1, "image_id": 5, "category_id": 1, "iscrowd": 0, "bbox": BOX}
    entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return read_coco(folder, image, height, width, entry)


def read_boxes(folder: Path, image: str, height: int = HEIGHT, width: int = WIDTH) -> Sample:
    return read_coco(folder, image, height, width, {"id": 1, "image_id": 5, "category_id": 1, "bbox": BOX})


def read_coco(folder: Path, image: str, height: int, width: int, entry: dict) -> Sample:
    file = folder / "instances.json"
    images = [{"id": 5, "file_name": image, "height": height, "width": width}]
    content = {"images": images, "annotations": [entry], "categories": [{"id": 1, "name": "square"}]}
    file.write_text(json.dumps(content))
    (sample,) = read_coco_categories(file, folder, "coco")
    return sample


def read_png(folder: Path, image: str) -> Sample:
    Image.fromarray((TARGET * 255).astype(np.uint8)).save(folder / "mask.png")
    (folder / "records.json").write_text(json.dumps([{"text": "square", "image": image, "mask": "mask.png"}]))
    keys = {"text_key": "text", "image_key": "image", "mask_key": "mask"}
    (sample,) = read_png_masks(folder / "records.json", folder, "png", **keys)
    return sample


def read_refer(folder: Path, image: str) -> Sample:
    x, y, w, h = BOX
    entry = {"id": 1, "image_id": 5, "category_id": 1, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    ref = {"ref_id": 0, "ann_id": 1, "image_id": 5, "split": "train", "sentences": [{"sent_id": 1, "sent": "square"}]}
    (folder / "refs.p").write_bytes(pickle.dumps([ref], protocol=2))
    images = [{"id": 5, "file_name": image, "height": HEIGHT, "width": WIDTH}]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": [entry]}))
    (sample,) = read_referring(folder, "train", "refer", ".", "refs.p", folder).samples
    return sample


def read_own(folder: Path, image: str) -> Sample:
    (folder / "train" / "images").mkdir(parents=True)
    (folder / image).rename(folder / "train" / "images" / image)
    images = [{"id": 5, "file_name": image, "height": HEIGHT, "width": WIDTH}]
    content = {"images": images, "annotations": [{"id": 1, "image_id": 5, "bbox": BOX}]}
    line = {"id": "a", "image_id": 5, "instruction": "it", "phrases": [{"phrase": "square", "annotation_ids": [1]}]}
    (folder / "train" / "instances.json").write_text(json.dumps(content))
    (folder / "train" / "instructions.jsonl").write_text(json.dumps(line))
    (sample,) = read_coco_instructions(folder, "train")
    return sample


def read_release(folder: Path, image: str) -> Sample:
    """Without height and width in the record: they are the upright picture's."""
    annotation = {"type": "phrase", "text": "square", "ann_type": "bbox", "ann": [BOX]}
    (folder / "train.json").write_text(json.dumps([{"image": image, "annotation": [annotation]}]))
    (sample,) = read_release_train(folder / "train.json", folder)
    return sample


READERS = [read_masks, read_boxes, read_png, read_refer, read_own, read_release]


def check(processor: InstructSAMProcessor, sample: Sample) -> None:
    assert (sample.height, sample.width) == (HEIGHT, WIDTH)
    item = processor.encode_sample(sample)
    ((target_1hw, boxes),) = item["targets"]
    torch.testing.assert_close(boxes, torch.tensor([[66 / 96, 18 / 72, 36 / 96, 24 / 72]]))
    pixels_chw = item["detector_pixel_values"]
    assert pixels_chw.shape == (3, SIDE, SIDE)
    bright_hw = pixels_chw.mean(dim=0) > 0
    assert (bright_hw != target_1hw[0]).float().mean() < 0.02  # resizing may differ along the border
    # The language model sees it upright too: patches lie in rows of the grid, as wide as the picture is.
    _, rows, columns = item["image_grid_thw"].tolist()
    assert columns > rows


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("orientation", STORED)
def test_annotations_refer_to_the_upright_picture(processor, tmp_path, orientation: int, read):
    save(tmp_path / "photo.jpg", orientation=orientation)
    check(processor, read(tmp_path, "photo.jpg"))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("I;16", "png")]
)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("read", [read_masks, read_refer, read_release])
def test_pictures_of_every_mode(processor, tmp_path, mode: str, suffix: str, orientation: int, read):
    save(tmp_path / f"photo.{suffix}", mode, orientation)
    check(processor, read(tmp_path, f"photo.{suffix}"))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_size_before_turning_is_another_size(processor, tmp_path, orientation: int):
    """As a file says that was made from the stored pixels: its masks lie across the upright picture."""
    save(tmp_path / "photo.jpg", orientation=orientation)
    sample = read_boxes(tmp_path, "photo.jpg", height=WIDTH, width=HEIGHT)
    with pytest.raises(ValueError, match=r"sample coco/5: .*photo\.jpg.*EXIF") as caught:
        processor.encode_sample(sample)
    assert kind_of(caught.value) == "image size"
    assert all(str(size) in str(caught.value) for size in (HEIGHT, WIDTH))


def test_a_picture_of_another_size_is_named(processor, tmp_path):
    upright().resize((WIDTH // 2, HEIGHT // 2)).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"sample coco/5: .*photo\.jpg.*36.*48.*72.*96") as caught:
        processor.encode_sample(read_masks(tmp_path, "photo.jpg"))
    assert kind_of(caught.value) == "image size"


def test_a_missing_picture_is_named(processor, tmp_path):
    with pytest.raises(ValueError, match=r"photo\.jpg: no such image file") as caught:
        processor.encode_sample(read_masks(tmp_path, "photo.jpg"))
    assert kind_of(caught.value) == "image missing"
