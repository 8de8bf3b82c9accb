"""Carries out a suite's runs: one process for those of a checkpoint, setting and harness; taken up again where they stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UNREACHABLE, UserError, reason_in
from dynllava_plugin.evaluation.locks import locks, terminated_like_interrupted
from dynllava_plugin.evaluation.results.footer import STATE
from dynllava_plugin.evaluation.settings import PLACES
from dynllava_plugin.evaluation.suite.data import (
    DOWNLOAD,
    how_to_provide,
    identity_after,
    is_offline,
    is_ours,
    locate,
)
from dynllava_plugin.evaluation.suite.progress import Progress
from dynllava_plugin.evaluation.suite.runs import Run
from dynllava_plugin.evaluation.suite.worker import ENDED
from dynllava_plugin.files import saved_json, write_json
from dynllava_plugin.processes import Process, start

DONE, FAILED, RUNNING = "done", "failed", "running"
WRITER = "another `dynllava eval`, or a run that one left behind,"
PATIENCE = 45.0  # seconds to end after SIGTERM; torchrun gives its workers 30
_LOOK = 0.1  # seconds


@dataclass
class Outcome:
    """What became of a run.

    Attributes
    ----------
    problem : str
        One line; empty where it went well.
    seconds : float
        Of this time; 0 where it was done before.
    resumed : bool
        Whether an earlier process had done it already.
    work : float
        Of `seconds`, those behind loading.
    """

    run: Run
    problem: str = ""
    seconds: float = 0.0
    resumed: bool = False
    work: float = 0.0


@dataclass
class _Child:
    """A process with the runs that it hasn't ended yet; the first of them is being carried out."""

    process: Process
    runs: deque[Run]
    since: float = field(default_factory=time.monotonic)


@dataclass
class Runner:
    """Runs `runs`, at most `jobs` processes at a time.

    Attributes
    ----------
    data : Path or None
        Folder of local datasets.
    report : callable
        Takes finished progress lines.
    processes : int
        How many were started so far.
    """

    runs: Sequence[Run]
    jobs: int
    data: Path | None
    report: Callable[[str], None]
    processes: int = 0
    _outcomes: dict[int, Outcome] = field(default_factory=dict)
    _held: dict[Path, int] = field(default_factory=dict)

    def run(self) -> list[Outcome]:
        """Carry out all of them; a failing one doesn't stop the others.

        Raises
        ------
        UserError
            If another process evaluates into the same folder.
        """
        children: list[_Child] = []
        with terminated_like_interrupted(), locks({run.root for run in self.runs}, WRITER) as self._held:
            self._progress = Progress(self.runs, self.jobs, self.report)
            try:
                waiting = self._planned([run for run in self.runs if self._is_left(run)])
                while children or waiting:
                    while waiting and len(children) < self.jobs:
                        self._start(waiting.popleft(), children)
                    time.sleep(_LOOK)
                    for child in list(children):
                        left = self._look_after(child)
                        if child.process.returncode is not None:
                            children.remove(child)
                            if left:
                                waiting.append(left)
                    self._progress.show([(child.runs[0], child.since) for child in children if child.runs])
            except BaseException:
                _stop(children)
                raise
            finally:
                self._progress.clear()
        return [self._outcomes[id(run)] for run in self.runs]

    def _planned(self, left: list[Run]) -> deque[list[Run]]:
        """Return each process's runs: those of one setting and harness together, shared out where there are more `jobs`."""
        groups: dict[Any, list[Run]] = {}
        for run in left:
            groups.setdefault((run.root, run.harness), []).append(run)
        shares = max(1, self.jobs // len(groups)) if groups else 1
        parts = (group[place::shares] for group in groups.values() for place in range(shares))
        return deque(part for part in parts if part)

    def _end(self, outcome: Outcome) -> None:
        self._outcomes[id(outcome.run)] = outcome
        self._progress.finished(outcome)

    def _is_left(self, run: Run) -> bool:
        """Whether a run has to be carried out; if so, what may not be reused of an earlier one is gone."""
        try:
            outcome = self._before(run)
        except OSError as error:
            outcome = Outcome(run, _no_place(error, run))
        if outcome is not None:
            self._end(outcome)
        return outcome is None

    def _before(self, run: Run) -> Outcome | None:
        state = read_state(run.folder)
        there = run.output.is_dir()  # somebody may have removed a result
        ended = saved_json(run.folder / ENDED)
        if there and state.get("state") == RUNNING and ended.get("code") == 0:
            self._settle(run, ended)  # its process outlived the one that should have written it down
            state = read_state(run.folder)
        done = state.get("state") == DONE and state.get("scores_from") == _plain(run.scores_from)
        changed = _changed(state.get("answers_from"), run.answers_from, done)
        if done and there and not changed:
            return Outcome(run, resumed=True)
        if is_offline() and not is_ours(run.benchmark):
            if locate(run.benchmark, run.harness, self.data) is None:
                return Outcome(run, how_to_provide(run.benchmark, run.harness))
        if changed and run.folder.exists():
            shutil.rmtree(run.folder)  # other data, settings, code or weights: nothing of it may be reused
            self.report(f"{run.title}: starts afresh, its {', '.join(changed)} changed")
        shutil.rmtree(run.output, ignore_errors=True)  # half a result; its answers are in the journal
        for path in (*run.journal.glob("progress-*.json"), run.folder / ENDED, run.folder / "log.txt"):
            path.unlink(missing_ok=True)
        write_json(run.folder / STATE, {"state": RUNNING, **_facts(run)})
        return None

    def _start(self, runs: list[Run], children: list[_Child]) -> None:
        """Start a process for runs of one setting and harness; its first words are the first run's log."""
        run = runs[0]
        try:
            plan = run.folder / "process.json"
            write_json(plan, [{"folder": str(item.folder), "command": item.command} for item in runs])
            process = start(
                [*run.launch, "dynllava_plugin.evaluation.suite.worker", str(plan)],
                run.folder / "log.txt",
                run.environment,
                cwd=run.directory,
                start_new_session=True,  # so that its own processes end with it
                pass_fds=[self._held[run.root]],  # were we killed, it still holds its folder
            )
        except OSError as error:  # no space left, no permission: the others go on
            self._end(Outcome(run, _no_place(error, run)))
            if runs[1:]:
                self._start(runs[1:], children)
            return
        self.processes += 1
        children.append(_Child(process, deque(runs)))

    def _look_after(self, child: _Child) -> list[Run]:
        """Take note of the runs that a process has ended; return those that it left behind when it died in one of them."""
        code = child.process.poll()
        while child.runs and (ended := saved_json(child.runs[0].folder / ENDED)):
            self._finish(child, ended)
        if code is not None and child.runs:
            self._finish(child, {"code": code or 1})
        return list(child.runs) if code is not None else []

    def _finish(self, child: _Child, ended: dict[str, Any]) -> None:
        run, now = child.runs.popleft(), time.monotonic()
        seconds = now - child.since  # the first one's has the loading in it
        child.since = now
        work = ended.get("seconds", seconds)
        try:
            self._end(Outcome(run, self._settle(run, {**ended, "seconds": seconds}), seconds, work=work))
        except OSError as error:
            self._end(Outcome(run, _no_place(error, run), seconds))

    def _settle(self, run: Run, ended: dict[str, Any]) -> str:
        """Write down how a run ended; returns what went wrong, in one line."""
        problem = _reason(run, ended["code"], self.data) if ended["code"] else ""
        state = {
            "state": FAILED if problem else DONE,
            "seconds": round(ended["seconds"], 1),
            "problem": problem,
        }
        write_json(run.folder / STATE, {**state, **_facts(run), **self._found_out(run, bool(problem))})
        return problem

    def _found_out(self, run: Run, failed: bool) -> dict[str, Any]:
        """What only the run itself could tell: the data that it fetched, and whether the judge still answered."""
        found: dict[str, Any] = {}
        planned = run.answers_from.get("data")
        if isinstance(planned, str):
            data = identity_after(run.benchmark, run.harness, self.data, planned)
            found["answers_from"] = {**run.answers_from, "data": data}
        if run.scores_from.get("judge") and not failed and _lacks_judge(run):
            found["scores_from"] = {**run.scores_from, "judge": None}
        return found


def _stop(children: list[_Child]) -> None:
    """End processes and what they started."""
    deadline = time.monotonic() + PATIENCE
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, number)
        while any(child.process.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)


