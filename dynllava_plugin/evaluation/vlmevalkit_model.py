"""Dynamic-LLaVA as a VLMEvalKit model: translates its messages for the engine and decides nothing.

The kit asks one question at a time. The adapter looks ahead: it answers the dataset's next rows in one batch
and hands them out as the kit asks. Batching never changes an answer, so the results stay the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from vlmeval.vlm.base import BaseModel

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.answers import Answer
from dynllava_plugin.evaluation.engine import DEFAULT_BATCH_SIZE, Engine
from dynllava_plugin.evaluation.prompting import conversation_prompt
from dynllava_plugin.evaluation.records import RECORD
from dynllava_plugin.evaluation.requests import MAX_NEW_TOKENS, Generation, Request
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.model.prompts import IMAGE_TOKEN

Message = list[dict[str, Any]]
# Keys that our datasets add to a message's text item: its token limit, and a reference answer to score.
TOKEN_LIMIT, REFERENCE = "max_new_tokens", "reference"


class DynamicLlava(BaseModel):
    """``--model dynllava``.

    Parameters
    ----------
    batch_size : int
        Rows answered at once; 1 asks one at a time, as the kit does.
    max_new_tokens : int
        Unless the dataset limits an answer itself.
    model_args
        Fields of `ModelSettings`.
    """

    INTERLEAVE = True

    def __init__(
        self, batch_size: int = DEFAULT_BATCH_SIZE, max_new_tokens: int = MAX_NEW_TOKENS, **model_args: Any
    ) -> None:
        super().__init__()
        settings = ModelSettings.from_dict(model_args)
        self.engine = Engine.load(settings, batch_size)
        self.max_new_tokens = max_new_tokens
        RECORD.note_model(settings, self.engine.model)
        self._ahead = _LookAhead(None, batch_size)

    def set_dump_image(self, dump_image_func: Callable[..., Any]) -> None:
        """Called by the kit before a dataset's first question, with that dataset's method."""
        super().set_dump_image(dump_image_func)
        self._ahead = _LookAhead(getattr(dump_image_func, "__self__", None), self.engine.batch_size)

    def generate_inner(self, message: Message, dataset: str | None = None) -> dict[str, Any]:
        """The answer and, as `extra_records`, its token counts and, with a reference, its score.

        Raises
        ------
        UserError
            For an empty question, a bad image, or images that don't match the text's markers.
        """
        ready = self._ahead.take(message)
        if ready is None:
            messages = self._ahead.following(message)
            for item, record in zip(messages, self._answer(messages, dataset or "dataset"), strict=True):
                self._ahead.put(item, record)
            ready = self._ahead.take(message)
            assert ready is not None
        answer, scores = ready
        RECORD.note_answers(dataset or "dataset", [answer])
        counts = (
            "prompt_tokens",
            "image_tokens",
            "kept_image_tokens",
            "generated_tokens",
            "cached_tokens",
            "kept_tokens",
        )
        records = {name: getattr(answer, name) for name in counts}
        return {"prediction": answer.text, "extra_records": {**records, **scores}}

    def _answer(self, messages: list[Message], dataset: str) -> list[tuple[Answer, dict[str, float | int]]]:
        limits = {_text_item(message).get(TOKEN_LIMIT, self.max_new_tokens) for message in messages}
        requests = [_request(message, dataset) for message in messages]
        generation = Generation.from_task({"max_new_tokens": max(limits)})
        answers = self.engine.generate(requests, generation)
        scores: list[dict[str, float | int]] = [{} for _ in messages]
        scored = [index for index, message in enumerate(messages) if REFERENCE in _text_item(message)]
        if scored:
            wanted = [_request(messages[index], dataset) for index in scored]
            for index, score in zip(scored, self.engine.score(wanted), strict=True):
                scores[index] = {
                    "nll": -score.logprob,
                    "reference_tokens": score.tokens,
                    "ppl": score.perplexity,
                }
        return list(zip(answers, scores, strict=True))


class _LookAhead:
    """Answers computed before the kit asked for them.

    Parameters
    ----------
    dataset : vlmeval dataset or None
        Whose rows come next; without one nothing is looked up.
    size : int
        Rows in a batch.
    """

    def __init__(self, dataset: Any, size: int) -> None:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rows = (
            range(int(os.environ.get("RANK", 0)), len(dataset.data), world)
            if dataset is not None
            else range(0)
        )
        self._rows: Iterator[int] = iter(rows)
        self._dataset, self._size = dataset, size
        self._ready: dict[str, Any] = {}

    def take(self, message: Message) -> Any:
        """The answer to `message`, or None where it isn't computed yet."""
        return self._ready.pop(_key(message), None)

    def put(self, message: Message, answer: Any) -> None:
        """Keep an answer until the kit asks."""
        self._ready[_key(message)] = answer

    def following(self, message: Message) -> list[Message]:
        """`message` and the rows after it, one batch in all."""
        if self._ready:
            # The kit asks other prompts than the rows give (some datasets shuffle choices): stop.
            self._ready.clear()
            self._rows = iter(())
        key = _key(message)
        # Rows before it were answered in an earlier run; where no row matches, the search ends with the rows.
        for row in self._rows:
            if _key(self._prompt(row)) == key:
                break
        return [message, *(self._prompt(row) for row in islice(self._rows, self._size - 1))]

    def _prompt(self, row: int) -> Message:
        return [dict(item) for item in self._dataset.build_prompt(self._dataset.data.iloc[row])]


def _key(message: Message) -> str:
    return json.dumps(message, sort_keys=True, default=str)


def _text_item(message: Message) -> dict[str, Any]:
    return next((item for item in message if item["type"] == "text"), {})


def _request(message: Message, dataset: str) -> Request:
    """The message as one question; an image becomes LLaVA's marker and a line break where it stands."""
    images = [item["value"] for item in message if item["type"] == "image"]
    name = f"{dataset} ({os.path.basename(images[0])})" if images else dataset
    other = [item["type"] for item in message if item["type"] not in ("image", "text")]
    if other:
        raise UserError(f"{name}: LLaVA-1.5 reads images and text, not {other[0]}")
    text = "".join(item["value"] for item in message if item["type"] == "text")
    if IMAGE_TOKEN not in text:
        text = "".join(f"{IMAGE_TOKEN}\n" if item["type"] == "image" else item["value"] for item in message)
    prompt = conversation_prompt([(text.strip(), None)], len(images), name)
    reference = _text_item(message).get(REFERENCE, "")
    return Request(prompt, tuple(images), name, continuation=f" {reference.strip()}" if reference else "")
