"""Asking a judge within bounds: three tries for a sample, and none once it has failed three samples in a row.

Both harnesses would ask a judge that fails for minutes for each sample, and then count 0 points for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

TRIES, FAILED_IN_A_ROW = 3, 3
TIMEOUT = 60  # seconds that one answer may take

T = TypeVar("T")


class Patience:
    """What a judge has left of it, for all threads of a run."""

    def __init__(self, judge: str) -> None:
        self._judge = judge
        self._lock = threading.Lock()
        self._failed = 0

    @property
    def is_over(self) -> bool:
        """Whether the judge isn't to be asked again."""
        return self._failed >= FAILED_IN_A_ROW

    def ask(self, question: Callable[[int], T | None]) -> T | None:
        """Return what `question` (called with the number of the try, from 0) returns; None where the judge gave no score.

        Errors of `question` are answers without a score.
        """
        said = "nothing"
        for attempt in range(TRIES):
            if self.is_over:
                return None
            try:
                found = question(attempt)
            except Exception as error:  # each client has its own for a server that fails
                said = str(error).partition("\n")[0][:200] or type(error).__name__
                continue
            if found is not None:
                with self._lock:
                    # One that has been given up stays so, whatever other threads still hear.
                    self._failed = self._failed if self.is_over else 0
                return found
            said = "no score"
        with self._lock:
            self._failed += 1
            given_up = self._failed == FAILED_IN_A_ROW
        if given_up:
            print(
                f"judge {self._judge}: no score for {FAILED_IN_A_ROW} samples in a row ({said}); it isn't "
                "asked again, and there is no figure",
                file=sys.stderr,
                flush=True,
            )
        return None


def mm_vet_score(text: str | None) -> float | None:
    """Return MM-Vet's score from 0 to 1 that a judge's answer begins with; None for anything else."""
    words = (text or "").split()
    try:
        score = float(words[0].rstrip(".")) if words else -1.0
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def llava_scores(text: str | None) -> tuple[float, float] | None:
    """Return LLaVA-Bench's scores of the reference and of the answer, the two numbers of a judge's first line; else None."""
    line = (text or "").strip().partition("\n")[0]
    try:
        numbers = [float(word) for word in line.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        return None
    # The mean of the reference's scores divides: it isn't to be 0.
    if len(numbers) != 2 or not (0 < numbers[0] <= 10 and 0 <= numbers[1] <= 10):
        return None
    return numbers[0], numbers[1]
