"""easy-VQA as lmms-eval tasks: where `tasks/easy_vqa/*.yaml` find their data, images and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from PIL import Image

from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor, meteor_name
from dynllava_plugin.images import open_image

TASKS_FOLDER = Path(__file__).parent / "task_files"


class LocalTask(ConfigurableMessagesTask):
    """A task with documents of its own, for models that are asked by a text and for those that are asked by messages.

    Attributes
    ----------
    messages : bool
        Whether the model that is evaluated wants messages, as lmms-eval's own models of most families do. lmms-eval 0.7.3
        tells it the tasks that it makes itself only; our command tells the others (`tell_how_to_ask`).
    """

    messages = False

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc_id: int, ctx: str, **kwargs: Any) -> Any:
        """Return a document's requests, as the model wants them."""
        kind = ConfigurableMessagesTask if self.messages else ConfigurableTask
        return kind.construct_requests(self, doc_id, ctx, **kwargs)


def tell_how_to_ask(loaded: dict[Any, Any], messages: bool) -> None:
    """Set `messages` of the local ones among loaded tasks, which may be groups."""
    for task in loaded.values():
        if isinstance(task, dict):
            tell_how_to_ask(task, messages)
        elif isinstance(task, LocalTask):
            task.messages = messages


class EasyVQATask(LocalTask):
    """A task whose documents come from `easy_vqa.load_rows` instead of the hub."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Fill the test split; images stay paths until a question is asked."""
        name = self.DATASET_NAME
        assert isinstance(name, str)
        rows = easy_vqa.load_rows(name)
        rows = [{**row, "question": easy_vqa.question_text(name, row["question"])} for row in rows]
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the row's image."""
    return [open_image(doc["image"], doc["id"])]


def process_short_answer(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the exact match of the answer, 0 or 1."""
    return {"exact_match": easy_vqa.exact_match(results[0], doc["answer"])}


def process_long_answer(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return METEOR of the answer in [0, 1], under the name of what could be computed here."""
    return {meteor_name(): meteor(doc["answer"], results[0])}


def process_perplexity(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the perplexity of the reference from its mean loss."""
    return {"ppl": math.exp(results[0][0])}


def mmbench_by_rules(results: list[dict[str, Any]]) -> float:
    """Percentage of questions whose answer is right by lmms-eval's own rules, in any language."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    return 100 * mmbench_evaluator.eval_result(results, eval_method="static")[0]
