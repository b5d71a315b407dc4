"""Reader of GSEval: JSON lines, one caption each (DESIGN section 9).

    {"idx": 7, "image_path": "...", "class_id": 0, "label": "...", "caption": "...", "box": [...], "segmentation": ...}

The class of a caption (stuff, part, multi, single) is its kind. Box and label are not needed for the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructsam.data.checks import Place, Skips, is_id, parse_json
from instructsam.data.eval_split import Collector, EvalSplit, as_phrase, name_of, turn_of, union_rles
from instructsam.data.json_stream import stream_json_lines
from instructsam.errors import DataError


def read_gseval(
    root: Path | str,
    split: str,
    name: str,
    file: str,
    image_root: Path | str,
    classes: Mapping[Any, str],
    skips: Skips | None = None,
) -> EvalSplit:
    """Read one file; ids are NAME/SPLIT/IDX.

    Args:
        file: below ``root``; ``{split}`` in it stands for the split.
        image_root: folder that ``image_path`` is relative to.
        classes: class_id -> kind.
        skips: what to do about bad records; raises at the first by default.

    Raises:
        ValueError: naming file, line and reason: broken lines, unknown classes, ids that occur twice, empty captions,
            masks that are malformed, empty or none, missing pictures.
    """
    kinds = {str(key): kind for key, kind in classes.items()}
    path = Path(root) / file.replace("{split}", split)
    collector = Collector(name, split, path, image_root, skips or Skips())
    for number, line in stream_json_lines(path):
        where = Place(path, str(number))
        with collector.entry(where):
            entry = parse_json(line)
            image = name_of(entry, "image_path")
            if not is_id(entry.get("idx")):
                raise DataError(f"idx must be a number or a string, got {entry.get('idx')!r}", "field")
            if str(entry.get("class_id")) not in kinds:
                raise DataError(f"class_id {entry.get('class_id')!r} is none of {', '.join(kinds)}", "reference")
            segmentation = entry.get("segmentation")
            height, width = collector.size_of(image, entry, segmentation)
            rles = union_rles(segmentation, height, width, "segmentation")
            if not rles:
                raise DataError("has no segmentation", "field")
            caption = entry.get("caption")
            phrase = as_phrase(caption) if isinstance(caption, str) else ""
            turn = turn_of(entry["idx"], caption, rles, phrase, kinds[str(entry["class_id"])])
            collector.add(where, image, (height, width), turn)
    return collector.finish()
