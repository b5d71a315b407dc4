"""The sources of a training set: how each is read, what it needs, and how often an epoch sees it.

A source is an entry of ``data.sources`` (the files in ``configs/source``)::

    refcoco:
      reader: referring            # a key of READERS; what else is not named below are its arguments
      ...
      repeats: 10                  # how often an epoch sees each sample; 0.5, 1.5 ... too
      weight: null                 # instead of repeats, for all sources or none: share of data.epoch_samples
      held_out: true               # pictures of validation and test splits are left out of it (`data.leakage`)
      needs: [data/refer/refcoco/refs(unc).p]   # files, folders or patterns that must be there; default: its file
      get: scripts/prepare/refer.sh             # says where they come from
      form: phrase                 # for readers of benchmarks: how their instructions are asked
      phrase: object               # for answers that the data set gives no phrase for
      kinds: null                  # instructions of these kinds only
      expected: 120624             # samples there are after all that; another number is told when it is prepared

A new format is a file with a reader and a line in `READERS`; a new data set is a file in ``configs/source``.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from instructsam.data.checks import Skips, is_whole
from instructsam.data.coco_categories import read_coco_categories
from instructsam.data.coco_instructions import stream_coco_instructions
from instructsam.data.coco_parts import read_coco_parts
from instructsam.data.eval_split import EvalSplit
from instructsam.data.gseval import read_gseval
from instructsam.data.leakage import Leakage, held_out_images
from instructsam.data.lisa import read_lisa_plus
from instructsam.data.png_masks import read_png_masks
from instructsam.data.reader_options import reader_options
from instructsam.data.reasonseg import read_reasonseg
from instructsam.data.referring import read_referring
from instructsam.data.release_eval import read_release_eval
from instructsam.data.release_train import read_release_train
from instructsam.data.samples import Mixture, SampleList, Samples
from instructsam.data.source_files import Stamps, check_stamps, stamps
from instructsam.data.table import SampleTable
from instructsam.structures import Sample, Turn

logger = logging.getLogger(__name__)

FORMS = ("", "category", "phrase", "sentence", "ocr")


def _samples_of(read: Callable[..., EvalSplit]) -> Callable[..., Iterator[Sample]]:
    """A benchmark's reader as one of training samples. Pixels to ignore have no meaning there."""

    @functools.wraps(read)  # its arguments are those that a configuration may give
    def samples(**options: Any) -> Iterator[Sample]:
        yield from read(**options).samples

    return samples


READERS: dict[str, Callable[..., Iterator[Sample]]] = {
    "coco_instructions": stream_coco_instructions,
    "referring": _samples_of(read_referring),
    "release_eval": _samples_of(read_release_eval),
    "reasonseg": _samples_of(read_reasonseg),
    "gseval": _samples_of(read_gseval),
    "release_train": read_release_train,
    "coco_categories": read_coco_categories,
    "coco_parts": read_coco_parts,
    "lisa_plus": read_lisa_plus,
    "png_masks": read_png_masks,
}


