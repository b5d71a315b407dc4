"""Reader of sets in the style of SA-Co: COCO instances whose "images" are pairs of a picture and a noun phrase.

    {"images": [{"id", "file_name", "text_input", "height", "width"}],
     "annotations": [{"id", "image_id", "segmentation": RLE, "iscrowd"}]}

The same picture occurs once for each phrase asked about it. A pair without annotations is no-target.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from instructsam.data.checks import Place, Skips, is_id
from instructsam.data.coco_instances import annotations_by_image, images_by_id, load_instances
from instructsam.data.eval_split import Collector, EvalSplit, instance_rles, turn_of
from instructsam.errors import DataError
from instructsam.structures import RLE
from instructsam.words import is_text


def read_saco(
    root: Path | str,
    split: str,
    name: str,
    file: str,
    image_root: Path | str,
    skips: Skips | None = None,
) -> EvalSplit:
    """Read one file; ids are NAME/SPLIT/ID of the pair. Crowd regions are no instances and are left out.

    Args:
        file: below ``root``; ``{split}`` in it stands for the split.
        image_root: folder that ``file_name`` is relative to.
        skips: what to do about bad records; raises at the first by default. A pair with a bad annotation is left out
            as a whole, since its figures would be wrong without it.

    Raises:
        ValueError: naming file, index and reason: ids that are unknown or occur twice, phrases that are empty, masks
            that are malformed, empty or of another size, missing pictures.
    """
    path = Path(root) / file.replace("{split}", split)
    skips = skips or Skips()
    coco = load_instances(path)
    pairs = images_by_id(path, coco["images"], skips)
    annotations = annotations_by_image(path, coco["annotations"], set(pairs), skips)
    entries = [entry for entry in coco["annotations"] if isinstance(entry, dict) and is_id(entry.get("image_id"))]
    stated = Counter(entry["image_id"] for entry in entries)
    collector = Collector(name, split, path, image_root, skips)
    for identity, pair in pairs.items():
        where = Place(path, f"image {identity!r}")
        with collector.entry(where):
            if not is_text(pair.get("text_input")):
                raise DataError(f"the phrase in text_input is empty: {pair.get('text_input')!r}", "text")
            if stated[identity] != len(annotations.get(identity, [])):
                raise DataError("an annotation of it is bad, see above", "reference")
            size = pair["height"], pair["width"]
            rles: list[RLE] = []
            for index, entry in annotations.get(identity, []):
                if entry.get("iscrowd"):
                    continue
                what = f"annotations[{index}] (id {entry['id']!r}): segmentation"
                found = instance_rles(entry.get("segmentation"), *size, what)
                if len(found) != 1:
                    raise DataError(f"{what}: expected the mask of one instance, found {len(found)}", "field")
                rles += found
            phrase = pair["text_input"].strip()
            collector.add(where, pair["file_name"], size, turn_of(identity, phrase, rles, phrase))
    return collector.finish()
