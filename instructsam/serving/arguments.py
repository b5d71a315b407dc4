"""Arguments that the web page and the service share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from instructsam.inference.arguments import add_model_arguments

if TYPE_CHECKING:
    from instructsam.inference.model import InstructSAM
    from instructsam.serving.limits import Limits


def add_server_arguments(parser: argparse.ArgumentParser, port: int, cached_images: int) -> None:
    """Those of the model, where to listen, and how large a picture may be; with these defaults."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--cached-images", type=int, default=cached_images, help=f"pictures kept encoded (default {cached_images})")
    add("--host", default="127.0.0.1", help="address to listen on (default: this computer alone)")
    add("--port", type=int, default=port, help=f"(default {port})")
    add("--max-megabytes", type=float, default=20, help="of a picture file (default 20)")
    add("--max-megapixels", type=float, default=40, help="of a picture (default 40)")


def limits_of(args: argparse.Namespace, **more: Any) -> Limits:
    """Limits of pictures; `more` are others. Raises ValueError for limits that cannot be."""
    from instructsam.serving.limits import Limits

    return Limits(upload_bytes=int(args.max_megabytes * 2**20), pixels=int(args.max_megapixels * 1e6), **more)


def load_model(args: argparse.Namespace) -> InstructSAM:
    """The model. Raises ValueError as `InstructSAM.from_pretrained`."""
    from instructsam.inference.model import InstructSAM

    return InstructSAM.from_pretrained(
        args.checkpoint, args.device, args.dtype, max_new_tokens=args.max_new_tokens, cached_images=args.cached_images
    )
