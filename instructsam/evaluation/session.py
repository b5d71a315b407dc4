"""One evaluation of a checkpoint: check what is asked, read the benchmarks, run the model, write the reports.

One process or several (`evaluation.ranks`); everything that one needs is known to work before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from instructsam.evaluation import ranks
from instructsam.evaluation.benchmarks import Benchmark, expand, load_benchmark
from instructsam.evaluation.fingerprint import configuration_digest, weights_digest
from instructsam.evaluation.output import Metrics, Wanted, figures_of, write_all, write_summary
from instructsam.evaluation.reliance import query_reliance
from instructsam.evaluation.runner import EvalItem, run
from instructsam.models.attention_mask import VARIANTS
from instructsam.models.checkpoints import fresh_model
from instructsam.models.decoding_rules import decoding_rule
from instructsam.models.hub import resolve
from instructsam.models.own_layout import layout_of
from instructsam.models.placement import as_device, as_dtype, cast_parameters
from instructsam.predictor import Predictor

AUTO = ("tiny_world",)  # the benchmarks for which query_reliance=auto is on: it takes two more passes


def evaluate_checkpoint(settings: Mapping[str, Any]) -> dict[str, Metrics]:
    """Run one evaluation as configured.

    Returns:
        {name of the benchmark and split: its figures as in metrics.json}; empty on all ranks but the first.

    Raises:
        ValueError: no checkpoint, data that cannot be read, predictions of another run in the output folder.
    """
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    decoding_rule(settings["decoding"])
    as_dtype(settings["dtype"])
    variant = settings.get("attention_variant")
    if variant is not None and variant not in VARIANTS:
        raise ValueError(
            f"attention_variant={variant}: must be one of {', '.join(VARIANTS)}, or null for the model's own"
        )
    device = as_device(ranks.own_device(settings["device"]))
    checkpoint = resolve(settings["checkpoint"], "InstructSAM")
    own = {key: settings[key] for key in ("threshold", "min_area") if settings[key] is not None}
    loaded = [load_benchmark({**single, **own}) for single in expand(settings["benchmark"])]

    ranks.join()
    try:
        identity = ranks.on_first(
            lambda: {
                "path": str(settings["checkpoint"]),
                "sha256": weights_digest(checkpoint),
                "configuration_sha256": configuration_digest(checkpoint),
                "layout": layout_of(checkpoint),
            }
        )
        predictor = Predictor.from_pretrained(
            checkpoint, device, settings["dtype"], settings["decoding"], settings["max_new_tokens"]
        )
        if variant is not None:
            predictor.model.config.attention_variant = variant  # no tensor hangs on it
        session = _Session(settings, predictor, identity)
        output = output_folder(settings)
        found = {}
        for benchmark, items in loaded:
            name = f"{benchmark.name}_{benchmark.split}"
            metrics = session.evaluate(benchmark, items, output / name if len(loaded) > 1 else output)
            if metrics is not None:
                found[name] = metrics
        if len(found) > 1:
            write_summary(output, found)
        return found
    finally:
        ranks.leave()


def output_folder(settings: Mapping[str, Any]) -> Path:
    """``output_dir``; by default CHECKPOINT/eval, for a model of the hub outputs/eval/ORG--NAME."""
    if settings["output_dir"]:
        return Path(settings["output_dir"])
    checkpoint = Path(settings["checkpoint"])
    return checkpoint / "eval" if checkpoint.is_dir() else Path("outputs/eval") / "--".join(checkpoint.parts)


class _Session:
    """A loaded model that one benchmark after the other is put to."""

    def __init__(self, settings: Mapping[str, Any], predictor: Predictor, identity: Mapping[str, Any]):
        self.settings = settings
        self.predictor = predictor
        self.identity = identity
        self.untrained = self._untrained() if settings["untrained"] else None
        self.first = ranks.rank_and_world()[0] == 0

    def _untrained(self) -> Predictor:
        model, device, dtype = self.predictor.model, self.predictor.model.device, self.predictor.model.dtype
        fresh = fresh_model(model.config, self.settings["seed"])
        cast_parameters(fresh.parameters(), dtype)  # not `fresh.to(dtype)`: the rotary tables stay in float32
        rule, limit = self.predictor.rule, self.predictor.max_new_tokens
        return Predictor(fresh.to(device), self.predictor.processor, rule, limit)

    def evaluate(self, benchmark: Benchmark, items: Sequence[EvalItem], folder: Path) -> Metrics | None:
        """Run one benchmark and write its reports; returns its figures on the first rank."""
        records = self._run(self.predictor, benchmark, items, folder / "predictions.jsonl", self._fingerprint())
        untrained_records = None
        if self.untrained is not None:
            seeded = {"checkpoint": {**self._fingerprint()["checkpoint"], "sha256": f"seed {self.settings['seed']}"}}
            path = folder / "untrained.jsonl"
            untrained_records = self._run(self.untrained, benchmark, items, path, seeded, "untrained model")
        if not self.first:
            return None
        wanted, reliance = Wanted.of(self.settings), None
        if self.settings["query_reliance"] is True or (
            self.settings["query_reliance"] == "auto" and benchmark.name in AUTO
        ):
            reliance = query_reliance(self.predictor, items, records, benchmark.keep_above, self.settings["batch_size"])
        described = self._described(benchmark)
        metrics, measured = figures_of(records, described, wanted)
        metrics |= {"benchmark": described, "checkpoint": dict(self.identity)}
        baseline = None if untrained_records is None else figures_of(untrained_records, described, wanted)[0]
        described_run = self._settings(benchmark)
        cut_off = described_run["cut_off_answers"] = sum(not record["finished"] for record in records)
        names = write_all(folder, metrics, records, measured, wanted, described_run, baseline, reliance)
        if cut_off:
            limit = self.settings["max_new_tokens"]
            print(f"{cut_off} of {len(records)} answers reached max_new_tokens={limit} and may lack phrases")
        print(f"written to {folder}: {', '.join([*names, 'predictions.jsonl'])}")
        return metrics

    def _run(
        self,
        predictor: Predictor,
        benchmark: Benchmark,
        items: Sequence[EvalItem],
        path: Path,
        fingerprint: Mapping[str, Any],
        label: str = "",
    ) -> list[dict[str, Any]]:
        named = {"name": benchmark.name, "split": benchmark.split}
        return run(
            predictor,
            items,
            path,
            benchmark.keep_above,
            self.settings["batch_size"],
            fingerprint={**fingerprint, "benchmark": {**named, "prompt": benchmark.settings["prompt"]}},
            restart=self.settings["restart"],
            extra={"benchmark": benchmark.name, "split": benchmark.split},
            workers=self.settings["workers"],
            label=label or f"{benchmark.name} {benchmark.split}",
        )

    def _fingerprint(self) -> dict[str, dict[str, Any]]:
        return {"checkpoint": {key: self.identity[key] for key in ("sha256", "configuration_sha256")}}

    def _described(self, benchmark: Benchmark) -> dict[str, Any]:
        """What metrics.json says about the benchmark."""
        keys = ("name", "title", "split", "threshold", "inclusive", "min_area", "conventions")
        described = {key: getattr(benchmark, key) for key in keys}
        return {**described, "headline": list(benchmark.headline), "published": list(benchmark.published)}

    def _settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """What metrics.json says about the run."""
        keys = ("checkpoint", "limit", "batch_size", "device", "threads", "seed")
        described = {key: self.settings[key] for key in keys} | self.predictor.describe()
        return {**described, "processes": ranks.rank_and_world()[1], "benchmark": benchmark.settings}
