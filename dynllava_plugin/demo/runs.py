"""The demo's evaluations: a suite of easy-VQA's sets for each setting, in both harnesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynllava_plugin.demo.parts import PartFailed
from dynllava_plugin.evaluation.suite import runs as suite
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.runner import Runner
from dynllava_plugin.evaluation.suite.runs import Run

SHORT, LONG = ("easy_vqa", "easy_vqa_scenes"), "easy_vqa_describe"


@dataclass(frozen=True)
class Setting:
    """One row of the table: the same checkpoint under other settings.

    Attributes
    ----------
    name : str
        As the table calls it.
    sparsity : dict
        Overrides, by the suite's names.
    long : bool
        Whether it also describes scenes; the control's question is answered by the short answers.
    """

    name: str
    sparsity: dict[str, Any]
    long: bool = False


RANDOM = {"mode": "image_text", "image_policy": "random"}
SETTINGS = (
    Setting("full", {"mode": "full"}, long=True),
    Setting("image", {"mode": "image"}, long=True),
    Setting("image_text", {"mode": "image_text"}, long=True),
    Setting("random", RANDOM),
    Setting("image_text@10%", {"mode": "image_text", "vision_keep_rate": 0.1}),
    Setting("random@10%", {**RANDOM, "vision_keep_rate": 0.1}),
)


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
    for setting in SETTINGS:
        benchmarks = [*SHORT, LONG] if setting.long else list(SHORT)
        config = SuiteConfig.read(Path("easy_vqa"), {**common, "benchmarks": benchmarks, **setting.sparsity})
        runs += [replace(run, mode=setting.name) for run in suite.plan(config, None)]
    return runs


def evaluate(runs: Sequence[Run], jobs: int) -> None:
    """Carry out all runs; `PartFailed` names every one that failed, after the others have ended."""
    outcomes = Runner(runs, jobs, None, lambda line: print(line, flush=True)).run()
    failed = [f"{outcome.run.title}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    if failed:
        raise PartFailed("; ".join(failed))
