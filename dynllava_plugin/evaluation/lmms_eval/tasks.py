"""Our own sets as lmms-eval tasks: where `task_files/*/*.yaml` find documents, images, rounds and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from PIL import Image

from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.own_sets.long_answers import load_rows, mean_meteor
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor_name
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

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Fill the test split with documents of ours instead of the hub's; images stay paths until a question is asked."""
        self.dataset = DatasetDict({"test": Dataset.from_list(self.documents(str(self.DATASET_NAME)))})
        self.dataset_no_image = self.dataset

    def documents(self, name: str) -> list[dict[str, Any]]:
        """Return the documents of the set `name`."""
        raise NotImplementedError


def tell_how_to_ask(loaded: dict[Any, Any], messages: bool) -> None:
    """Set `messages` of the local ones among loaded tasks, which may be groups."""
    for task in loaded.values():
        if isinstance(task, dict):
            tell_how_to_ask(task, messages)
        elif isinstance(task, LocalTask):
            task.messages = messages


class EasyVQATask(LocalTask):
    """One of easy-VQA's sets: a question and its answer."""

    def documents(self, name: str) -> list[dict[str, Any]]:
        rows = easy_vqa.load_rows(name)
        return [{**row, "question": easy_vqa.question_text(name, row["question"])} for row in rows]


class GenerationTask(LocalTask):
    """One of the paper's generation sets: the questions and answers of a conversation."""

    def documents(self, name: str) -> list[dict[str, Any]]:
        found = []
        for row in load_rows(name):
            questions, answers = map(list, zip(*row["turns"], strict=True))
            found.append({"id": row["id"], "image": row["image"], "questions": questions, "answers": answers})
        return found


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the row's image."""
    return [open_image(doc["image"], doc["id"])]


def process_short_answer(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the exact match of the answer, 0 or 1."""
    return {"exact_match": easy_vqa.exact_match(results[0], doc["answer"])}


def process_long_answers(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Return METEOR in [0, 1] of the answer, or the mean over a conversation's, under the name of what could be computed here."""
    answers = [results[0]] if isinstance(results[0], str) else list(results[0])
    return {meteor_name(): mean_meteor(doc.get("answers") or [doc["answer"]], answers)}


def process_perplexity(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the perplexity of the reference from its mean loss."""
    return {"ppl": math.exp(results[0][0])}


def first_question(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return what the conversation opens with."""
    return doc["questions"][0]


def conversation(doc: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the reference: every round's question and answer."""
    return list(zip(doc["questions"], doc["answers"], strict=True))


def ask(
    doc: dict[str, Any],
    lmms_eval_specific_kwargs: Any = None,
    previous_output: Sequence[str] | None = None,
    round_idx: int | None = None,
    previous_round_info: Any = None,
) -> Any:
    """Return a round's question: the first as text, later ones as lmms-eval's multi-round protocol wants them."""
    if round_idx is None:
        return first_question(doc)
    finished = round_idx >= len(doc["questions"])
    question = "" if finished else doc["questions"][round_idx]
    # The adapter then keeps the rounds before it as context, sparsified as they were.
    return None, question, finished, list(previous_output or []), {"conversation": True}


def mmbench_by_rules(results: list[dict[str, Any]]) -> float:
    """Percentage of questions whose answer is right by lmms-eval's own rules, in any language."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    return 100 * mmbench_evaluator.eval_result(results, eval_method="static")[0]
