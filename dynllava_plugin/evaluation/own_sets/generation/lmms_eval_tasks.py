"""The generation sets as lmms-eval tasks: where `tasks/generation/*.yaml` find documents, rounds and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict

from dynllava_plugin.evaluation.lmms_eval.tasks import LocalTask
from dynllava_plugin.evaluation.own_sets.generation.sets import load_rows, mean_meteor
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor_name


class GenerationTask(LocalTask):
    """A task whose documents come from `load_rows` instead of the hub."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Fill the test split; images stay paths until a question is asked."""
        name = self.DATASET_NAME
        assert isinstance(name, str)
        rows = [
            {
                "id": row["id"],
                "image": row["image"],
                "questions": [question for question, _ in row["turns"]],
                "answers": [answer for _, answer in row["turns"]],
            }
            for row in load_rows(name)
        ]
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


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


def process_answers(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Return METEOR of the answers in [0, 1], under the name of what could be computed here."""
    answers = [results[0]] if isinstance(results[0], str) else list(results[0])
    return {meteor_name(): mean_meteor(doc["answers"], answers)}
