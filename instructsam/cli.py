"""The command `instructsam`: lists all commands and runs one.

    instructsam
    instructsam segment photo.jpg -i "every person"
    instructsam train experiment=tiny_world

`instructsam NAME ...` is `python -m instructsam.NAME ...`, which launchers such as torchrun and accelerate want.
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import sys
from importlib import metadata
from pathlib import Path

COMMANDS = (
    "segment",
    "demo",
    "serve",
    "train",
    "evaluate",
    "compare",
    "ablate",
    "prepare",
    "validate",
    "inspect",
    "make_tiny_world",
    "merge",
    "export",
)


def summary(command: str) -> str:
    """The first line of a command's docstring; the command is not imported."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    return lines[0].rstrip(".") if lines else ""


def listing() -> str:
    """What `instructsam` alone prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {command:<{width}}  {summary(command)}" for command in COMMANDS]
    return "\n".join(
        ["usage: instructsam COMMAND ...", "", *rows, "", "`instructsam COMMAND --help` says what a command takes."]
    )


def main() -> None:
    """Entry point of the console script."""
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has seen enough: `instructsam ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run() -> None:
    """List the commands, or run the one that is named."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return
    if arguments[0] in ("-V", "--version"):
        print(metadata.version("instructsam"))
        return
    command = arguments[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        print(f"instructsam: no command {command!r}{hint}\n\n{listing()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"instructsam {command}", *arguments[1:]]
    runpy.run_module(f"instructsam.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
