"""A suite's runs: one benchmark in one harness under one setting, as the harness's own command line."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.environment import versions
from dynllava_plugin.evaluation.benchmarks import BUILT, LMMS_EVAL, Benchmark
from dynllava_plugin.evaluation.judges import MODEL, URL, Judge
from dynllava_plugin.evaluation.own_sets.long_answers import DATA_VARIABLE, IMAGES_VARIABLE
from dynllava_plugin.evaluation.own_sets.text_metrics import METEOR, meteor_name
from dynllava_plugin.evaluation.results.identity import HASH_VARIABLE, resolve_checkpoint, source_digest
from dynllava_plugin.evaluation.settings import ModelSettings, as_folder_name, module_and_arguments
from dynllava_plugin.evaluation.suite.config import SuiteConfig
from dynllava_plugin.evaluation.suite.data import HUB, KIT, LONG, identity

_PACKAGES = {LMMS_EVAL: "lmms-eval", "vlmevalkit": "ms-vlmeval"}


@dataclass(frozen=True)
class Run:
    """One benchmark in one harness under one setting.

    Attributes
    ----------
    mode : str
        As the table calls the setting's mode; empty where it is the checkpoint's own.
    folder : Path
        Everything of this run: log, journal, the harness's output, state.
    command : list of str
        The harness's module and its arguments.
    environment : dict
        Beyond this process's.
    directory : Path
        Where the harness runs: it looks for local hub repositories there.
    answers_from, scores_from : dict
        What its answers, and beyond them its scores, depend on.
    launch : tuple of str
        What starts a module: Python, or torchrun where several processes share the questions.
    """

    benchmark: Benchmark
    harness: str
    mode: str
    folder: Path
    command: list[str]
    environment: dict[str, str]
    directory: Path
    answers_from: dict[str, Any]
    scores_from: dict[str, Any]
    launch: tuple[str, ...] = (sys.executable, "-m")

    @property
    def root(self) -> Path:
        """Return the folder of all runs of this checkpoint and setting."""
        return self.folder.parents[1]

    @property
    def typed(self) -> list[str]:
        """Return the command that does the same by itself."""
        return [*self.launch, *self.command]

    @property
    def title(self) -> str:
        """Return the run's name for progress lines and errors."""
        return f"{self.benchmark.name} in {self.harness}" + (f", mode {self.mode}" if self.mode else "")

    @property
    def journal(self) -> Path:
        """Return where the answers are written down as they come."""
        return self.folder / "journal"

    @property
    def output(self) -> Path:
        """Return the harness's output."""
        return self.folder / "output"


def plan(config: SuiteConfig, judge: Judge | None) -> list[Run]:
    """Return all runs of a suite, setting by setting, benchmark by benchmark, both harnesses beside each other.

    Raises
    ------
    UserError
        For a checkpoint that isn't there and can't be fetched.
    """
    assert config.output is not None
    runs = []
    for settings in config.settings():
        digest = resolve_checkpoint(settings.pretrained)
        root = config.output.resolve() / folder_name(settings, digest, config)
        for benchmark in config.wanted():
            for harness in config.harnesses():
                if benchmark.tasks(harness):
                    runs.append(_run(config, settings, digest, root, benchmark, harness, judge))
    return runs


def folder_name(settings: ModelSettings, digest: str, config: SuiteConfig) -> str:
    """Return a folder's name that differs wherever checkpoint or settings do."""
    name = Path(settings.pretrained).name if Path(settings.pretrained).is_dir() else settings.pretrained
    return as_folder_name([name, digest, *settings.labels(), *config.labels()])


def _run(
    config: SuiteConfig,
    settings: ModelSettings,
    digest: str,
    root: Path,
    benchmark: Benchmark,
    harness: str,
    judge: Judge | None,
) -> Run:
    folder = root / harness / re.sub(r"[^\w.-]+", "-", benchmark.name)
    asked = module_and_arguments(
        harness, settings, benchmark.tasks(harness), config.batch_size, folder / "output", config.limit
    )
    launch = [sys.executable, "-m"]
    if config.num_processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(config.num_processes)]
        launch += ["-m"]
    data = config.data.resolve() if config.data else None
    directory = data / HUB if data and (data / HUB).is_dir() else Path.cwd()
    installed = versions()
    answers_from = {
        "benchmark": benchmark.name,
        "harness": harness,
        "settings": settings.to_dict(),
        "limit": config.limit,
        "prompts": config.prompts,
        "checkpoint": digest,
        "data": identity(benchmark, harness, data),
        "versions": {name: installed.get(name) for name in ("torch", "transformers")},
        "sources": source_digest(),
    }
    if benchmark.data == BUILT:
        answers_from["images"] = (
            str(config.images.resolve()) if config.images else os.environ.get(IMAGES_VARIABLE)
        )
    scores_from = {"harness": installed.get(_PACKAGES[harness])}
    scores_from["judge"] = judge.model if judge and benchmark.judge else None
    if any(metric.name == METEOR for metric in benchmark.metrics):
        scores_from["meteor"] = meteor_name()  # WordNet may be installed later
    return Run(
        benchmark=benchmark,
        harness=harness,
        mode=settings.mode or "",
        folder=folder,
        command=[*asked, *_kit_options(config, harness)],
        environment=_environment(config, settings, digest, data, judge),
        directory=directory,
        answers_from=answers_from,
        scores_from=scores_from,
        launch=tuple(launch),
    )


def _kit_options(config: SuiteConfig, harness: str) -> list[str]:
    """What only VLMEvalKit has to be told."""
    if harness == LMMS_EVAL:
        return []
    local = config.data / KIT if config.data else None
    data = ["--data-root", str(local.resolve())] if local and local.is_dir() else []
    return ["--prompts", config.prompts, *data]


def _environment(
    config: SuiteConfig,
    settings: ModelSettings,
    digest: str,
    data: Path | None,
    judge: Judge | None,
) -> dict[str, str]:
    import torch

    environment = {
        HASH_VARIABLE: f"{settings.pretrained}={digest}",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // (config.jobs * config.num_processes))
        environment |= {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "1"}
    if data and (data / LONG).is_dir():
        environment[DATA_VARIABLE] = str(data / LONG)
    if config.images:
        environment[IMAGES_VARIABLE] = str(config.images.resolve())
    if judge:
        environment |= {MODEL: judge.model, URL: judge.url}
    return environment
