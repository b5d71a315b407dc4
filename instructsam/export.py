"""Convert a checkpoint between our layout and the released one, tensor by tensor and bit by bit.

    python -m instructsam.export outputs/stage2/merged outputs/released                    # ours → released
    python -m instructsam.export weights/InstructSAM-2B outputs/ours --layout instructsam  # released → ours

The output holds model, tokenizer and image settings, and appears at once when all is written. The released layout has
no place for what only training reads (max_length, mask_resize).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

LAYOUTS = ("released", "instructsam")


def export(
    checkpoint: str,
    output: str | Path,
    layout: str = "released",
    max_shard_size: str = "5GB",
    report: str | None = None,
) -> Path:
    """Write `checkpoint` (a folder or hub name in either layout) to the folder `output` in `layout`.

    `report` names a JSON file for what became of every tensor when it was loaded.

    Raises:
        ValueError: LoRA that is not merged, an `output` that holds something, and whatever loading complains of.
    """
    from instructsam.models.checkpoints import new_folder
    from instructsam.models.factory import load_processor
    from instructsam.models.hub import resolve
    from instructsam.models.lora import has_lora
    from instructsam.models.modeling import InstructSAMModel
    from instructsam.models.released import export_released
    from instructsam.processing.preprocessor_config import PREPROCESSOR_CONFIG

    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if report is not None and not Path(report).resolve().parent.is_dir():
        raise ValueError(f"report={report}: there is no such folder")
    folder = resolve(checkpoint, "InstructSAM")
    with new_folder(output) as unfinished:
        model = InstructSAMModel.from_pretrained(folder)
        if has_lora(model):
            raise ValueError(f"{folder}: merge its LoRA first: python -m instructsam.merge {folder} OUTPUT")
        processor = load_processor(folder, model.config)
        if layout == "released":
            names = export_released(model, unfinished, max_shard_size)
            image = json.dumps(processor.vlm_image.to_preprocessor_config(), indent=2) + "\n"
            (unfinished / PREPROCESSOR_CONFIG).write_text(image, encoding="utf-8")
            processor.tokenizer.save_pretrained(str(unfinished))
        else:
            model.save_pretrained(unfinished, max_shard_size=max_shard_size)
            processor.save_pretrained(unfinished)
            names = list(model.state_dict())
    if report is not None:
        model.load_report.write(report)
    print(f"{model.load_report}\n{len(names)} tensors written to {output} in the {layout} layout")
    return Path(output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m instructsam.export", description="Convert a checkpoint between our layout and the released one."
    )
    parser.add_argument("checkpoint", help="folder or hub name, in either layout")
    parser.add_argument("output", help="folder to write; must be new or empty")
    parser.add_argument("--layout", choices=LAYOUTS, default="released")
    parser.add_argument("--max-shard-size", default="5GB", help="size of a safetensors file at most (default 5GB)")
    parser.add_argument("--report", help="JSON file for what became of every tensor")
    args = parser.parse_args(arguments)
    try:
        export(args.checkpoint, args.output, args.layout, args.max_shard_size, args.report)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
