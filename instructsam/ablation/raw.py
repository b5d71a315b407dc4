"""Every instruction of every run of an ablation in one small file: what its figures follow from, without masks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instructsam.evaluation.average_precision import IOU_THRESHOLDS
from instructsam.evaluation.measure import Measurements

COLUMNS = {
    "cell": "its name",
    "seed": "of its training",
    "id, kind": "of the instruction",
    "truths, kept, duplicates": "numbers of instances",
    "iou": "of the unions of kept and of true instances",
    "scores": "of the predictions, falling",
    "hits": "of each prediction, how many of the ten IoU thresholds (0.50 … 0.95) it is a hit at, from the lowest on",
}


def write_raw(runs: Mapping[str, Mapping[int, Measurements]], path: Path) -> None:
    """Write the measured records of cell -> seed as a Parquet file; columns as in ``COLUMNS``.

    A prediction may miss its match at a low threshold and hit at a higher one (another one took it there); its
    ``hits`` then count only up to the first miss.
    """
    parts = [_table(cell, seed, found) for cell, seeds in runs.items() for seed, found in seeds.items()]
    if not parts:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(pa.concat_tables(parts), temporary, compression="zstd")
    os.replace(temporary, path)


def _table(cell: str, seed: int, found: Measurements) -> pa.Table:
    assert len(found.hits_TP) == len(IOU_THRESHOLDS)
    size, starts = len(found), pa.array(found.starts.astype(np.int32))
    hits_P = np.logical_and.accumulate(found.hits_TP, axis=0).sum(axis=0).astype(np.int8)
    same = {"cell": pa.array([cell] * size).dictionary_encode(), "seed": pa.array(np.full(size, seed, np.int64))}
    columns = {
        **same,
        "id": pa.array(found.ids.tolist(), pa.string()),
        "kind": pa.array(found.kinds.tolist(), pa.string()),
        "truths": pa.array(found.num_truths_R.astype(np.int16)),
        "kept": pa.array(found.num_kept_R.astype(np.int16)),
        "duplicates": pa.array(found.num_duplicates_R.astype(np.int16)),
        "iou": pa.array(found.iou_R.astype(np.float32)),
        "scores": pa.ListArray.from_arrays(starts, pa.array(found.scores_P.astype(np.float32))),
        "hits": pa.ListArray.from_arrays(starts, pa.array(hits_P)),
    }
    return pa.table(columns)
