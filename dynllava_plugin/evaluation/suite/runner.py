"""Carries out a suite's runs: several at a time, each its own process, taken up again where they stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, reason_in
from dynllava_plugin.evaluation.locks import locks, terminated_like_interrupted
from dynllava_plugin.evaluation.results.manifests import STATE
from dynllava_plugin.evaluation.suite.data import (
    DOWNLOAD,
    how_to_provide,
    identity_after,
    is_offline,
    is_ours,
    is_same_data,
    locate,
)
from dynllava_plugin.evaluation.suite.progress import Progress
from dynllava_plugin.evaluation.suite.runs import Run
from dynllava_plugin.files import write_json

DONE, FAILED, RUNNING = "done", "failed", "running"
WRITER = "another `dynllava eval`, or a run that one left behind,"
PATIENCE = 45.0  # seconds to end after SIGTERM; torchrun gives its workers 30
_UNREACHABLE = (
    "Couldn't reach",
    "ConnectionError",
    "DatasetNotFoundError",
    "OfflineModeIsEnabled",
    "Cannot find data directory",
    "URLError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "LocalEntryNotFoundError",
)


@dataclass
class Outcome:
    """What became of a run.

    Attributes
    ----------
    run : Run
    problem : str
        One line; empty where it went well.
    seconds : float
        Of this time; 0 where it was done before.
    resumed : bool
        Whether an earlier process had done it already.
    """

    run: Run
    problem: str = ""
    seconds: float = 0.0
    resumed: bool = False


@dataclass
class Runner:
    """Runs `runs`, `jobs` at a time.

    Attributes
    ----------
    runs : sequence of Run
    jobs : int
    data : Path or None
        Folder of local datasets.
    report : callable
        Takes finished progress lines.
    """

    runs: Sequence[Run]
    jobs: int
    data: Path | None
    report: Callable[[str], None]
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _held: dict[Path, int] = field(default_factory=dict)
    _stopped: bool = False

    def run(self) -> list[Outcome]:
        """All of them; a failing one doesn't stop the others.

        Raises
        ------
        UserError
            If another process evaluates into the same folder.
        """
        outcomes: list[Outcome] = []
        progress = Progress(len(self.runs), self.jobs, self.report)
        folders = {run.folder.parents[1] for run in self.runs}
        with (
            terminated_like_interrupted(),
            locks(folders, WRITER) as held,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            self._held = held
            pending: set[Future[Outcome]] = {pool.submit(self._guarded, run, progress) for run in self.runs}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        outcomes.append(future.result())
                        progress.finished(outcomes[-1])
                    progress.show()
            except BaseException:
                self._stop(pending)
                raise
            finally:
                progress.clear()
        order = {id(run): place for place, run in enumerate(self.runs)}
        return sorted(outcomes, key=lambda outcome: order[id(outcome.run)])

    def _stop(self, pending: set[Future[Outcome]]) -> None:
        self._stopped = True
        for future in pending:
            future.cancel()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while self._processes and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with self._lock:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _guarded(self, run: Run, progress: Progress) -> Outcome:
        started = time.monotonic()
        try:
            return self._one(run, progress)
        except OSError as error:  # no space left, no permission: the others go on
            place = error.filename or run.folder
            return Outcome(run, f"{error.strerror or error} ({place})", seconds=time.monotonic() - started)

    def _one(self, run: Run, progress: Progress) -> Outcome:
        state = read_state(run.folder)
        done = state.get("state") == DONE and state.get("scores_from") == _plain(run.scores_from)
        answered = _is_same(state.get("answers_from"), run.answers_from, done)
        if answered and done:
            return Outcome(run, resumed=True)
        if is_offline() and not is_ours(run.benchmark):
            if locate(run.benchmark, run.harness, self.data) is None:
                return Outcome(run, how_to_provide(run.benchmark, run.harness))
        if not answered and run.folder.exists():
            shutil.rmtree(run.folder)  # other data, settings, code or weights: nothing of it may be reused
        shutil.rmtree(run.output, ignore_errors=True)  # half a result; its answers are in the journal
        facts = {"answers_from": run.answers_from, "scores_from": run.scores_from, "command": run.command}
        write_json(run.folder / STATE, {"state": RUNNING, **facts})
        started = time.monotonic()
        progress.started(run)
        code = self._execute(run)
        seconds = time.monotonic() - started
        problem = "" if code == 0 else "stopped" if self._stopped else _reason(run, code, self.data)
        if not self._stopped:
            ended = {"state": FAILED if problem else DONE, "seconds": round(seconds, 1), "problem": problem}
            write_json(run.folder / STATE, {**ended, **facts, **self._found_out(run, bool(problem))})
        return Outcome(run, problem, seconds)

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

    def _execute(self, run: Run) -> int:
        for path in run.journal.glob("progress-*.json"):
            path.unlink()
        with (run.folder / "log.txt").open("w", encoding="utf-8") as log:
            with self._lock:
                if self._stopped:
                    return 1
                process = subprocess.Popen(
                    run.command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=run.directory,
                    env={**os.environ, **run.environment},
                    start_new_session=True,  # so that its own processes end with it
                    pass_fds=[self._held[run.folder.parents[1]]],  # were we killed, it still holds its folder
                )
                self._processes.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._processes.discard(process)


def read_state(folder: Path) -> dict[str, Any]:
    """What an earlier run left in its folder; empty where there is none."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def _plain(values: dict[str, Any]) -> Any:
    """As they look after a round trip through JSON."""
    return json.loads(json.dumps(values, default=str))


def _is_same(recorded: Any, planned: dict[str, Any], done: bool) -> bool:
    """Whether answers that were recorded are those of a run as it is planned now."""
    if not isinstance(recorded, dict):
        return False
    now = _plain(planned)
    # Data that was cleared away after a run was done doesn't undo it; to go on with a half-done one it does.
    cleared = done and now.get("data") == DOWNLOAD
    same_data = cleared or is_same_data(recorded.get("data"), now.get("data"))
    return same_data and {**recorded, "data": None} == {**now, "data": None}


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
    if absent and any(sign in text for sign in _UNREACHABLE):
        return how_to_provide(run.benchmark, run.harness)
    return f"ended with {code} ({reason_in(text)[:300]}; see {log})"
