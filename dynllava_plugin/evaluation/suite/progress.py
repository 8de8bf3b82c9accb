"""A suite's progress: a line for each finished benchmark, and one that moves for those that run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynllava_plugin.evaluation.suite.runs import Run
from dynllava_plugin.files import saved_json

if TYPE_CHECKING:
    from dynllava_plugin.evaluation.suite.runner import Outcome

_USUAL = 1000  # questions of a benchmark whose size the registry doesn't say


class Progress:
    """Counts runs and estimates what is left.

    Parameters
    ----------
    report : callable
        Takes finished lines.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, report: Callable[[str], None]) -> None:
        self._total, self._jobs, self._report = len(runs), jobs, report
        self._ended = self._answered = 0
        self._left, self._seconds = sum(map(_questions, runs)), 0.0
        self._first_seen: dict[Path, tuple[float, int]] = {}
        self._moving = sys.stderr.isatty()

    def finished(self, outcome: Outcome) -> None:
        """Print the line of a run that has ended."""
        self._ended += 1
        self._left -= _questions(outcome.run)
        if outcome.seconds and not outcome.problem:
            self._seconds += outcome.work
            self._answered += _questions(outcome.run)
        self.clear()
        line = f"[{self._ended:{len(str(self._total))}}/{self._total}] {outcome.run.title}: "
        if outcome.problem:
            line += f"FAILED: {outcome.problem}"
        else:
            line += headline(outcome.run)
        line += ", done before" if outcome.resumed else f", {clock(outcome.seconds)}"
        if self._left and self._answered:  # as fast as those that were carried out so far
            line += f"; about {clock(self._left * self._seconds / self._answered / self._jobs)} left"
        self._report(line)

    def show(self, running: list[tuple[Run, float]]) -> None:
        """Write the moving line of runs and the times they began at, where somebody looks at it."""
        if not self._moving:
            return
        parts = [self._state(run, time.monotonic() - since) for run, since in running]
        print("\r\033[K" + " | ".join(parts), end="", file=sys.stderr, flush=True)

    def _state(self, run: Run, seconds: float) -> str:
        done = total = 0
        for path in run.journal.glob("progress-*.json"):
            counts = saved_json(path)
            done, total = done + counts.get("done", 0), total + counts.get("total", 0)
        if not total:
            return f"{run.title}: starting, {clock(seconds)}"
        left = ""
        if done:  # the first of them may be an earlier run's, which took no time of this one
            since, before = self._first_seen.setdefault(run.folder, (seconds, done))
            if done > before:
                left = f", {clock((seconds - since) / (done - before) * (total - done))} left"
        return f"{run.title}: {100 * done // total}% of {total:,}, {clock(seconds)}{left}"

    def clear(self) -> None:
        """Remove the moving line."""
        if self._moving:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _questions(run: Run) -> int:
    """About how many questions a run asks."""
    return min(run.benchmark.questions or _USUAL, run.answers_from.get("limit") or sys.maxsize)


def headline(run: Run) -> str:
    """Return the benchmark's first figure, or why there is none, and the number of questions."""
    from dynllava_plugin.errors import UserError
    from dynllava_plugin.evaluation.results.results import SCORED, read_results
    from dynllava_plugin.evaluation.results.tables import figure_text

    try:
        table = read_results(run.output)
    except UserError:
        return "finished without a result"
    rows = table[table["benchmark"] == run.benchmark.name].to_dict("records")
    if not rows:
        return "finished"
    row = rows[0]
    count = f", {row['n']:,.0f} questions" if row["n"] == row["n"] and row["n"] is not None else ""
    if row["status"] != SCORED:
        return f"{row['status']}{count}"
    return f"{row['metric']} {figure_text(row['metric'], row['value'])}{row['unit']}{count}"


def clock(seconds: float) -> str:
    """Return seconds as ``42s``, ``3m05s``, ``2h10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
