"""A web page to try a model: upload a picture, type an instruction, see the instances.

    instructsam demo
    instructsam demo --checkpoint weights/InstructSAM-2B --device cuda --dtype bfloat16

Starts with the tiny model and pictures of its world. For this computer alone unless --host says otherwise; nothing is
fetched from or sent to anywhere. Needs the extra `demo`: pip install "instructsam[demo]".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from instructsam.inference.arguments import add_threshold
from instructsam.serving.arguments import add_server_arguments, limits_of, load_model

SESSIONS = 64
"""So many visitors' conversations are kept, the latest; each holds a picture, of 3 bytes a pixel."""


def build(args: argparse.Namespace, folder: str | Path) -> Any:
    """The page with its model loaded.

    Args:
        args: see `parser`.
        folder: for the pictures of the examples, which the page needs as long as it is shown.

    Raises:
        ValueError: settings that cannot work.
    """
    try:
        from instructsam.webpage.page import build_page
    except ImportError as error:
        raise ValueError(f'{error.name} is missing: pip install "instructsam[demo]"') from error
    from instructsam.webpage.asking import HIGHEST, LOWEST, Asker
    from instructsam.webpage.examples import write_examples

    if not LOWEST <= args.threshold <= HIGHEST:
        raise ValueError(f"--threshold {args.threshold}: the slider goes from {LOWEST} to {HIGHEST}")
    limits, model = limits_of(args), load_model(args)
    about, examples = f"Model: `{args.checkpoint}`.", []
    if args.checkpoint == "tiny":
        about = "This is the tiny model: it knows pictures of coloured shapes, as in the examples, and nothing else."
        examples = write_examples(folder)
    return build_page(Asker(model, limits), examples, args.threshold, about, args.max_waiting)


def launch(page: Any, args: argparse.Namespace, block: bool = True) -> Any:
    """Show the page; returns its address if `block` is false."""
    from instructsam.webpage.page import CSS, theme

    started = page.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=not block,
        max_file_size=int(args.max_megabytes * 2**20),
        state_session_capacity=SESSIONS,
        enable_monitoring=False,
        share=False,
        quiet=True,
        theme=theme(),
        css=CSS,
        footer_links=[],
    )
    return started[1]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="instructsam demo", description="A web page to try a model.")
    add_server_arguments(made, port=7860, cached_images=8)
    add_threshold(made, "where the slider stands at first")
    made.add_argument("--max-waiting", type=int, default=40, help="visitors that wait, further ones are sent away")
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="instructsam_examples_") as folder:
        try:
            page = build(args, folder)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print(f"http://{args.host}:{args.port} (Ctrl+C ends it)", flush=True)
        launch(page, args)


if __name__ == "__main__":
    main()
