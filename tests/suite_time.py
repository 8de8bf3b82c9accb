"""How long a suite takes here and in another checkout, and what killing it costs: `python -m tests.suite_time --help`.

The packaged suite `understanding`, 14 benchmarks in both harnesses, on the bundled model and the benchmarks' miniatures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each part's seconds, processes and, behind kills, whether the table is the same; return 1 where it isn't."""
    parser = argparse.ArgumentParser(prog="python -m tests.suite_time", description=__doc__)
    parser.add_argument("--old", type=Path, help="another checkout: new, old and new are timed in turn")
    parser.add_argument(
        "--kills", type=int, default=0, help="kill -9 at this many random moments, then go on"
    )
    parser.add_argument(
        "--limit", type=int, default=4, help="questions of a benchmark (default: %(default)s)"
    )
    parser.add_argument("--benchmarks", nargs="+", help="these instead of the suite's")
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for miniatures and runs, made anew"
    )
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    minis = work / "mini"
    subprocess.run(
        [sys.executable, "-m", "tests.minis", str(minis)], env=_environment(HERE, work), check=True
    )
    suite = [
        "eval",
        "understanding",
        "--pretrained",
        "tiny",
        "--data",
        str(minis),
        "--limit",
        str(args.limit),
    ]
    suite += ["--batch-size", "1", *(["--benchmarks", *args.benchmarks] if args.benchmarks else [])]
    seconds = [_timed("here", HERE, suite, work / "new")]
    if args.old:
        old = _timed("old", args.old.resolve(), suite, work / "old")
        seconds.append(_timed("here", HERE, suite, work / "again"))
        mean = sum(seconds) / len(seconds)
        print(f"old {old:.0f} s, here {mean:.0f} s: {mean / old:.2f}x", flush=True)
    if not args.kills:
        return 0
    where = _killed(args.kills, suite, work / "killed", max(seconds))
    _timed("here, behind the kills", HERE, suite, work / "killed")
    same = _table(work / "killed").equals(_table(work / "new"))
    print(f"{sum(where.values())} kills in {where}: {'the same table' if same else 'ANOTHER TABLE'}")
    return 0 if same else 1


def _dynllava() -> list[str]:
    return [sys.executable, "-m", "dynllava_plugin.cli"]


def _environment(checkout: Path, work: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "PYTHONPATH": str(checkout)}
    return {**os.environ, **offline}


def _timed(name: str, checkout: Path, suite: list[str], output: Path) -> float:
    """Return the seconds of a whole suite, start to table; print them with the processes that it started."""
    started = time.monotonic()
    command = [*_dynllava(), *suite, "--output", str(output)]
    log = output.with_suffix(".txt")
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            env=_environment(checkout, output.parent),
            cwd=output.parent,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        seen: set[int] = set()
        while process.poll() is None:
            seen |= set(children(process.pid))
            time.sleep(0.2)
    seconds = time.monotonic() - started
    print(
        f"{name}: {seconds:.0f} s, {len(seen)} processes, ended with {process.returncode} ({log})", flush=True
    )
    return seconds


def _killed(times: int, suite: list[str], output: Path, longest: float) -> dict[str, int]:
    """Kill the suite and its process `times` times, and return how often each stage was hit; fewer where it ended before."""
    chance, hit = random.Random(0), dict.fromkeys(("loading", "answering", "scoring and writing"), 0)
    for number in range(times):
        process = subprocess.Popen(
            [*_dynllava(), *suite, "--output", str(output)],
            env=_environment(HERE, output.parent),
            cwd=output.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and not children(process.pid):
            time.sleep(0.01)
        # Most of a short suite is loading: three quarters of the moments are counted from the first new answer on.
        before = _answers(output)
        while number % 4 and process.poll() is None and _answers(output) == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, longest / times))
        if process.poll() is not None:
            break  # the whole suite is done: nothing is left to be killed
        hit[_stage(output, before)] += 1
        for child in [*children(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()
    return hit


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            facts = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(facts[1]) == pid else []
    return found


def _answers(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("*/*/*/journal/*.jsonl"))


def _stage(output: Path, before: int) -> str:
    """Return what the run that is being carried out was at."""
    if _answers(output) == before:
        return "loading"
    for state in output.glob("*/*/*/run.json"):
        progress = [json.loads(path.read_text()) for path in state.parent.glob("journal/progress-*.json")]
        if json.loads(state.read_text())["state"] == "running" and progress:
            done = all(item.get("done") == item.get("total") for item in progress)
            return "scoring and writing" if done else "answering"
    return "answering"


def _table(output: Path) -> pd.DataFrame:
    from dynllava_plugin.evaluation.results.results import read_results

    table = read_results(output).drop(columns=["file", "seconds"], errors="ignore")
    return table.sort_values(["benchmark", "harness", "metric"]).reset_index(drop=True)


if __name__ == "__main__":
    sys.exit(main())
