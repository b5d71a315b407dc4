"""Pictures of the tiny world with instructions, for a page that knows nothing else."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from instructsam.data.tiny_world import make_example

SEED = 2026
WANTED = ("category", "spatial", "superlative", "negation", "counting", "phrases")


def write_examples(folder: str | Path) -> list[tuple[str, str]]:
    """Write the pictures and return (path, instruction): one of each wanted kind, enlarged for people."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[str, str]] = {}
    for index in range(200):
        scene, instructions = make_example(SEED, "examples", index)
        for instruction in instructions:
            if instruction.kind in WANTED and instruction.kind not in found:
                path = folder / f"shapes_{index:03d}.png"
                Image.fromarray(scene.image).save(path)
                found[instruction.kind] = (str(path), instruction.text)
                break
        if len(found) == len(WANTED):
            break
    return [found[kind] for kind in WANTED]
