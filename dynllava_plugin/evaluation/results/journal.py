"""Answers written down as they come, so that a run that was cut short goes on where it stopped.

Both harnesses keep what they were told only when a whole benchmark is answered (lmms-eval) or without token
counts (VLMEvalKit). The adapters ask this journal first. It lies where ``$DYNLLAVA_JOURNAL`` says, which
`dynllava eval` sets to a folder of that checkpoint, setting, benchmark and harness only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynllava_plugin.evaluation.engine.answers import Answer, Score
from dynllava_plugin.files import write_json
from dynllava_plugin.flops import OutputCost

VARIABLE = "DYNLLAVA_JOURNAL"
PROGRESS = "progress"
_BETWEEN_REPORTS = 1.0  # seconds


def entry_key(kind: str, *parts: Any) -> str:
    """Return what names a question: what is asked of whom, how. Equal parts, equal answer."""
    text = json.dumps([kind, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Journal:
    """Answers and scores by key; a journal without a folder remembers nothing.

    Parameters
    ----------
    folder : Path or None
        Every process of a run writes a file of its own there and reads all of them at its start.
    """

    def __init__(self, folder: Path | None) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._folder, self._file = folder, None
        self._done = self._total = 0
        self._reported = 0.0
        self._rank = int(os.environ.get("RANK", 0))
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry.pop("key")] = entry
                except (json.JSONDecodeError, KeyError, AttributeError):
                    continue  # cut off while it was written
        self._file = (folder / f"{self._rank}-{os.getpid()}.jsonl").open("a", encoding="utf-8")

    @classmethod
    def from_environment(cls) -> Journal:
        """Return the journal that `dynllava eval` asked for, or one that remembers nothing."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder) if folder else None)

    def result(self, key: str) -> Any:
        """Return the answer or score written down earlier; None where there is none."""
        found = self._known.get(key)
        if found is None:
            return None
        return _score(found["score"]) if "score" in found else _with_cost(Answer, found["answer"])

    def completed(
        self,
        keys: Sequence[str],
        ask: Callable[..., Sequence[Any]],
        title: str = "",
        told: Callable[[int], None] = lambda more: None,
    ) -> list[Any]:
        """Return a result for each key: what was written down earlier, and what `ask` finds for the others.

        Parameters
        ----------
        ask : callable
            (places in `keys` without a result, `on_batch` for the engine's call) -> their results. What `on_batch` is told is
            written down at once.
        title : str
            Of a bar on the error output; empty: none.
        told : callable
            Told how many more have a result, e.g. `count`.
        """
        found = [self.result(key) for key in keys]
        missing = [place for place, result in enumerate(found) if result is None]
        known = len(keys) - len(missing)
        told(known)
        with tqdm(total=len(keys), initial=known, desc=title, disable=not title or self._rank != 0) as bar:

            def note(numbers: Sequence[int], results: Sequence[Any]) -> None:
                self.write((keys[missing[n]], result) for n, result in zip(numbers, results, strict=True))
                bar.update(len(numbers))
                told(len(numbers))

            for place, result in zip(missing, ask(missing, note) if missing else [], strict=True):
                found[place] = result
        return found

    def write(self, entries: Iterable[tuple[str, Answer | Score]]) -> None:
        """Add answers or scores; they are on disk when this returns."""
        if self._file is None:
            return
        for key, result in entries:
            kind = "answer" if isinstance(result, Answer) else "score"
            self._file.write(json.dumps({"key": key, kind: asdict(result)}) + "\n")
        self._file.flush()

    def expect(self, total: int) -> None:
        """Note that `total` more questions are to be answered."""
        self._total += total
        self._report(at_once=True)

    def count(self, done: int) -> None:
        """Note that `done` more questions are answered."""
        self._done += done
        self._report()

    def _report(self, at_once: bool = False) -> None:
        """Tell `dynllava eval` how far this process is."""
        now = time.monotonic()
        ended = self._done >= self._total
        if self._folder is None or not (at_once or ended or now - self._reported > _BETWEEN_REPORTS):
            return
        self._reported = now
        write_json(self._folder / f"{PROGRESS}-{self._rank}.json", {"done": self._done, "total": self._total})


def _with_cost(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{**values, "cost": OutputCost(**values["cost"]) if values.get("cost") else None})


def _score(values: dict[str, Any]) -> Score:
    return _with_cost(Score, {**values, "rounds": tuple(_score(part) for part in values["rounds"])})
