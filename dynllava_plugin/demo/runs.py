"""The demo's evaluations: a suite of easy-VQA's sets for each setting, in both harnesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynllava_plugin.demo.parts import PartFailed
from dynllava_plugin.evaluation.suite import runs as suite
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.runner import Runner
from dynllava_plugin.evaluation.suite.runs import Run

SHORT, LONG = ("easy_vqa", "easy_vqa_scenes"), "easy_vqa_describe"


RANDOM = {"mode": "image_text", "image_policy": "random"}
# The table's rows, as it calls them: the same checkpoint under other settings of a suite.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "image": {"mode": "image"},
    "image_text": {"mode": "image_text"},
    "random": RANDOM,
    "image_text@10%": {"mode": "image_text", "vision_keep_rate": 0.1},
    "random@10%": {**RANDOM, "vision_keep_rate": 0.1},
}
DESCRIBED = ("full", "image", "image_text")  # the control's question is answered by the short answers


def plan(folder: Path, checkpoint: str, limit: int | None, batch_size: int, jobs: int) -> list[Run]:
    """Return every setting's runs in both harnesses, the long ones first."""
    common = {
        "pretrained": checkpoint,
        "limit": limit,
        "batch_size": batch_size,
        "jobs": jobs,
        "output": folder,
    }
    runs = []
    for name, sparsity in SETTINGS.items():
        benchmarks = [*SHORT, LONG] if name in DESCRIBED else list(SHORT)
        config = SuiteConfig.read(Path("easy_vqa"), {**common, "benchmarks": benchmarks, **sparsity})
        runs += [replace(run, mode=name) for run in suite.plan(config, None)]
    return runs


def evaluate(runs: Sequence[Run], jobs: int) -> None:
    """Carry out all runs; `PartFailed` names every one that failed, after the others have ended."""
    outcomes = Runner(runs, jobs, None, lambda line: print(line, flush=True)).run()
    failed = [f"{outcome.run.title}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    if failed:
        raise PartFailed("; ".join(failed))
