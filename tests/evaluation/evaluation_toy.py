"""A segmenter that computes its answers from the instruction, and a script that runs it: by itself or in processes."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from instructsam.evaluation import ranks
from instructsam.evaluation.metrics import evaluate_records
from instructsam.evaluation.runner import EvalItem, run
from instructsam.masks import encode
from instructsam.structures import Instance, PhraseTarget, Prediction, Sample, Turn

HEIGHT, WIDTH = 12, 16


def _mask(generator: random.Random) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    top, left = generator.randrange(8), generator.randrange(10)
    mask[top : top + 4, left : left + 6] = True
    return mask


def items(count: int) -> list[EvalItem]:
    """Instructions of varying length; every fifth asks for nothing."""
    found = []
    for k in range(count):
        generator = random.Random(k)
        rles = tuple(encode(_mask(generator)) for _ in range(k % 5 % 3))
        words = " ".join(f"word{k}" for _ in range(1 + k * 7 % 11))
        turn = Turn(words, (PhraseTarget("a thing", rles),), id=f"toy/{k}")
        found.append(EvalItem(Sample(f"image{k}", Path(f"image{k}.png"), HEIGHT, WIDTH, (turn,)), turn))
    return found


class Toy:
    """Answers from the words alone. `answered` counts; with `kill_after` the process dies when so many are reached."""

    name = "toy"

    def __init__(self, seed: int = 0, kill_after: int | None = None) -> None:
        self.seed = seed
        self.kill_after = kill_after
        self.answered = 0

    def describe(self) -> dict:
        return {"name": "toy", "seed": self.seed}

    def segment(self, images, instructions, *, threshold):
        if self.kill_after is not None and self.answered >= self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.answered += len(instructions)
        found = []
        for instruction in instructions:
            generator = random.Random(zlib.crc32(f"{self.seed} {instruction}".encode()))
            drawn = [(generator.random(), encode(_mask(generator))) for _ in range(4)]
            kept = tuple(Instance(rle, s, (0.0, 0.0, 4.0, 4.0), "a thing", 0) for s, rle in drawn if s > threshold)
            found.append(Prediction(f"a thing ({instruction})", ("a thing",), kept, HEIGHT, WIDTH))
        return found


class StagedToy(Toy):
    """The same in three stages."""

    def prepare(self, images, instructions):
        return images, instructions

    def compute(self, prepared):
        return prepared

    def finish(self, computed, threshold):
        return self.segment(*computed, threshold=threshold)

    def estimate_length(self, height, width, instruction):
        if width > 200 * height:
            raise ValueError("a picture thinner than 1:200")
        return len(instruction.split())

    def describe(self):
        return super().describe()


def told_predictor() -> Any:
    """The class of an InstructSAM that is given its phrases, so that also an untrained one has masks to show."""
    from instructsam.predictor import Predictor

    class Told(Predictor):
        def prepare(self, images, instructions):
            phrases = [["red circles", "stars"][: 1 + len(instruction) % 2] for instruction in instructions]
            return self._encode(images, instructions, phrases)

        def segment(self, images, instructions, *, threshold):  # type: ignore[override]
            return self.finish(self.compute(self.prepare(images, instructions)), threshold)

    return Told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("segmenter", choices=["toy", "model"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--checkpoint")
    parser.add_argument("--root")
    args = parser.parse_args()
    ranks.join()
    rank, _ = ranks.rank_and_world()
    if args.segmenter == "toy":
        segmenter, asked = StagedToy(kill_after=args.kill_after), items(100)
        records = run(segmenter, asked, args.path, batch_size=7, workers=1, progress=False)
        with args.path.with_suffix(".shares").open("a") as file:
            file.write(f"{segmenter.answered}\n")
        same = run(StagedToy(), asked, batch_size=7, progress=False) == records
        args.path.with_suffix(".memory").write_text("same" if same else "different")
    else:
        from instructsam.data.coco_instructions import read_coco_instructions
        from instructsam.evaluation.runner import flatten

        predictor = told_predictor().from_pretrained(args.checkpoint, max_new_tokens=6)
        asked = flatten(read_coco_instructions(args.root, "val"), 30)
        records = run(predictor, asked, args.path, threshold=0.02, batch_size=6, progress=False)
    if rank == 0:
        args.path.with_suffix(".figures").write_text(json.dumps(evaluate_records(records)["overall"]))
    ranks.leave()


if __name__ == "__main__":
    main()
