"""Segment one picture.

    python -m instructsam.segment IMAGE "instruction" --checkpoint outputs/tiny_stage2/checkpoint
    python -m instructsam.segment IMAGE --phrase "red circles" --phrase "blue squares"
    python -m instructsam.segment IMAGE "instruction" --decoding released --device cuda --dtype bfloat16

Prints the answer with its phrases and every instance's score and box; writes an overlay (PNG) and the masks (COCO RLE,
JSON) next to each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from instructsam.structures import Prediction

DEFAULT_CHECKPOINT = "checkpoints/tiny"


def as_json(prediction: Prediction, image: str, instruction: str | None) -> dict:
    """The prediction as plain data; masks are COCO RLE at image size, boxes xyxy in pixels."""
    return {
        "image": image,
        "instruction": instruction,
        "height": prediction.height,
        "width": prediction.width,
        "answer": prediction.answer,
        "phrases": list(prediction.phrases),
        "instances": [
            {
                "phrase": instance.phrase,
                "phrase_index": instance.phrase_index,
                "score": instance.score,
                "box": list(instance.box),
                "segmentation": instance.rle,
            }
            for instance in prediction.instances
        ],
    }


def segment(args: argparse.Namespace) -> Prediction:
    """Run the command; see the module's docstring."""
    from instructsam.predictor import Predictor
    from instructsam.processing.images import load_image
    from instructsam.visualization import overlay, save_png

    image = load_image(args.image)
    predictor = Predictor.from_pretrained(args.checkpoint, args.device, args.dtype, args.decoding)
    prediction = predictor.segment(
        [image],
        None if args.instruction is None else [args.instruction],
        phrases=[args.phrase] if args.phrase else None,
        threshold=args.threshold,
        max_new_tokens=args.max_new_tokens,
    )[0]
    print(f"answer: {prediction.answer}")
    print(f"phrases: {', '.join(prediction.phrases) or 'none'}; instances: {len(prediction.instances)}")
    for number, instance in enumerate(prediction.instances, 1):
        x1, y1, x2, y2 = instance.box
        print(f"  {number}. {instance.phrase}  score {instance.score:.2f}  box {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    stem = Path(args.image).stem
    save_png(overlay(image, prediction.instances), output / f"{stem}_overlay.png")
    (output / f"{stem}.json").write_text(json.dumps(as_json(prediction, str(args.image), args.instruction), indent=2))
    print(f"written: {output / f'{stem}_overlay.png'}, {output / f'{stem}.json'}")
    return prediction


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m instructsam.segment", description="Segment one picture.")
    parser.add_argument("image", help="path of the picture")
    parser.add_argument("instruction", nargs="?", help="what to segment; may be left out with --phrase")
    parser.add_argument(
        "--phrase", action="append", default=[], help="segment this phrase, nothing is written (repeat)"
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help=f"model folder (default {DEFAULT_CHECKPOINT})")
    parser.add_argument("--output", default="outputs/segment", help="folder for overlay and masks")
    parser.add_argument("--threshold", type=float, default=0.3, help="keep instances with a higher score")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="auto", help="auto (as stored; default), float32, bfloat16 or float16")
    parser.add_argument(
        "--decoding", default="trained", help="trained (default), or released: as the released inference code does"
    )
    args = parser.parse_args(arguments)
    try:
        segment(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
