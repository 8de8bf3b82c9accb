"""The file that names every sample a run could not train on, and how many it may be."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dynllava_plugin.errors import UserError
from train.writing import naming_the_file

# What is wrong with a sample; those of `BAD` count against `--skip_bad`.
MALFORMED, MISSING, UNREADABLE = "malformed", "missing image", "unreadable"
TOO_LONG, MASKED = "too long", "not labelled"
BAD = (MALFORMED, MISSING, UNREADABLE)
REASONS = 10  # of the most frequent ones are named
Entry = tuple[int, str, str]  # a sample's place in the data file, kind, reason


class UnusableSample(UserError):
    """One sample cannot be trained on; the message names it, `kind` says in what way."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class SkippedSamples:
    """JSON lines `{"sample", "kind", "reason"}`, appended to by every data-loading process of a run.

    `sample` is its place in the data file. One that comes up again (another epoch, a resumed run) is counted once.

    Parameters
    ----------
    path : path
    allowed : int
        Bad samples that a run passes over.
    """

    def __init__(self, path: str | Path, allowed: int = 0) -> None:
        self.path, self.allowed = Path(path), allowed
        self._seen = (-1, False)

    def add(self, *entries: Entry) -> None:
        """Add a line for each entry."""
        names = ("sample", "kind", "reason")
        lines = "".join(json.dumps(dict(zip(names, entry, strict=True))) + "\n" for entry in entries)
        with naming_the_file(self.path):
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, lines.encode())  # one write: lines of several processes don't mix
            finally:
                os.close(file)

    def entries(self) -> list[dict]:
        """Return the last line about each sample and kind."""
        found = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    found[entry["sample"], entry["kind"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a killed process; the sample will come up again
        return list(found.values())

    def counts(self) -> dict[str, int]:
        """Return how many different samples of each kind there are."""
        return dict(Counter(entry["kind"] for entry in self.entries()))

    def too_many(self) -> bool:
        """Return whether there are more bad samples than allowed; reads the file where it has grown only."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._seen[0]:
            bad = sum(count for kind, count in self.counts().items() if kind in BAD)
            self._seen = size, bad > self.allowed
        return self._seen[1]

    def refusal(self) -> UserError:
        """Return what ends a run that has too many: how many, and the most frequent reasons."""
        reasons = [entry["reason"] for entry in self.entries() if entry["kind"] in BAD]
        return UserError(
            f"{len(reasons)} samples can't be trained on, --skip_bad allows {self.allowed} (all in {self.path}): "
            f"{most_frequent(reasons)}"
        )


def most_frequent(reasons: Sequence[str]) -> str:
    """Return the most frequent of `reasons` with their counts; those that differ in names and numbers are one."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        about = re.sub(r"\S*sample \d+( \(id [^)]*\))?|\S*\.\w+\S*|\d+", "", reason)
        alike.setdefault(about, []).append(reason)
    groups = sorted(alike.values(), key=len, reverse=True)
    named = [f"{len(group)} x {group[0]}" if len(group) > 1 else group[0] for group in groups[:REASONS]]
    return "; ".join([*named, *([f"and {len(groups) - REASONS} other reasons"] if groups[REASONS:] else [])])
