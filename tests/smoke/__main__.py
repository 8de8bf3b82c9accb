"""`python -m tests.smoke`, or `make smoke`: proof that every benchmark runs and is read right.

Makes the miniatures, runs `dynllava eval smoke` on them, computes every cell of the table a
second time from what the runs saved, and then takes some benchmarks again: cut short and resumed, and in two
processes. Both have to give the same table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.footer import STATE, footer
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import render
from dynllava_plugin.evaluation.suite.command import evaluate
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.data import LONG
from dynllava_plugin.evaluation.suite.runs import Run, plan
from dynllava_plugin.files import write_text
from tests.minis import make_minis
from tests.smoke.check import check_table

SUITE = Path("smoke")
AGAIN = ("POPE", "LVIS-VQA multi")
# What may differ between two runs of the same.
_NOT_COMPARED = ["seconds", "file"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the smoke test; returns 0, 1 where something is wrong, 2 where the user can mend the cause."""
    parser = argparse.ArgumentParser(prog="make smoke", description=__doc__)
    add = parser.add_argument
    add("--pretrained", default="tiny", help="default: %(default)s")
    add("--mode", default="image_text", help="default: %(default)s")
    add("--suite", type=Path, default=SUITE)
    add("--output", type=Path, default=Path("results/smoke"), help="of the table (default: %(default)s)")
    add("--work", type=Path, help="of miniatures and runs (default: OUTPUT_work)")
    add("--benchmarks", nargs="+", help="these instead of all")
    add("--jobs", type=int, default=os.cpu_count() or 1)
    add("--once", action="store_true", help="leave out the resumed and the two-process runs")
    args = parser.parse_args(arguments)
    try:
        return smoke(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def smoke(args: argparse.Namespace) -> int:
    """All parts in order."""
    started = time.time()
    work = (args.work or args.output.with_name(f"{args.output.name}_work")).resolve()
    minis, runs_folder = work / "mini", work / "runs"
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache")}
    os.environ["DYNLLAVA_GENERATION"] = str(minis / LONG)
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        os.environ.pop(name, None)  # the table is made without a judge
    shutil.rmtree(runs_folder, ignore_errors=True)
    make_minis(minis)
    settings = {"pretrained": args.pretrained, "mode": [args.mode], "data": minis, "jobs": args.jobs}
    settings |= {"benchmarks": args.benchmarks, "output": runs_folder}
    if evaluate(args.suite, settings):
        return 1
    runs, table = _runs(args, minis, runs_folder), read_results(runs_folder)
    limit = SuiteConfig.read(args.suite, {"pretrained": args.pretrained}).limit
    problems = check_table(table, runs, minis, limit)
    if not args.once:
        again = [name for name in AGAIN if any(run.benchmark.name == name for run in runs)]
        problems += _resumed(args.suite, settings, again, runs, table)
        problems += _two_processes(args.suite, {**settings, "output": work / "two"}, again, table)
    seconds = time.time() - started
    text = render(table, "markdown") + footer([runs_folder])
    write_text(args.output / "table.csv", table.drop(columns="file").to_csv(index=False))
    write_text(args.output / "table.md", text)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    verdict = f"{len(problems)} problems" if problems else "every cell agrees with the saved predictions"
    print(f"{len(table)} cells of {len(runs)} runs in {seconds / 60:.1f} min: {verdict}")
    print(f"table: {args.output / 'table.csv'}")
    return 1 if problems else 0


def _runs(args: argparse.Namespace, minis: Path, output: Path) -> list[Run]:
    overrides = {"pretrained": args.pretrained, "mode": [args.mode], "data": minis, "output": output}
    config = SuiteConfig.read(args.suite, {**overrides, "benchmarks": args.benchmarks})
    return plan(config, None)


def _resumed(
    suite: Path, settings: dict[str, Any], names: list[str], runs: list[Run], table: pd.DataFrame
) -> list[str]:
    """As if killed in the middle: half of the answers written down, no result."""
    if not names:
        return []
    for run in runs:
        if run.benchmark.name in names:
            _cut_short(run)
    print(f"once more, resumed: {', '.join(names)}", flush=True)
    if evaluate(suite, {**settings, "benchmarks": names}):
        return ["the resumed runs failed"]
    return _differences("resumed", read_results(settings["output"]), table)


def _cut_short(run: Run) -> None:
    shutil.rmtree(run.output)
    state = json.loads((run.folder / STATE).read_text(encoding="utf-8"))
    write_text(run.folder / STATE, json.dumps({**state, "state": "running"}))
    for path in run.journal.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[: len(lines) // 2]
        write_text(path, "".join(kept) + lines[-1][: len(lines[-1]) // 2])  # the last one torn


def _two_processes(suite: Path, settings: dict[str, Any], names: list[str], table: pd.DataFrame) -> list[str]:
    if not names:
        return []
    shutil.rmtree(settings["output"], ignore_errors=True)
    print(f"once more, in two processes: {', '.join(names)}", flush=True)
    if evaluate(suite, {**settings, "benchmarks": names, "num_processes": 2, "jobs": 1}):
        return ["the runs in two processes failed"]
    return _differences(
        "two processes", read_results(settings["output"]), table[table["benchmark"].isin(names)]
    )


def _differences(what: str, found: pd.DataFrame, wanted: pd.DataFrame) -> list[str]:
    first, second = (frame.drop(columns=_NOT_COMPARED).reset_index(drop=True) for frame in (found, wanted))
    try:
        pd.testing.assert_frame_equal(first, second, rtol=1e-4, check_dtype=False)
    except AssertionError as error:
        return [f"{what}: not the same table ({' '.join(str(error).split())[:300]})"]
    return []


if __name__ == "__main__":
    sys.exit(main())
