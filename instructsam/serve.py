"""Serve a model over HTTP: picture and instruction in, instances as JSON out.

    instructsam serve
    instructsam serve --checkpoint weights/InstructSAM-2B --device cuda --dtype bfloat16 --max-batch 16
    curl -F image=@photo.jpg -F instruction="the two dogs on the left" http://127.0.0.1:8000/v1/segment

Questions that come at the same time are answered in batches. /health and /metrics (Prometheus) tell how it is, /docs
(and /openapi.json) describes the interface. For this computer alone unless --host says otherwise; INSTRUCTSAM_TOKEN
sets a token that questions must bring. Needs the extra `serve`: pip install "instructsam[serve]".
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def build(args: argparse.Namespace) -> Any:
    """The application with its model loaded. Raises ValueError for settings that cannot work."""
    try:
        from instructsam.serving.app import build_app
        from instructsam.serving.limits import Limits
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "instructsam[serve]"') from error
    from instructsam.inference.model import InstructSAM

    limits = Limits(
        upload_bytes=int(args.max_megabytes * 2**20),
        pixels=int(args.max_megapixels * 1e6),
        waiting_pixels=int(args.max_waiting_megapixels * 1e6),
        seconds=args.timeout,
        least_threshold=args.least_threshold,
    )
    model = InstructSAM.from_pretrained(
        args.checkpoint, args.device, args.dtype, max_new_tokens=args.max_new_tokens, cached_images=args.cached_images
    )
    token = os.environ.get("INSTRUCTSAM_TOKEN")
    return build_app(model, args.checkpoint, limits, token, args.max_batch, args.max_waiting, args.max_wait / 1000)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="instructsam serve", description="Serve a model over HTTP.")
    made.add_argument("--checkpoint", default="tiny", help="folder or hub name of a model (default: the tiny one)")
    made.add_argument("--device", default="auto", help="auto (default: an NVIDIA GPU if there is one), cpu, cuda ...")
    made.add_argument("--dtype", default="auto", help="auto (as stored; default), float32, bfloat16 or float16")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer alone)")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--max-batch", type=int, default=8, help="questions in a batch (default 8)")
    made.add_argument("--max-wait", type=float, default=10, help="milliseconds that a batch waits to fill (default 10)")
    made.add_argument(
        "--max-waiting", type=int, default=64, help="questions at once, further ones get 503 (default 64)"
    )
    made.add_argument("--timeout", type=float, default=60, help="seconds that a question may take (default 60)")
    made.add_argument("--max-megabytes", type=float, default=20, help="of a picture file (default 20)")
    made.add_argument("--max-megapixels", type=float, default=40, help="of a picture (default 40)")
    made.add_argument(
        "--max-waiting-megapixels", type=float, default=400, help="of all pictures that wait, 3 MB each (default 400)"
    )
    made.add_argument("--least-threshold", type=float, default=0.05, help="that may be asked for (default 0.05)")
    made.add_argument("--max-new-tokens", type=int, default=128, help="limit on a written answer (default 128)")
    made.add_argument("--cached-images", type=int, default=4, help="pictures whose features are kept (default 4)")
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        app = build(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    import uvicorn

    uvicorn.run(app, host=args.host, port=args.port, log_level="info", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
