"""Answers of one policy to lmms-eval's tasks, benchmark by benchmark, with the checkpoint loaded once for all policies."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any

from dynllava_plugin.compare.bootstrap import each_score, resampled
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, METRICS, Benchmark
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.lmms_eval.questions import checked_visuals
from dynllava_plugin.evaluation.results.journal import Journal
from dynllava_plugin.evaluation.settings import ModelSettings


@dataclass
class Figure:
    """One metric of one policy.

    Attributes
    ----------
    metric : str
        Our name.
    value : float
        As the task aggregates it, in our unit.
    n : int
        Questions.
    draws : list of float
        The value over resampled questions, the same ones for every policy; empty where the task's aggregation allows none.
    scores : list of float
        Each question's, in order, in the value's unit; empty where the value isn't their mean.
    """

    metric: str
    value: float
    n: int
    draws: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class Harness:
    """lmms-eval around one engine.

    Parameters
    ----------
    limit : int or None
        Questions of each task.
    data : Path or None
        Folder with local hub repositories, by name.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], limit: int | None, data: Path | None) -> None:
        from lmms_eval.tasks import TaskManager, get_task_dict
        from loguru import logger

        from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER

        logger.disable("lmms_eval")  # its progress bars say enough
        self.limit = limit
        own = all(not benchmark.repo for benchmark in benchmarks)  # lmms-eval's own are hundreds of files
        self._manager = TaskManager(
            "ERROR", include_path=str(TASKS_FOLDER), include_defaults=not own, model_name="dynllava"
        )
        with contextlib.chdir(data or Path.cwd()):
            self._tasks = {
                benchmark.name: get_task_dict(benchmark.tasks(LMMS_EVAL), self._manager)
                for benchmark in benchmarks
            }
        for task in (task for loaded in self._tasks.values() for task in loaded.values()):
            found = task.aggregation()
            found.update({key: forgetful(aggregate) for key, aggregate in found.items()})

    def measure(
        self, engine: Engine, settings: ModelSettings, benchmark: Benchmark, journal: Path
    ) -> tuple[list[Figure], dict[str, Any]]:
        """Return what the engine's model, as it is set, reaches, and its answers' mean token counts.

        Of several processes the first one has the figures, the others none.
        """
        from lmms_eval.evaluator import simple_evaluate

        with _quiet() as folder:
            arguments = Namespace(output_path=folder, process_with_media=True)
            model = _loaded(engine, settings, Journal(journal))
            results = simple_evaluate(
                model=model,
                tasks=list(self._tasks[benchmark.name].values()),
                limit=self.limit,
                task_manager=self._manager,
                log_samples=True,
                bootstrap_iters=0,
                verbosity="ERROR",
                cli_args=arguments,
            )
            model.record.gather()
            if not results:
                return [], {}
            counts = model.record.to_dict(LMMS_EVAL)["tokens"]
            figures = [
                figure
                for name, task in self._tasks[benchmark.name].items()
                for figure in _figures(name, task, results, benchmark, arguments)
            ]
        return figures, next(iter(counts.values()), {})

    def inputs(self, engine: Engine, benchmark: Benchmark, count: int) -> list[dict[str, Any]]:
        """Return `model(...)` arguments of the benchmark's first samples, each alone, images as pixels."""
        name, task = next(reversed(self._tasks[benchmark.name].items()))
        found = []
        for index, document in enumerate(islice(task.eval_docs, count)):
            visuals = checked_visuals(task.doc_to_visual(document), f"{name} {index}")
            request = engine.style.request([(task.doc_to_text(document), None)], visuals, f"{name} {index}")
            found.append(dict(engine.encoder.processed(request, request.prompt).to(engine.model.device)))
        return found


def _figures(
    name: str, task: Any, results: dict[str, Any], benchmark: Benchmark, arguments: Namespace
) -> Iterator[Figure]:
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    for _, metric, key, factor in METRICS.get((LMMS_EVAL, name), ()):
        value = next((v for k, v in results["results"][name].items() if k.partition(",")[0] == key), None)
        if isinstance(value, (int, float)):
            aggregate = task.aggregation()[key]
            with contextlib.suppress(TypeError, ValueError):  # numpy's functions have no signature
                if "args" in inspect.signature(aggregate).parameters:
                    aggregate = functools.partial(aggregate, args=arguments)
            items = [sample[key] for sample in samples if key in sample]
            draws = resampled(items, aggregate, benchmark.name) if items else None
            listed = [] if draws is None else (draws * factor).tolist()
            scores = [factor * score for score in each_score(items, aggregate)]
            yield Figure(metric.name, value * factor, len(samples), listed, scores)


def forgetful(aggregate: Any) -> Any:
    """Return an aggregation that begins anew at every call: OCRBench's adds to a dictionary of its module."""
    if not isinstance(aggregate, FunctionType):
        return aggregate

    @functools.wraps(aggregate)
    def call(*args: Any, **kwargs: Any) -> Any:
        names = {
            name: copy.deepcopy(value)
            if isinstance(value, (dict, list)) and not name.startswith("__")
            else value
            for name, value in aggregate.__globals__.items()
        }
        made = FunctionType(aggregate.__code__, names, None, aggregate.__defaults__, aggregate.__closure__)
        return made(*args, **kwargs)

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[str]:
    """Yield a folder for what tasks write beside their figure, and let what they print go."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield folder


def _loaded(engine: Engine, settings: ModelSettings, journal: Journal) -> Any:
    """Return lmms-eval's model around an engine that is there already and stays."""
    from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava

    class Loaded(DynamicLlava):
        load = staticmethod(lambda settings, batch_size=0: engine)
        new_journal = staticmethod(lambda: journal)

        def clean(self) -> None:
            """Keep nothing: the engine serves the next policy too."""

    return Loaded(str(engine.batch_size), **settings.to_dict())
