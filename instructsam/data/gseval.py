"""Reader of GSEval: JSON lines, one caption each (DESIGN section 9).

    {"idx": 7, "image_path": "...", "class_id": 0, "label": "...", "caption": "...", "box": [...], "segmentation": ...}

The class of a caption (stuff, part, multi, single) is its kind. Box and label are not needed for the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructsam.data.checks import OnBad, Skips, is_id, read_bytes
from instructsam.data.eval_split import Collector, EvalSplit, as_phrase, name_of, turn_of, union_rles


def read_gseval(
    root: Path | str,
    split: str,
    name: str,
    file: str,
    image_root: Path | str,
    classes: Mapping[Any, str],
    on_bad: OnBad = "raise",
    max_bad: int | None = None,
) -> EvalSplit:
    """Read one file; ids are NAME/SPLIT/IDX.

    Args:
        file: below ``root``; ``{split}`` in it stands for the split.
        image_root: folder that ``image_path`` is relative to.
        classes: class_id -> kind.
        on_bad, max_bad: see `instructsam.data.checks.Skips`.

    Raises:
        ValueError: naming file, line and reason: broken lines, unknown classes, ids that occur twice, empty captions,
            masks that are malformed, empty or none, missing pictures.
    """
    kinds = {str(key): kind for key, kind in classes.items()}
    path = Path(root) / file.replace("{split}", split)
    collector = Collector(name, split, path, image_root, Skips(on_bad, max_bad))
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with collector.entry(where):
            entry = json.loads(line)
            image = name_of(entry, "image_path")
            if not is_id(entry.get("idx")):
                raise ValueError(f"idx must be a number or a string, got {entry.get('idx')!r}")
            if str(entry.get("class_id")) not in kinds:
                raise ValueError(f"class_id {entry.get('class_id')!r} is none of {', '.join(kinds)}")
            segmentation = entry.get("segmentation")
            height, width = collector.size_of(image, entry, segmentation)
            rles = union_rles(segmentation, height, width, "segmentation")
            if not rles:
                raise ValueError("has no segmentation")
            caption = entry.get("caption")
            phrase = as_phrase(caption) if isinstance(caption, str) else ""
            turn = turn_of(entry["idx"], caption, rles, phrase, kinds[str(entry["class_id"])])
            collector.add(where, image, (height, width), turn)
    return collector.finish()
