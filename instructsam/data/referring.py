"""Reader of the referring sets: RefCOCO, RefCOCO+, RefCOCOg (pickled refs) and gRefCOCO (JSON), DESIGN section 9.

Layout, as the sets are distributed, all pictures being COCO's train2014::

    ROOT/FOLDER/refs(unc).p          list of {ref_id, ann_id, image_id, split, sentences: [{sent, sent_id, ...}], ...}
    ROOT/FOLDER/grefs(unc).json      the same; ann_id is a list, [-1] for no-target
    ROOT/FOLDER/instances.json       COCO instances
    IMAGE_ROOT/COCO_train2014_000000581857.jpg ...

The ``file_name`` of a ref carries an annotation's number and is no file's name: pictures are found by image_id in
instances.json. One sentence is one instruction, and its whole expression is the phrase of the answer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from instructsam.data.checks import Place, Skips, is_id
from instructsam.data.coco_instances import images_by_id, load_instances
from instructsam.data.eval_split import Collector, EvalSplit, as_phrase, instance_rles, turn_of
from instructsam.data.leakage import read_refs
from instructsam.errors import DataError
from instructsam.structures import RLE


def read_referring(
    root: Path | str,
    split: str,
    name: str,
    folder: str,
    refs: str,
    image_root: Path | str,
    skips: Skips | None = None,
) -> EvalSplit:
    """Read one split; ids are NAME/SPLIT/SENT_ID.

    Args:
        folder: of the set, below ``root``.
        refs: file of the refs in that folder: a pickle (``.p``) or JSON.
        image_root: folder of COCO's train2014 pictures.
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file, index and reason: a file that cannot be read, a split that is not there, refs to
            unknown images or annotations, masks that are malformed or empty, sentences that are empty or repeated,
            missing pictures.
    """
    base = Path(root) / folder
    refs_file, instances_file = base / refs, base / "instances.json"
    skips = skips or Skips()
    entries = _refs_of(refs_file, split)
    coco = load_instances(instances_file)
    images = images_by_id(instances_file, coco["images"], skips)
    wanted = {identity for _, ref in entries for identity in _ann_ids(ref)}
    annotations = _Annotations(instances_file, coco["annotations"], wanted)
    collector = Collector(name, split, refs_file, image_root, skips)
    for index, ref in entries:
        where = Place(refs_file, f"[{index}] (ref_id {ref.get('ref_id')!r})")
        rles: list[RLE] | None = None
        sentences = ref.get("sentences")
        image: dict[str, Any] = {}
        with collector.entry(where, "refs"):
            if not isinstance(sentences, list) or not sentences:
                raise DataError("has no list of sentences", "field")
            if not is_id(ref.get("image_id")) or ref["image_id"] not in images:
                raise DataError(f"unknown image_id {ref.get('image_id')!r}", "reference")
            image = images[ref["image_id"]]
            rles = _targets(ref, image, annotations)
        if rles is None:
            skips.counts["instructions"] += len(sentences) if isinstance(sentences, list) else 0
            continue
        for number, sentence in enumerate(sentences or ()):
            place = where.within(f"sentences[{number}]")
            with collector.entry(place):
                if not isinstance(sentence, dict) or not is_id(sentence.get("sent_id")):
                    raise DataError("expected an object with sent and sent_id", "field")
                text = sentence.get("sent")
                turn = turn_of(sentence["sent_id"], text, rles, as_phrase(text) if isinstance(text, str) else "")
                collector.add(place, image["file_name"], (image["height"], image["width"]), turn)
    return collector.finish()


def _refs_of(path: Path, split: str) -> list[tuple[int, dict[str, Any]]]:
    """The refs of one split with their places in the file."""
    refs = read_refs(path)
    found = [(index, ref) for index, ref in enumerate(refs) if ref["split"] == split]
    if not found:
        there = ", ".join(f"{name} ({count} refs)" for name, count in Counter(ref["split"] for ref in refs).items())
        raise ValueError(f"{path}: has no split {split!r}; there is {there or 'nothing in it'}")
    return found


def _ann_ids(ref: dict[str, Any]) -> list[Any]:
    """Annotation ids of a ref, those that can be ids at all: one, or a list of them."""
    ids = ref.get("ann_id")
    return [identity for identity in (ids if isinstance(ids, list) else [ids]) if is_id(identity)]


class _Annotations:
    """Annotations that are asked for, by id, with their masks made once."""

    def __init__(self, path: Path, entries: list[Any], wanted: set[Any]):
        self.path = path
        self.places: dict[Any, list[int]] = {}
        self.entries = entries
        for index, entry in enumerate(entries):
            identity = entry.get("id") if isinstance(entry, dict) else None
            if is_id(identity) and identity in wanted:
                self.places.setdefault(identity, []).append(index)
        self.rles: dict[Any, RLE] = {}

    def entry(self, identity: Any, image: dict[str, Any]) -> dict[str, Any]:
        places = self.places.get(identity, [])
        if len(places) != 1:
            reason = f"occurs {len(places)} times, at {places}" if places else "has no annotation"
            raise DataError(f"ann_id {identity!r} {reason} in {self.path}", "reference")
        entry = self.entries[places[0]]
        if entry.get("image_id") != image["id"]:
            raise DataError(
                f"ann_id {identity!r} belongs to image {entry.get('image_id')!r}, but the ref to {image['id']!r}",
                "reference",
            )
        return entry

    def rle(self, identity: Any, image: dict[str, Any]) -> RLE:
        """The mask of an annotation, all its parts together."""
        if identity not in self.rles:
            entry = self.entry(identity, image)
            what = f"{self.path}: annotations[{self.places[identity][0]}] (id {identity!r}): segmentation"
            rles = instance_rles(entry.get("segmentation"), image["height"], image["width"], what)
            if len(rles) != 1:
                raise DataError(f"{what}: expected the mask of one instance, found {len(rles)}", "field")
            self.rles[identity] = rles[0]
        return self.rles[identity]


def _targets(ref: dict[str, Any], image: dict[str, Any], annotations: _Annotations) -> list[RLE]:
    """Masks of what a ref refers to. In a list of annotations [-1] is no-target and crowd regions are left out."""
    ids = ref.get("ann_id")
    if is_id(ids):
        return [annotations.rle(ids, image)]
    if not isinstance(ids, list) or not ids or not all(map(is_id, ids)):
        raise DataError(f"ann_id must be an id or a list of ids, got {ids!r}", "field")
    if ids == [-1]:
        return []
    if len(set(ids)) < len(ids):
        raise DataError(f"ann_id holds an id twice: {ids}", "duplicate")
    instances = [identity for identity in ids if not annotations.entry(identity, image).get("iscrowd")]
    if not instances:
        raise DataError(f"ann_id {ids} names crowd regions only", "reference")
    return [annotations.rle(identity, image) for identity in instances]
