"""`dynllava eval SUITE`: a suite of benchmarks in lmms-eval and VLMEvalKit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import check_installed
from dynllava_plugin.evaluation.options import add_flags
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.sparsity.config import MODES


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
    from dynllava_plugin.evaluation.results.footer import count_of_runs
    from dynllava_plugin.evaluation.suite.report import report
    from dynllava_plugin.evaluation.suite.runner import Runner
    from dynllava_plugin.evaluation.suite.runs import plan
    from dynllava_plugin.files import check_folder

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
    judged = [task for benchmark in config.wanted() for task in benchmark.tasks(LMMS_EVAL)]
    runs = plan(config, find_judge(LMMS_EVAL, judged))
    packages = {LMMS_EVAL: "lmms_eval", VLMEVALKIT: "vlmeval"}
    check_installed("eval", "eval", *sorted({packages[run.harness] for run in runs}))
    print(f"{count_of_runs(len(runs))} into {config.output}", flush=True)
    try:
        outcomes = Runner(runs, config.jobs, config.data, lambda line: print(line, flush=True)).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return report(config, outcomes)
