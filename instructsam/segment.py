"""Segment pictures: files, folders, patterns, or a JSONL of jobs.

    instructsam segment photo.jpg -i "the two dogs on the left"
    instructsam segment photos/ "more/*.png" -i "every person" --output outputs/people --write overlay,masks,coco
    instructsam segment photo.jpg --phrase "red circles" --phrase "blue squares" --json
    instructsam segment --jobs jobs.jsonl --checkpoint weights/InstructSAM-2B --device cuda --dtype bfloat16

Prints every instance's phrase, score and box, and writes results.jsonl with what --write names. The same command again
goes on where an interrupted one stopped: what is done is printed first, and files that other --write kinds want are
made of it; a picture that has changed is asked about anew. With --json a line of JSON is printed for each job (messages
go to stderr), and files are written with --output only. Exit status: 0 all done, 1 some could not be done (each is
said), 2 nothing could be started, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from instructsam.inference.arguments import add_model_arguments, add_threshold

if TYPE_CHECKING:
    from instructsam.segmenting.jobs import FileJob
    from instructsam.segmenting.running import Outcome
    from instructsam.segmenting.store import ResultStore

DEFAULT_OUTPUT = "outputs/segment"
KINDS = ("overlay", "masks", "coco", "labelme")


def segment(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status. Raises ValueError or OSError where nothing can be started."""
    from instructsam.segmenting.jobs import find_pictures, jobs_of, read_jobs

    if args.jobs and (args.inputs or args.instruction or args.phrase):
        raise ValueError("--jobs says all that is to be done: give no pictures, --instruction or --phrase with it")
    if not args.jobs and not args.inputs:
        raise ValueError("no picture is given: name files, folders or patterns, or --jobs")
    jobs = read_jobs(args.jobs) if args.jobs else jobs_of(find_pictures(args.inputs), args.instruction, args.phrase)
    kinds = [kind for kind in args.write.split(",") if kind]
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"--write {unknown[0]}: not one of {', '.join(KINDS)}")

    from instructsam.evaluation.fingerprint import configuration_digest, weights_digest
    from instructsam.inference.model import InstructSAM
    from instructsam.inference.selection import check_selection
    from instructsam.models.hub import resolve
    from instructsam.segmenting.running import check_texts, run_jobs
    from instructsam.segmenting.store import ResultStore

    check_selection(args.threshold, args.top_k, args.nms_iou)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    folder = resolve(args.checkpoint, "InstructSAM")
    output = args.output or (None if args.json else DEFAULT_OUTPUT)
    opened: ResultStore | nullcontext[None] = nullcontext()
    if output:
        choices = ("threshold", "top_k", "nms_iou", "max_new_tokens", "decoding", "dtype")
        settings = {"weights": weights_digest(folder), "configuration": configuration_digest(folder)}
        settings |= {key: getattr(args, key) for key in choices}
        opened = ResultStore(output, settings, kinds, args.restart)
    with opened as store:
        if store is not None:
            jobs = store.claim(jobs)
        done = {job.id for job in jobs if store is not None and store.is_done(job)}
        left = [job for job in jobs if job.id not in done]
        outcomes: Iterator[Outcome] = iter(())
        if left:
            model = InstructSAM.from_pretrained(folder, args.device, args.dtype, args.decoding, args.max_new_tokens)
            if not args.jobs:  # in a file of jobs, a text that is of no use is the fault of its own line
                check_texts(model, left)
            outcomes = run_jobs(model, left, args.batch_size, args.threshold, args.top_k, args.nms_iou)
        if store is not None:
            store.start()
        if done:
            print(f"{len(done)} of {len(jobs)} jobs are done already", file=sys.stderr)
        try:
            failed = _tell_all(_lines(store, [job for job in jobs if job.id in done], outcomes), len(jobs), args.json)
            if store is not None:
                store.finish(jobs)
                print(f"written to {output}", file=sys.stderr if args.json else sys.stdout)
        except BrokenPipeError:  # `cli.main` knows what to do
            raise
        except (OSError, ValueError) as error:  # a full disk, say
            print(f"error: {error}; the same command goes on", file=sys.stderr)
            return 1
    if failed:
        print(f"{failed} of {len(jobs)} jobs failed", file=sys.stderr)
    return 1 if failed else 0


def _lines(store: ResultStore | None, done: Sequence[FileJob], outcomes: Iterable[Outcome]) -> Iterator[dict[str, Any]]:
    """What is known of finished jobs, then what comes of the others; all of it is written."""
    from instructsam.segmenting.store import line_of

    if store is not None:
        yield from map(store.complete, done)
    for job, outcome in outcomes:
        yield line_of(job, outcome) if store is None else store.add(job, outcome)


def _tell_all(lines: Iterable[dict[str, Any]], count: int, as_json: bool) -> int:
    """Print lines as they come; returns the number of failures."""
    from tqdm import tqdm

    failed = 0
    with tqdm(total=count, unit="job", disable=as_json or count < 2) as progress:
        for line in lines:
            failed += "error" in line
            _tell(line, as_json, progress)
            progress.update()
    return failed


def _tell(line: dict[str, Any], as_json: bool, progress: Any) -> None:
    if as_json:
        print(json.dumps(line), flush=True)
    elif "error" in line:
        progress.write(f"{line['id']}: FAILED: {line['error']}", file=sys.stderr)
    else:
        result = line["result"]
        cut = "" if result["finished"] else " (cut off by --max-new-tokens)"
        rows = [f"{line['id']}: {result['instruction']} → {result['answer']}{cut}"]
        for number, instance in enumerate(result["instances"], 1):
            box = " ".join(f"{value:.0f}" for value in instance["box"])
            rows.append(f"  {number}. {instance['phrase']}  score {instance['score']:.2f}  box {box}")
        progress.write("\n".join(rows if result["instances"] else [*rows, "  no instance"]))


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="instructsam segment", description="Segment pictures.")
    made.add_argument("inputs", nargs="*", metavar="PICTURE", help="files, folders (with those inside), patterns")
    made.add_argument("-i", "--instruction", action="append", default=[], help="what to segment (repeat for several)")
    made.add_argument(
        "-p", "--phrase", action="append", default=[], help="segment this phrase, nothing is written (repeat)"
    )
    made.add_argument("--jobs", help='JSONL of {"image": ..., "instruction": ... or "phrases": [...], "id": ...}')
    add_model_arguments(made)
    made.add_argument("--output", help=f"folder for results (default {DEFAULT_OUTPUT}; with --json none)")
    made.add_argument("--write", default="overlay,coco", help=f"of {', '.join(KINDS)} (default overlay,coco)")
    made.add_argument("--json", action="store_true", help="print one line of JSON for each job")
    made.add_argument("--restart", action="store_true", help="throw away what was written into the output folder")
    add_threshold(made, "keep instances with a higher score")
    made.add_argument("--top-k", type=int, help="keep the so many best of each job")
    made.add_argument("--nms-iou", type=float, help="of instances of a phrase that overlap more, keep the best one")
    made.add_argument("--batch-size", type=int, default=8, help="jobs at once (default 8)")
    made.add_argument("--decoding", default="trained", help="trained (default), or released: as the released code does")
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        code = segment(args)
    except BrokenPipeError:  # `cli.main` knows what to do
        raise
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
