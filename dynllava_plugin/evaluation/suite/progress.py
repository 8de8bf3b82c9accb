"""A suite's progress: a line for each finished benchmark, and one that moves for those that run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dynllava_plugin.evaluation.suite.runs import Run
from dynllava_plugin.files import saved_json

if TYPE_CHECKING:
    from dynllava_plugin.evaluation.suite.runner import Outcome


class Progress:
    """Counts runs and estimates what is left.

    Parameters
    ----------
    report : callable
        Takes finished lines.
    """

    def __init__(self, total: int, jobs: int, report: Callable[[str], None]) -> None:
        self._total, self._jobs, self._report = total, jobs, report
        self._ended = 0
        self._seconds: list[float] = []
        self._moving = sys.stderr.isatty()

    def finished(self, outcome: Outcome) -> None:
        """Print the line of a run that has ended."""
        self._ended += 1
        if outcome.seconds:
            self._seconds.append(outcome.work)
        self.clear()
        line = f"[{self._ended:{len(str(self._total))}}/{self._total}] {outcome.run.title}: "
        if outcome.problem:
            line += f"FAILED: {outcome.problem}"
        else:
            line += headline(outcome.run)
        line += ", done before" if outcome.resumed else f", {clock(outcome.seconds)}"
        left = self._left()
        self._report(line + (f"; about {clock(left)} left" if left is not None else ""))

    def _left(self) -> float | None:
        """Seconds, from the runs that were carried out so far; None at the end and before the first."""
        remaining = self._total - self._ended
        if not remaining or not self._seconds:
            return None
        return remaining * sum(self._seconds) / len(self._seconds) / self._jobs

    def show(self, running: list[tuple[Run, float]]) -> None:
        """Write the moving line of runs and the times they began at, where somebody looks at it."""
        if not self._moving:
            return
        parts = [_state(run, time.monotonic() - since) for run, since in running]
        print("\r\033[K" + " | ".join(parts), end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the moving line."""
        if self._moving:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _state(run: Run, seconds: float) -> str:
    done = total = 0
    for path in run.journal.glob("progress-*.json"):
        counts = saved_json(path)
        done, total = done + counts.get("done", 0), total + counts.get("total", 0)
    if not total:
        return f"{run.title}: starting, {clock(seconds)}"
    left = f", {clock(seconds * (total - done) / done)} left" if done else ""
    return f"{run.title}: {100 * done // total}% of {total:,}, {clock(seconds)}{left}"


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