@dataclass(frozen=True)
class Source:
    """One entry of ``data.sources``; see the head of this file.

    Attributes:
        options: the reader's arguments, without ``skips``.
    """

    name: str
    reader: str
    options: Mapping[str, Any]
    repeats: float = 1
    weight: float | None = None
    held_out: bool = False
    needs: tuple[str, ...] = ()
    get: str = ""
    form: str | None = None
    phrase: str = "object"
    kinds: tuple[str, ...] | None = None
    expected: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that its samples depend on, besides the files: what a table was prepared from."""
        kept = ("reader", "options", "held_out", "form", "phrase", "kinds")
        recipe = {key: getattr(self, key) for key in kept}
        return {**recipe, "options": dict(self.options), "kinds": self.kinds and list(self.kinds)}


_OWN = {field.name for field in dataclasses.fields(Source)} - {"options"}


def parse_sources(settings: Mapping[str, Mapping[str, Any] | None]) -> list[Source]:
    """The sources of a configuration (name -> settings), in order. An entry without settings (null) is left out.

    Raises:
        ValueError: none at all, unknown readers or settings, arguments that are not given.
    """
    sources = []
    for name, entry in settings.items():
        if entry is None:
            continue
        where = f"data.sources.{name}"
        reader = READERS.get(str(entry.get("reader")))
        given = [key for key in ("name", "skips") if reader and key in inspect.signature(reader).parameters]
        _, options = reader_options(READERS, entry, where, _OWN, given)
        own = {key: value for key, value in entry.items() if key in _OWN}
        for key in ("needs", "kinds"):
            if isinstance(own.get(key), str):
                raise ValueError(f"{where}: {key} must be a list, got {own[key]!r}")
        files = [options["file"]] if "file" in options and "root" not in options else []
        own["needs"] = tuple(own.get("needs") or files)
        if own.get("weight") is not None and own.get("repeats") is not None:
            raise ValueError(f"{where}: has repeats and a weight; give one of them (repeats=null for the other)")
        if own.get("repeats") is None:
            own.pop("repeats", None)
        if own.get("kinds") is not None:
            own["kinds"] = tuple(own["kinds"])
        if own.get("form") not in (None, *FORMS):
            raise ValueError(f"{where}: form={own['form']!r} is none of {', '.join(map(repr, FORMS))}")
        if "name" in given:
            options["name"] = name
        sources.append(Source(**own, name=name, options=options))
    if not sources:
        raise ValueError("data.sources is empty: nothing to read")
    return sources


def choose(sources: list[Source], only: Sequence[str] | str | None) -> list[Source]:
    """The sources of these names, in their own order; all for None. Raises ValueError for a name that none has."""
    if only is None:
        return sources
    names, known = [only] if isinstance(only, str) else only, [source.name for source in sources]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"only: no source {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [source for source in sources if source.name in names]


def check_files(sources: Iterable[Source]) -> None:
    """Raises one ValueError that names everything that is not there, and how to get it."""
    missing = []
    for source in sources:
        lacking = [pattern for pattern in source.needs if not Path(pattern).exists() and not glob.glob(pattern)]
        if lacking:
            how = f" ({source.get} says where to get it)" if source.get else ""
            missing.append(f"{source.name}: {', '.join(lacking)}{how}")
    if missing:
        listed = "".join(f"\n  {line}" for line in missing)
        raise ValueError(f"{len(missing)} sources lack files:{listed}\nA source is left out by data.sources.NAME=null")


def read_source(
    source: Source,
    skips: Skips,
    held_out: Collection[int] = (),
    leakage: Leakage | None = None,
) -> Iterator[Sample]:
    """The samples of a source, read from its files.

    Args:
        held_out: COCO ids of pictures that are left out, if the source says so.
        leakage: counts these.

    Raises:
        ValueError: whatever the reader finds wrong; at the end, if the source says so and none of its pictures is
            named by a COCO id.
    """
    leakage = leakage or Leakage()
    for sample in READERS[source.reader](**source.options, skips=skips):
        if source.held_out and leakage.leaves_out(sample, held_out):
            continue
        kept = (turn for turn in sample.turns if source.kinds is None or turn.kind in source.kinds)
        turns = tuple(_as_asked(turn, source) for turn in kept)
        if turns:
            yield sample if turns == sample.turns else dataclasses.replace(sample, turns=turns)
    leakage.check(source.name)


def _as_asked(turn: Turn, source: Source) -> Turn:
    """The turn in the source's form, with a phrase in its answer."""
    if source.form is not None:
        turn = dataclasses.replace(turn, form=source.form)
    if all(phrase.text for phrase in turn.phrases):
        return turn
    phrases = tuple(p if p.text else dataclasses.replace(p, text=source.phrase) for p in turn.phrases)
    return dataclasses.replace(turn, phrases=phrases)


