"""What the feature cache saves: the first instruction about a picture against the second, at full size.

Run from the repository root (random weights; about 8 GiB of memory and some minutes on a CPU):

    PYTHONPATH=.:scripts python scripts/bench/cached_pictures.py
    PYTHONPATH=.:scripts python scripts/bench/cached_pictures.py --device cuda --repeats 5
    PYTHONPATH=.:scripts python scripts/bench/cached_pictures.py --tiny                    # in seconds, tiny sizes

The picture is matplotlib's photograph unless one is given. Each row is the median of the repeats; a repeat is a picture
that was not seen before (the same one with another pixel changed), asked about twice with different phrases, so that
nothing but both encoders' features is the same.
"""

from __future__ import annotations

import argparse
import statistics

from PIL import Image
from smoke_full_size import PHRASES, build, default_picture
from smoke_measure import machine

from instructsam.inference.model import InstructSAM
from instructsam.models.placement import as_device, as_dtype
from instructsam.processing.image_files import load_image

OTHER = ("the hand", "the cap")


def measure(model: InstructSAM, picture: Image.Image, repeat: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the parts of a first and of a second question."""
    picture = picture.copy()
    picture.putpixel((0, 0), (repeat, 0, 0))
    found = [model.segment(picture, phrases=words) for words in (PHRASES, OTHER)]
    assert [result.prediction.meta["cached"] for result in found] == [False, True]
    first, second = (result.prediction.meta["seconds"] for result in found)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description="What the feature cache saves.")
    parser.add_argument("picture", nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device, picture = as_device(args.device), load_image(args.picture or default_picture())
    dtype = as_dtype(args.dtype)
    assert dtype is not None
    predictor = build(args.tiny, None, [*PHRASES, *OTHER, " and "], dtype)
    predictor.model.to(device)
    model = InstructSAM(predictor)
    measure(model, picture, 0)  # what happens only once
    runs = [measure(model, picture, repeat) for repeat in range(1, args.repeats + 1)]
    print(machine(device), f"picture {picture.width}x{picture.height}, {args.dtype}, {args.repeats} repeats")
    totals = []
    for name, which in (("first", 0), ("second", 1)):
        parts = {part: statistics.median(run[which][part] for run in runs) for part in runs[0][which]}
        totals.append(statistics.median(sum(run[which].values()) for run in runs))
        print(f"{name:7} {totals[-1]:8.3f} s  " + "  ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items()))
    print(f"the second is {totals[0] / totals[1]:.1f} times as fast")


if __name__ == "__main__":
    main()
