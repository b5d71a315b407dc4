"""What `validate` found, as it goes along into validation.jsonl, and at the end by kind into validation.md.

{"source": "refcoco", "kind": "mask empty", "file": "refcoco.json", "index": "[17]", "reason": "..."}
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from instructsam.data.checks import Problem
from instructsam.errors import KINDS

LISTED = 20
"""So many problems of each kind are in validation.md; all of them are in validation.jsonl."""
_LONGEST = 300


@dataclass
class ValidationReport:
    """Problems and counts of all sources; a context in which they are written.

    Args:
        folder: is made; files of an earlier report are replaced, validation.md when the context is left.
        title: of validation.md.
    """

    folder: Path
    title: str
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and source
    first: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    notes: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def __enter__(self) -> ValidationReport:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("validation.md", "validation.jsonl"):
            (self.folder / name).unlink(missing_ok=True)  # so that what is there is of one run
        self._lines = (self.folder / "validation.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        if error is None:
            target, temporary = self.folder / "validation.md", self.folder / f".validation.md.{os.getpid()}.tmp"
            temporary.write_bytes(self.markdown().encode("utf-8", "replace"))
            os.replace(temporary, target)

    @property
    def total(self) -> int:
        """How many problems there are."""
        return self.counts.total()

    def add(self, source: str, problem: Problem) -> None:
        """One problem of a source."""
        entry = {
            "source": source,
            "kind": problem.kind,
            "file": str(problem.place.file),
            "index": problem.place.index,
            "reason": problem.reason,
        }
        self._lines.write(json.dumps(entry) + "\n")
        self.counts[problem.kind, source] += 1
        examples = self.first.setdefault(problem.kind, [])
        if len(examples) < LISTED:
            examples.append(entry)

    def close_source(self, source: str, notes: Mapping[str, int]) -> None:
        """Counts of a source that has been read to its end."""
        self.notes[source] = notes
        self._lines.flush()

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Kind -> source -> how many problems, in the order of `KINDS`."""
        found = {kind: {s: n for (k, s), n in self.counts.items() if k == kind} for kind in KINDS}
        return {kind: sources for kind, sources in found.items() if sources}

    def summary(self) -> str:
        """For the terminal."""
        lines = []
        for source, notes in self.notes.items():
            lines.append(f"{source}: {_main_counts(notes)}")
            lines += [f"    {number:,} {note}" for note, number in _other_counts(notes).items()]
        if not self.total:
            return "\n".join([*lines, "", "nothing found"])
        lines += ["", f"{self.total:,} problems:"]
        for kind, sources in self.by_kind().items():
            where = ", ".join(f"{source} {number:,}" for source, number in sources.items())
            lines.append(f"{sum(sources.values()):>9,}  {kind}: {KINDS[kind]} ({where})")
        return "\n".join(lines)

    def markdown(self) -> str:
        """The whole of validation.md."""
        lines = [f"# {self.title}", ""]
        lines.append(
            f"{self.total:,} problems; all of them are in `validation.jsonl`." if self.total else "Nothing found."
        )
        lines += ["", "## Sources", ""]
        for source, notes in self.notes.items():
            lines.append(f"- **{_plain(source)}**: {_main_counts(notes)}")
            lines += [f"  - {number:,} {_plain(note)}" for note, number in _other_counts(notes).items()]
        if self.total:
            lines += [
                "",
                "## Problems by kind",
                "",
                "| kind | what it means | number | sources |",
                "|---|---|---:|---|",
            ]
        for kind, sources in self.by_kind().items():
            where = ", ".join(f"{_plain(source)} {number:,}" for source, number in sources.items())
            lines.append(f"| {kind} | {KINDS[kind]} | {sum(sources.values()):,} | {where} |")
        for kind, sources in self.by_kind().items():
            number, shown = sum(sources.values()), self.first[kind]
            heading = f"{kind} ({number:,}, the first {len(shown)})" if number > len(shown) else f"{kind} ({number})"
            lines += ["", f"### {heading}", ""]
            for entry in shown:
                place = " ".join(part for part in (entry["file"], entry["index"]) if part)
                lines.append(f"- {_plain(entry['source'])}: {_code(place)}: {_code(entry['reason'])}")
        return "\n".join(lines) + "\n"


_MAIN = ("samples", "instructions", "phrases", "instances", "pictures")


def _main_counts(notes: Mapping[str, int]) -> str:
    return ", ".join(f"{notes.get(name, 0):,} {name}" for name in _MAIN)


def _other_counts(notes: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in notes.items() if name not in _MAIN and number}


def _code(text: str) -> str:
    """Text of the data as code, so that nothing in it is taken for markup."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line if len(line) <= _LONGEST else line[: _LONGEST - 1] + '…'}`" if line else ""


def _plain(text: Any) -> str:
    return str(text).replace("|", "\\|")
