"""The end of a suite: its manifest, its table, and what failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.footer import count_of_runs, footer
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.runner import Outcome, read_state
from dynllava_plugin.files import write_json, write_text

MANIFEST = "suite.json"


def report(config: SuiteConfig, outcomes: list[Outcome]) -> int:
    """Write `suite.json` and `table.csv`, print the table and the failures; returns the exit status."""
    assert config.output is not None
    failed = [outcome for outcome in outcomes if outcome.problem]
    try:
        write_json(config.output / MANIFEST, _manifest(config, outcomes))
        _table(config.output, [outcome.run.output for outcome in outcomes])
    except OSError as error:
        print(f"error: {error.filename or config.output}: {error.strerror}", file=sys.stderr)
        return 1
    for outcome in failed:
        print(f"error: {outcome.run.title}: {outcome.problem}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {count_of_runs(len(outcomes))} failed; the same command tries again",
            flush=True,
        )
    return 1 if failed else 0


def _table(folder: Path, outputs: list[Path]) -> None:
    """Of this invocation's runs only: what other checkpoints or settings left in `folder` is `dynllava table`'s."""
    from dynllava_plugin.evaluation.results.results import read_results
    from dynllava_plugin.evaluation.results.tables import render

    try:
        table = read_results(folder, outputs)
    except UserError as error:
        print(f"no table: {error}")
        return
    write_text(folder / "table.csv", table.to_csv(index=False))
    text = render(table, "markdown") + footer(outputs)
    write_text(folder / "table.md", text)
    print(f"\n{text}\ntable: {folder / 'table.csv'}")


def _manifest(config: SuiteConfig, outcomes: list[Outcome]) -> dict[str, Any]:
    from dynllava_plugin.environment import host, versions
    from dynllava_plugin.evaluation.results.identity import checkpoint_hash, commit

    runs: list[dict[str, Any]] = []
    for outcome in outcomes:
        state = read_state(outcome.run.folder)
        runs.append(
            {
                "benchmark": outcome.run.benchmark.name,
                "harness": outcome.run.harness,
                "mode": outcome.run.mode,
                "state": "failed" if outcome.problem else "done",
                "problem": outcome.problem,
                "seconds": state.get("seconds"),
                "command": outcome.run.typed,
            }
        )
    settings = config.settings()
    return {
        "settings": {key: str(value) for key, value in config.given().items()},
        "checkpoint_hash": checkpoint_hash(settings[0].pretrained),
        "versions": versions(),
        "commit": commit(),
        "host": host(),
        "seconds": round(sum(run["seconds"] or 0 for run in runs), 1),
        "runs": runs,
    }
