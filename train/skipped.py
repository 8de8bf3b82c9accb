"""The file that names every sample a run could not train on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dynllava_plugin.errors import UserError
from train.writing import naming_the_file

UNREADABLE, TOO_LONG = "unreadable", "too long"


class UnusableSample(UserError):
    """One sample cannot be trained on; the message names it, `kind` says in what way."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def too_many(reason: str, count: int, path: Path) -> UserError:
    """What ends a run whose `count` unreadable samples are over its limit."""
    return UserError(f"{reason}; that makes {count} (all in {path}): mend them, or --max_unreadable N")


class SkippedSamples:
    """JSON lines `{"sample", "kind", "reason"}`, appended to by every data-loading process of a run.

    `sample` is its place in the data file.

    A sample that comes up again (another epoch, a resumed run) is counted once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, sample: int, kind: str, reason: str) -> int:
        """Add a line; returns how many different samples of this kind the file holds now."""
        line = json.dumps({"sample": sample, "kind": kind, "reason": reason}) + "\n"
        with naming_the_file(self.path):
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())  # one write: lines of several processes don't mix
            finally:
                os.close(file)
        return self.counts()[kind]

    def counts(self) -> dict[str, int]:
        """Different samples of each kind."""
        found: dict[str, set[int]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut short by a killed process; the sample will come up again
                found.setdefault(entry["kind"], set()).add(entry["sample"])
        return {kind: len(samples) for kind, samples in found.items()}
