"""Merge a checkpoint's LoRA into its weights: what stage 2 starts from, and what to publish.

    python -m instructsam.merge outputs/stage1/checkpoint outputs/stage1/merged

OUTPUT is an ordinary checkpoint, in the dtype of the first, that needs no peft. It appears at once when all is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def merge(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the merged model and its processor into `output`; returns that folder.

    Raises:
        ValueError: the checkpoint holds no adapter, `output` holds something already; whatever loading complains of.
    """
    from instructsam.models.checkpoints import new_folder
    from instructsam.models.factory import load_processor
    from instructsam.models.hub import resolve
    from instructsam.models.lora import has_lora, merge_lora, save_with_adapter
    from instructsam.models.modeling import InstructSAMModel

    folder = resolve(checkpoint, "InstructSAM")
    with new_folder(output) as unfinished:
        model = InstructSAMModel.from_pretrained(folder)
        if not has_lora(model):
            raise ValueError(f"{folder}: holds no adapter, so there is nothing to merge")
        merge_lora(model)
        save_with_adapter(model, unfinished)
        load_processor(folder, model.config).save_pretrained(unfinished)
    return Path(output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m instructsam.merge", description="Merge a checkpoint's LoRA into its weights."
    )
    parser.add_argument("checkpoint", help="model folder with an adapter/ in it")
    parser.add_argument("output", help="folder to write; must be new or empty")
    args = parser.parse_args(arguments)
    try:
        print(f"written: {merge(args.checkpoint, args.output)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
