"""Arguments that the commands which use a model share."""

from __future__ import annotations

import argparse

from instructsam.structures import DEFAULT_THRESHOLD


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and how: ``checkpoint``, ``device``, ``dtype``, ``max_new_tokens``."""
    add = parser.add_argument
    add("--checkpoint", default="tiny", help="folder or hub name of a model (default: the tiny one)")
    add("--device", default="auto", help="auto (default: an NVIDIA GPU if there is one), cpu, cuda ...")
    add("--dtype", default="auto", help="auto (as stored; default), float32, bfloat16 or float16")
    add("--max-new-tokens", type=int, default=128, help="limit on a written answer (default 128)")


def add_threshold(parser: argparse.ArgumentParser, about: str) -> None:
    """``threshold``."""
    parser.add_argument(
        "--threshold", type=float, default=DEFAULT_THRESHOLD, help=f"{about} (default {DEFAULT_THRESHOLD})"
    )
