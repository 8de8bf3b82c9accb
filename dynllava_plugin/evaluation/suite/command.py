"""`dynllava eval SUITE`: a suite of benchmarks in lmms-eval and VLMEvalKit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError, check_installed
from dynllava_plugin.evaluation.options import add_flags
from dynllava_plugin.evaluation.results.footer import STATE, count_of_runs, footer
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.files import check_folder, saved_json, write_json, write_text
from dynllava_plugin.sparsity.config import MODES

MANIFEST = "suite.json"


def add_parser(commands: Any) -> None:
    """Add the subcommand to the ones of `dynllava`."""
    parser = commands.add_parser(
        "eval",
        help="a suite of benchmarks in both harnesses, resumable, with one table",
        epilog="A judge for MM-Vet and LLaVA-Wild: OPENAI_API_KEY, and --judge-url and --judge-model for "
        "another endpoint than OpenAI's.",
    )
    parser.add_argument(
        "suite",
        type=Path,
        metavar="SUITE",
        help="a packaged one, e.g. understanding, or a file of your own, my.yaml",
    )
    several = {"action": "append", "choices": MODES, "help": "several times for several modes"}
    named = {"help": "checkpoint folder, hub id, or tiny"}
    add_flags(parser, fields(ModelSettings), pretrained=named, mode=several)
    add_flags(parser, [item for item in fields(SuiteConfig) if item.metadata])
    parser.set_defaults(run=_run)


_OWN = ("suite", "command", "run")


def _run(args: argparse.Namespace) -> int:
    return evaluate(args.suite, {key: value for key, value in vars(args).items() if key not in _OWN})


def evaluate(suite: Path, overrides: Mapping[str, Any]) -> int:
    """Carry out a suite, a file or a packaged one's name, with `overrides` (keys of `SuiteConfig`, None: as the file says).

    Returns
    -------
    int
        0, 1 where a run failed, 130 where it was stopped.

    Raises
    ------
    UserError
        For a setting that is wrong, before anything runs.
    """
    from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
    from dynllava_plugin.evaluation.judges import MODEL, URL, checked_url, find_judge
    from dynllava_plugin.evaluation.suite.runner import Runner
    from dynllava_plugin.evaluation.suite.runs import plan

    config = SuiteConfig.read(suite, overrides)
    assert config.output is not None
    check_folder("--output", config.output)
    if config.judge_url:
        checked_url(config.judge_url)
    given = {URL: config.judge_url, MODEL: config.judge_model}
    os.environ |= {name: value for name, value in given.items() if value}
    for settings in config.settings():
        settings.check()
    if config.left_out():
        names = ", ".join(benchmark.name for benchmark in config.left_out())
        print(f"left out, {config.harness} has no task for them: {names}", file=sys.stderr, flush=True)
    packages = {LMMS_EVAL: "lmms_eval", VLMEVALKIT: "vlmeval"}
    check_installed("eval", "eval", *(packages[harness] for harness in config.harnesses()), "nltk")
    judged = [task for benchmark in config.wanted() for task in benchmark.tasks(LMMS_EVAL)]
    runs = plan(config, find_judge(LMMS_EVAL, judged))
    print(f"{count_of_runs(len(runs))} into {config.output}", flush=True)
    try:
        outcomes = Runner(runs, config.jobs, config.data, lambda line: print(line, flush=True)).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return report(config, outcomes)


def report(config: SuiteConfig, outcomes: list[Any]) -> int:
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


def _manifest(config: SuiteConfig, outcomes: list[Any]) -> dict[str, Any]:
    from dynllava_plugin.environment import host, versions
    from dynllava_plugin.evaluation.results.identity import checkpoint_hash, commit

    runs: list[dict[str, Any]] = []
    for outcome in outcomes:
        state = saved_json(outcome.run.folder / STATE)
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