def open_sources(data: Mapping[str, Any], skips: Skips | None = None) -> Mixture:
    """The training set of a data configuration.

    Args:
        data: ``sources``; ``prepared``, the folder of the tables that `instructsam.prepare` makes, or null to read
            the files into memory; ``held_out``, files of refs whose validation and test pictures are left out;
            ``limit``, the first so many samples of each source; ``epoch_samples``, of an epoch, where sources have
            weights.

    Raises:
        ValueError: files or tables that are missing (all are named, with what makes them); bad records; repeats and
            weights that make no mixture.
    """
    sources = parse_sources(data["sources"])
    limit = limit_of(data)
    held_out_files(sources, data)
    parts: dict[str, Samples]
    if data.get("prepared"):
        parts = {source.name: table for source, table in zip(sources, open_tables(sources, data), strict=True)}
        if limit is not None:
            parts = {
                name: SampleList(part[row] for row in range(min(limit, len(part)))) for name, part in parts.items()
            }
    else:
        check_files(sources)
        held_out, skips = held_out_of(sources, data), skips or Skips()
        parts = {source.name: _read_all(source, skips, held_out, limit) for source in sources}
        skips.summarise(", ".join(parts), f"{sum(map(len, parts.values()))} samples")
    weights = {source.name: source.weight for source in sources if source.weight is not None}
    return Mixture(parts, {source.name: source.repeats for source in sources}, weights, data.get("epoch_samples"))


def _read_all(source: Source, skips: Skips, held_out: Collection[int], limit: int | None) -> SampleList:
    """The samples of a source in memory. ``skips.max_bad`` counts for each source by itself."""
    own, leakage = Skips(skips.on_bad, skips.max_bad, skips.report), Leakage()
    samples = SampleList(islice(read_source(source, own, held_out, leakage), limit))
    skips.counts.update(own.counts)
    skips.aside.update(own.aside)
    if said := str(leakage):
        logger.warning("%s: %s", source.name, said)
    return samples


def limit_of(data: Mapping[str, Any]) -> int | None:
    """``data.limit``. Raises ValueError where it is below 1."""
    limit = data.get("limit")
    if limit is not None and not is_whole(limit):
        raise ValueError(f"data.limit={limit}: must be at least 1, or null for all")
    return limit


def held_out_files(sources: Iterable[Source], data: Mapping[str, Any]) -> list[str]:
    """``data.held_out`` where a source needs it, else none. Raises ValueError where it is needed and empty."""
    guarded = [source.name for source in sources if source.held_out]
    files = list(data.get("held_out") or ()) if guarded else []
    if guarded and not files:
        raise ValueError(
            f"{', '.join(guarded)}: held_out is true, but data.held_out names no file of refs whose validation and "
            "test pictures are to be left out: data.held_out=[data/refer/refcoco/refs(unc).p, ...] (as in "
            "configs/data/originals.yaml), or held_out=false for these sources"
        )
    return files


def held_out_of(sources: Iterable[Source], data: Mapping[str, Any]) -> frozenset[int]:
    """COCO ids of the pictures to leave out. Raises ValueError as `held_out_files`, and for refs that are bad."""
    return held_out_images(held_out_files(sources, data))


def open_tables(sources: Iterable[Source], data: Mapping[str, Any]) -> list[SampleTable]:
    """The prepared tables of sources.

    Raises:
        ValueError: naming all that are missing or out of date: other settings, or source files that are there and have
            changed. Files that are gone are not needed any more.
    """
    folder, tables, wrong = Path(data["prepared"]), [], []
    for source in sources:
        try:
            table = SampleTable(folder / source.name, table_recipe(source, data))
            if (before := table.manifest["info"].get("files")) is not None:
                check_stamps(before, source_stamps(source, data))
            tables.append(table)
        except ValueError as error:
            wrong.append(f"\n  {source.name}: {error}")
    if wrong:
        names = f"data={data['name']}" if data.get("name") else "data=NAME"
        raise ValueError(
            f"{len(wrong)} sources are not prepared:{''.join(wrong)}\nMake their tables: "
            f"python -m instructsam.prepare {names}; or read the files each time: data.prepared=null"
        )
    return tables


def table_recipe(source: Source, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a prepared table depends on, besides the files."""
    held_out = list(data.get("held_out") or ()) if source.held_out else []
    return {**source.recipe, "held_out": held_out, "on_bad": data.get("on_bad") or "raise"}


def source_stamps(source: Source, data: Mapping[str, Any]) -> Stamps:
    """Of the files that a table of the source is made from."""
    return stamps(source.reader, source.options, source.needs, table_recipe(source, data)["held_out"])
