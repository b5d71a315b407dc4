"""Time of the set losses (matching, mask and class losses, backward) against a loop over phrases and queries.

Run from the repository root:

    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/bench/losses.py

Options: ``--device cuda``, ``--phrases 32 --queries 10 --truths 4 --size 288``, ``--repeats 5``, and ``--points 12544``
for the run on sampled points. The loop version computes the same figures the straightforward way: cost query by query
(one host transfer each), losses pair by pair. Both results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from instructsam.losses.criterion import CriterionConfig, SetCriterion, count_targets
from instructsam.losses.mask_losses import PointSampling
from instructsam.losses.matching import assign, mask_sums, matching_cost


def make_batch(args: argparse.Namespace) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """Random logits with smooth blobs as ground truth; every phrase has all its targets valid."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.phrases, args.queries, args.size, args.size)
    coarse = torch.randn(args.phrases, args.truths, 9, 9, generator=generator)
    truth = F.interpolate(coarse, size=shape[2:], mode="bilinear") > 0.3
    outputs = SimpleNamespace(
        pred_masks=torch.randn(shape, generator=generator).to(args.device).requires_grad_(),
        pred_logits=torch.randn(shape[:2], generator=generator).to(args.device).requires_grad_(),
        pred_boxes=torch.rand(*shape[:2], 4, generator=generator).to(args.device).requires_grad_(),
    )
    valid = torch.ones(args.phrases, args.truths, dtype=torch.bool)
    return outputs, {"target_masks": truth.to(args.device), "target_valid": valid.to(args.device)}


def loop_cost(logits: Tensor, score: Tensor, truth: Tensor) -> Tensor:
    """Cost of one phrase, query by query against its ground-truth masks."""
    rows = []
    for n in range(len(logits)):
        prob, mask = logits[n].sigmoid(), truth.float()
        dice = 1 - (2 * (prob * mask).sum((1, 2)) + 1e-3) / (prob.sum() + mask.sum((1, 2)) + 1e-3)
        bce = F.binary_cross_entropy_with_logits(logits[n].expand_as(mask), mask, reduction="none").mean((1, 2))
        rows.append((0.5 * dice + 2.0 * bce + F.softplus(-score[n])).cpu())
    return torch.stack(rows)


def loop_match(outputs: SimpleNamespace, targets: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    matches = []
    with torch.no_grad():
        for p in range(len(outputs.pred_masks)):
            truth = targets["target_masks"][p][targets["target_valid"][p]]
            rows, columns = linear_sum_assignment(
                loop_cost(outputs.pred_masks[p], outputs.pred_logits[p], truth).numpy()
            )
            matches.append((rows.tolist(), columns.tolist()))
    return matches


def loop_losses(outputs: SimpleNamespace, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same terms as the criterion's, pair by pair."""
    bces, dices, classes = [], [], []
    # Unbound once: indexing pair by pair would write a gradient of the whole tensor for every pair.
    masks = [phrase.unbind(0) for phrase in outputs.pred_masks.unbind(0)]
    for p, (rows, columns) in enumerate(loop_match(outputs, targets)):
        soft = torch.zeros_like(outputs.pred_logits[p])
        for n, g in zip(rows, columns, strict=True):
            logits, mask = masks[p][n], targets["target_masks"][p, g].float()
            prob = logits.sigmoid()
            bces.append(F.binary_cross_entropy_with_logits(logits, mask))
            dices.append(1 - (2 * (prob * mask).sum() + 1) / (prob.sum() + mask.sum() + 1))
            with torch.no_grad():
                soft[n] = ((2 * (prob * mask).sum() + 1e-6) / (prob.sum() + mask.sum() + 1e-6)).clamp(min=0.1)
        classes.append(F.binary_cross_entropy_with_logits(outputs.pred_logits[p], soft))
    return {
        "mask_bce": 4.0 * torch.stack(bces).mean(),
        "mask_dice": 0.25 * torch.stack(dices).mean(),
        "cls": torch.stack(classes).mean(),
    }


def vectorised_match(outputs: SimpleNamespace, targets: dict[str, Tensor]) -> None:
    cost = matching_cost(mask_sums(outputs.pred_masks, targets["target_masks"]), outputs.pred_logits)
    assign([cost], targets["target_valid"])


def backward(terms: dict[str, Tensor], outputs: SimpleNamespace) -> None:
    torch.autograd.grad(torch.stack(list(terms.values())).sum(), [outputs.pred_masks, outputs.pred_logits])


def seconds(steps: list[Callable[[], object]], args: argparse.Namespace) -> list[float]:
    """Median time of every step. The steps take turns, so that a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(args.repeats + 1):
        for step, record in zip(steps, times, strict=True):
            start = now(args)
            step()
            if repeat:  # the first round warms up
                record.append(now(args) - start)
    return [statistics.median(record) for record in times]


def now(args: argparse.Namespace) -> float:
    """Wall-clock time once the device has finished what was asked of it."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("phrases", 32),
        ("queries", 10),
        ("truths", 4),
        ("size", 288),
        ("repeats", 5),
        ("points", 12544),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    outputs, targets = make_batch(args)
    counts = count_targets(targets)
    full = SetCriterion()
    sampled = SetCriterion(CriterionConfig(points=PointSampling(num_points=args.points)))

    mine, naive = full(outputs, targets, counts), loop_losses(outputs, targets)
    for name, value in naive.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)

    def row(title: str, fast: float, slow: float) -> None:
        print(f"{title:<44}{fast * 1e3:>10.1f} ms{slow * 1e3:>10.1f} ms{slow / fast:>8.1f} x")

    cuda = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"P={args.phrases} N={args.queries} G={args.truths} masks {args.size}x{args.size} float32")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.device}: {machine}")
    print(f"medians of {args.repeats} runs after one warm-up")
    print(f"{'':<44}{'ours':>13}{'loop':>13}{'ratio':>10}")
    match_ours, match_loop, ours_full, ours_points, loop = seconds(
        [
            lambda: vectorised_match(outputs, targets),
            lambda: loop_match(outputs, targets),
            lambda: backward(full(outputs, targets, counts), outputs),
            lambda: backward(sampled(outputs, targets, counts), outputs),
            lambda: backward(loop_losses(outputs, targets), outputs),
        ],
        args,
    )
    row("matching", match_ours, match_loop)
    row("matching + losses + backward, all pixels", ours_full, loop)
    row(f"same, {args.points} points (loop: all pixels)", ours_points, loop)


if __name__ == "__main__":
    main()
