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

from instructsam.serving.arguments import add_server_arguments, limits_of, load_model


def build(args: argparse.Namespace) -> Any:
    """The application with its model loaded. Raises ValueError for settings that cannot work."""
    try:
        from instructsam.serving.app import build_app
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "instructsam[serve]"') from error
    limits = limits_of(
        args,
        waiting_pixels=int(args.max_waiting_megapixels * 1e6),
        seconds=args.timeout,
        least_threshold=args.least_threshold,
    )
    model, token = load_model(args), os.environ.get("INSTRUCTSAM_TOKEN")
    return build_app(model, args.checkpoint, limits, token, args.max_batch, args.max_waiting, args.max_wait / 1000)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="instructsam serve", description="Serve a model over HTTP.")
    add_server_arguments(made, port=8000, cached_images=4)
    add = made.add_argument
    add("--max-batch", type=int, default=8, help="questions in a batch (default 8)")
    add("--max-wait", type=float, default=10, help="milliseconds that a batch waits to fill (default 10)")
    add("--max-waiting", type=int, default=64, help="questions at once, further ones get 503 (default 64)")
    add("--max-waiting-megapixels", type=float, default=400, help="of pictures that wait, 3 MB each (default 400)")
    add("--timeout", type=float, default=60, help="seconds that a question may take (default 60)")
    add("--least-threshold", type=float, default=0.05, help="that may be asked for (default 0.05)")
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
