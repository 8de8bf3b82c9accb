"""Answers of one policy to lmms-eval tasks, question by question, with the checkpoint loaded once for all policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, find_metrics
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.engine.images import load_image
from dynllava_plugin.evaluation.engine.requests import Request
from dynllava_plugin.evaluation.results.tables import LMMS_EVAL
from dynllava_plugin.evaluation.settings import ModelSettings


@dataclass
class Figure:
    """One metric of one policy.

    Attributes
    ----------
    benchmark, metric : str
        Our names.
    value : float
        As the task aggregates it, in our unit.
    questions : list of int
        Document numbers.
    scores : list of float
        Each question's, in our unit; empty where the task's figure is no mean over questions.
    counts : dict
        Means of the answers' token counts (`mean_counts`).
    """

    benchmark: str
    metric: str
    value: float
    questions: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)


def task_names(wanted: Sequence[str]) -> list[str]:
    """Benchmarks by our names, or lmms-eval tasks by theirs -> lmms-eval tasks."""
    known = {item.name: item for item in BENCHMARKS}
    names: list[str] = []
    for name in wanted:
        item = known.get(name)
        found = [name] if item is None else [m.lmms_eval[0] for m in item.metrics if m.lmms_eval]
        names += [task for task in dict.fromkeys(found) if task not in names]
    return names


class Harness:
    """lmms-eval around one engine."""

    def __init__(self, tasks: Sequence[str], limit: int | None) -> None:
        from loguru import logger

        logger.disable("lmms_eval")  # its progress bars say enough
        self.tasks, self.limit = list(tasks), limit
        self._manager = _tasks_known(all_of_them=False)
        if any(task not in self._manager.all_tasks for task in self.tasks):
            self._manager = _tasks_known(all_of_them=True)  # hundreds of files: half a minute
        unknown = [task for task in self.tasks if task not in self._manager.all_tasks]
        if unknown:
            raise UserError(
                f"--tasks: lmms-eval has no task {unknown[0]!r}; `lmms_eval tasks list` lists them"
            )

    def figures(self, engine: Engine, settings: ModelSettings) -> list[Figure]:
        """What the engine's model, as it is set, answers."""
        from lmms_eval.evaluator import simple_evaluate

        model = _loaded(engine, settings)
        results = simple_evaluate(
            model=model,
            tasks=self.tasks,
            limit=self.limit,
            task_manager=self._manager,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        counts = model.record.to_dict(LMMS_EVAL)["tokens"]
        figures = []
        for task in self.tasks:
            scored = results["results"][task]
            samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
            for benchmark, metric, key, factor in find_metrics(LMMS_EVAL, task):
                value = next((v for k, v in scored.items() if k.partition(",")[0] == key), None)
                if isinstance(value, (int, float)):
                    figure = Figure(benchmark.name, metric.name, value * factor)
                    figure.counts = counts.get(task, {})
                    _add_questions(figure, samples, key, factor)
                    figures.append(figure)
        if not figures:
            raise UserError(f"--tasks: {', '.join(self.tasks)} gave no figure that the registry knows")
        return figures

    def single_inputs(self, engine: Engine, task: str, count: int) -> list[dict[str, Any]]:
        """`model(...)` arguments of the task's first samples, each alone."""
        return [model_inputs(engine, [request]) for request in self._requests(engine, task, count)]

    def _requests(self, engine: Engine, task: str, count: int) -> list[Request]:
        from lmms_eval.tasks import get_task_dict

        found = get_task_dict([task], self._manager)[task]
        requests = []
        for index, doc in enumerate(islice(found.eval_docs, count)):
            visuals = found.doc_to_visual(doc)
            prompt = engine.style.prompt([(found.doc_to_text(doc), None)], len(visuals), f"{task} {index}")
            requests.append(Request(prompt, tuple(visuals), f"{task} {index}"))
        return requests


def _tasks_known(all_of_them: bool) -> Any:
    from lmms_eval.tasks import TaskManager

    from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER

    return TaskManager(
        "ERROR", include_path=str(TASKS_FOLDER), include_defaults=all_of_them, model_name="dynllava"
    )


def model_inputs(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """`model(...)` arguments of a batch of prompts, padded on the left."""
    images = [load_image(image, request.name) for request in requests for image in request.images]
    texts = [request.prompt for request in requests]
    inputs = engine.processor(images=images or None, text=texts, padding=True, return_tensors="pt")
    inputs = inputs.to(engine.model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(engine.model.dtype)
    return dict(inputs)


def _add_questions(figure: Figure, samples: list[dict[str, Any]], key: str, factor: float) -> None:
    scores = [sample.get(key) for sample in samples]
    if not all(isinstance(score, (int, float)) for score in scores):
        return
    values = [float(score) * factor for score in scores if score is not None]
    if abs(sum(values) / len(values) - figure.value) <= 1e-6 * max(1.0, abs(figure.value)):
        figure.questions = [int(sample["doc_id"]) for sample in samples]
        figure.scores = values


def _loaded(engine: Engine, settings: ModelSettings) -> Any:
    """lmms-eval's model around an engine that is there already and stays."""
    from dynllava_plugin.evaluation.lmms_eval.model import DynamicLlava
    from dynllava_plugin.evaluation.results.journal import Journal

    class Loaded(DynamicLlava):
        load = staticmethod(lambda settings, batch_size=0: engine)
        new_journal = staticmethod(lambda: Journal(None))

        def clean(self) -> None:
            """The engine serves the next policy too."""

    return Loaded(str(engine.batch_size), **settings.to_dict())