def _facts(run: Run) -> dict[str, Any]:
    return {"answers_from": run.answers_from, "scores_from": run.scores_from, "command": run.typed}


def _no_place(error: OSError, run: Run) -> str:
    return f"{error.strerror or error} ({error.filename or run.folder})"


def read_state(folder: Path) -> dict[str, Any]:
    """Return what an earlier run left in its folder; empty where there is none."""
    return saved_json(folder / STATE)


def _plain(values: dict[str, Any]) -> Any:
    """As they look after a round trip through JSON."""
    return json.loads(json.dumps(values, default=str))


def _changed(recorded: Any, planned: dict[str, Any], done: bool) -> list[str]:
    """Return in what the facts behind recorded answers differ from those of a run as it is planned now; empty where in nothing."""
    before, now = (
        _comparable(facts if isinstance(facts, dict) else {}) for facts in (recorded, _plain(planned))
    )
    # Data that was cleared away after a run was done doesn't undo it; to go on with a half-done one it does.
    # A run that was cut short before it could say what it fetched recorded `DOWNLOAD`: that is what is there now.
    if before.get("data") == DOWNLOAD or (done and now.get("data") == DOWNLOAD):
        before["data"] = now.get("data")
    return [name for name in now if now[name] != before.get(name)]


def _comparable(answers_from: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint gives the same answers wherever it lies and runs."""
    settings = {key: value for key, value in answers_from.get("settings", {}).items() if key not in PLACES}
    return {**answers_from, "settings": settings}


def _lacks_judge(run: Run) -> bool:
    """Whether a cell of a finished run says that it needs a judge."""
    from dynllava_plugin.evaluation.results.results import NEEDS_JUDGE, read_results

    try:
        return bool((read_results(run.output)["status"] == NEEDS_JUDGE).any())
    except UserError:
        return True


def _reason(run: Run, code: int, data: Path | None) -> str:
    """Why a run failed, in one line, from its log."""
    log = run.folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    if "No space left on device" in text:
        return f"no space left on the disk of {run.folder}, of the cache or of the temporary files"
    absent = not is_ours(run.benchmark) and locate(run.benchmark, run.harness, data) is None
    if absent and any(sign in text for sign in UNREACHABLE):
        return how_to_provide(run.benchmark, run.harness)
    return f"ended with {code} ({reason_in(text)[:300]}; see {log})"
