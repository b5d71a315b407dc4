"""Checking records before anything is measured: what is missing, malformed or there twice (see `metrics`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def checked(records: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The records as a list, with everything but their masks checked, and the name of each for error messages.

    Raises:
        ValueError: for no records; naming the record and the reason, for the first that is malformed or whose id
            occurs twice.
    """
    records = list(records)
    if not records:
        raise ValueError("no records to evaluate")
    seen: set[Any] = set()
    names: list[str] = []
    for index, record in enumerate(records):
        has_id = isinstance(record, Mapping) and "id" in record
        names.append(f"record {record['id']!r}" if has_id else f"record at index {index}")
        try:
            _check_fields(record)
        except ValueError as error:
            raise ValueError(f"{names[-1]}: {error}") from None
        if record["id"] in seen:
            raise ValueError(f"{names[-1]}: occurs twice, the same instruction may be scored once only")
        seen.add(record["id"])
    return records, names


# Tuples of types, since a union is made anew at every test.
_REQUIRED = ("id", "height", "width", "gt_rles", "pred_rles", "pred_scores")
_LISTS = ("gt_rles", "pred_rles", "pred_scores", "pred_boxes", "pred_phrase_ids", "pred_phrases", "gt_phrases")
_WHOLE = (int, np.integer)
_NUMBER = (float, int, np.number)


def _check_fields(record: Any) -> None:
    """Everything about a record but its masks."""
    if type(record) is not dict and not isinstance(record, Mapping):
        raise ValueError(f"expected a dict, got {type(record).__name__}")
    if missing := [key for key in _REQUIRED if key not in record]:
        raise ValueError(f"has no {', '.join(missing)}")
    if not isinstance(record["id"], (str, int)):
        raise ValueError(f"id must be a string or an integer, got {record['id']!r}")
    for key in ("height", "width"):
        if not isinstance(record[key], _WHOLE) or isinstance(record[key], bool) or record[key] <= 0:
            raise ValueError(f"{key} must be a positive integer, got {record[key]!r}")
    for key in ("kind", "text", "instruction"):
        if not isinstance(record.get(key) or "", str):
            raise ValueError(f"{key} must be a string, got {record[key]!r}")
    for key in _LISTS:
        value = record.get(key)
        if not isinstance(value, (list, tuple)) and (value is not None or key in _REQUIRED):
            raise ValueError(f"{key} must be a list, got {type(value).__name__}")
    for key in ("pred_scores", "pred_boxes", "pred_phrase_ids"):
        if record.get(key) is not None and len(record[key]) != len(record["pred_rles"]):
            raise ValueError(f"has {len(record['pred_rles'])} pred_rles, but {len(record[key])} {key}")
    for index, score in enumerate(record["pred_scores"]):
        if not isinstance(score, _NUMBER) or not math.isfinite(score):
            raise ValueError(f"pred_scores[{index}] is {score!r}, not a finite number")
    for key in ("pred_phrases", "gt_phrases"):
        if not all(isinstance(phrase, str) for phrase in record.get(key) or ()):
            raise ValueError(f"{key} must be a list of strings, got {record[key]!r}")
    num_phrases = math.inf if record.get("pred_phrases") is None else len(record["pred_phrases"])
    for index, phrase_id in enumerate(record.get("pred_phrase_ids") or ()):
        if not isinstance(phrase_id, _WHOLE) or not 0 <= phrase_id < num_phrases:
            raise ValueError(f"pred_phrase_ids[{index}] is {phrase_id!r}, not the index of one of its phrases")
