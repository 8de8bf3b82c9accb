"""Dynamic-LLaVA as a VLMEvalKit model: translates its messages for the engine and decides nothing.

The kit asks one question at a time. The adapter looks ahead: it answers the dataset's next rows in one batch
and hands them out as the kit asks. Batching changes no answer (float32), so the results stay the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlmeval.vlm.base import BaseModel

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer, Score, joined
from dynllava_plugin.evaluation.engine.engine import DEFAULT_BATCH_SIZE, Engine
from dynllava_plugin.evaluation.engine.prompting import PromptStyle
from dynllava_plugin.evaluation.engine.requests import MAX_NEW_TOKENS, Generation, Request
from dynllava_plugin.evaluation.results.journal import Journal, entry_key
from dynllava_plugin.evaluation.results.record import RunRecord
from dynllava_plugin.evaluation.settings import ModelSettings
from dynllava_plugin.evaluation.vlmevalkit.prompts import has_own_wording, llava_question
from dynllava_plugin.model.prompts import IMAGE_TOKEN

Message = list[dict[str, Any]]
# Keys that our datasets add to a message's text item: its token limit, and a reference answer to score.
TOKEN_LIMIT, REFERENCE = "max_new_tokens", "reference"
# A conversation: a list of (question, reference answer).
TURNS = "turns"
_BATCHES_AHEAD = 4
_COUNTS = (
    "prompt_tokens",
    "image_tokens",
    "kept_image_tokens",
    "generated_tokens",
    "cached_tokens",
    "kept_tokens",
)


class DynamicLlava(BaseModel):
    """``--model dynllava``.

    Parameters
    ----------
    batch_size : int or "auto"
        Rows answered at once; 1 asks one at a time, as the kit does, "auto" takes as many as fit.
    max_new_tokens : int
        Unless the dataset limits an answer itself.
    prompts : str
        ``llava``: LLaVA-1.5's own wording where the kit's differs; ``kit``: the kit's throughout.
    record : RunRecord, optional
        Where answers are noted for the run's manifest.
    load : callable, optional
        (settings, batch size) -> `Engine`.
    model_args
        Fields of `ModelSettings`.
    """

    INTERLEAVE = True

    def __init__(
        self,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        prompts: str = "llava",
        record: RunRecord | None = None,
        load: Callable[[ModelSettings, int | str], Engine] = Engine.load,
        **model_args: Any,
    ) -> None:
        super().__init__()
        settings = ModelSettings.from_dict(model_args)
        self.record = RunRecord() if record is None else record
        self.engine = load(settings, batch_size)
        self.max_new_tokens, self.prompts = max_new_tokens, prompts
        self.record.note_model(settings, self.engine.model)
        self._journal = Journal.from_environment()
        self._ahead = _LookAhead(None, 1, self._prompt)

    def set_dump_image(self, dump_image_func: Callable[..., Any]) -> None:
        """Note which dataset is asked next: the kit calls this before its first question, with its method."""
        super().set_dump_image(dump_image_func)
        dataset = getattr(dump_image_func, "__self__", None)
        self._ahead = _LookAhead(dataset, _BATCHES_AHEAD * self.engine.batch_size, self._prompt)
        self._journal.expect(self._ahead.rows)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` words the dataset's questions, not the dataset itself."""
        return self.prompts == "llava" and has_own_wording(dataset)

    def build_prompt(self, line: Any, dataset: str | None = None) -> Message:
        """Return the row's images and its question in LLaVA-1.5's wording."""
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": llava_question(str(dataset), line)}]

    def _prompt(self, dataset: Any, line: Any) -> Message:
        """What the kit will ask for a row."""
        if not getattr(dataset, "force_use_dataset_prompt", False):
            name = getattr(dataset, "dataset_name", None)
            if self.use_custom_prompt(name):
                return self.build_prompt(line, name)
        return [dict(item) for item in dataset.build_prompt(line)]

    def generate_inner(self, message: Message, dataset: str | None = None) -> dict[str, Any]:
        """Return the answer and, as `extra_records`, its token counts and, with references, their score.

        Of a conversation the prediction is the list of its answers, as JSON.

        Raises
        ------
        UserError
            For an empty question, a bad image, or images that don't match the text's markers.
        """
        name = dataset or "dataset"
        ready = self._ahead.take(message)
        if ready is None:
            messages = self._ahead.following(message)
            for item, record in zip(messages, self._answer(messages, name), strict=True):
                self._ahead.put(item, record)
            ready = self._ahead.take(message)
            assert ready is not None
        self._journal.count(1)  # a row, however many answers and scores it takes
        answers, score = ready
        whole = answers[0] if len(answers) == 1 else joined(answers)
        self.record.note_answers(name, [whole])
        records = {key: getattr(whole, key) for key in _COUNTS}
        if score is not None:
            self.record.note_scores(name, [score])
            records |= {"nll": -score.logprob, "reference_tokens": score.tokens, "ppl": score.perplexity}
        self.record.note_time(self.engine)
        texts = [answer.text for answer in answers]
        conversation = TURNS in _text_item(message)
        return Prediction(prediction=json.dumps(texts) if conversation else texts[0], extra_records=records)

    def _answer(self, messages: list[Message], dataset: str) -> list[tuple[list[Answer], Score | None]]:
        """Of each message the answers of its rounds (one, unless it is a conversation), and its score."""
        asked, style = [_Asked.of(message, dataset) for message in messages], self.engine.style
        limit = max(_text_item(message).get(TOKEN_LIMIT, self.max_new_tokens) for message in messages)
        generation = Generation.from_task({"max_new_tokens": limit})
        answers: list[list[Answer]] = [[] for _ in asked]
        for place in range(max(len(item.questions) for item in asked)):
            rows = [row for row, item in enumerate(asked) if place < len(item.questions)]
            requests = [asked[row].request(style, [answer.text for answer in answers[row]]) for row in rows]
            for row, answer in zip(rows, self._generate(requests, generation), strict=True):
                answers[row].append(answer)
        rows = [row for row, item in enumerate(asked) if item.references]
        scores: list[Score | None] = [None] * len(asked)
        found = self._score([asked[row].scored(style) for row in rows])
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
        return list(zip(answers, scores, strict=True))

    def _generate(self, requests: list[Request], generation: Generation) -> list[Answer]:
        def ask(places: list[int], note: Any) -> list[Answer]:
            return self.engine.generate([requests[place] for place in places], generation, note)

        return self._journal.completed([_entry(request, generation.kwargs) for request in requests], ask)

    def _score(self, requests: list[Request]) -> list[Score]:
        def ask(places: list[int], note: Any) -> list[Score]:
            return self.engine.score([requests[place] for place in places], note)

        return self._journal.completed([_entry(request, "score") for request in requests], ask)


class Prediction(dict[str, Any]):
    """An answer with its counts, as text the answer alone: the kit writes the text where it asks a video dataset's questions."""

    def __str__(self) -> str:
        return str(self["prediction"])


@dataclass(frozen=True)
class _Asked:
    """What a message asks: a question, or a conversation's questions one after the other.

    Attributes
    ----------
    questions, references : tuple of str
        References may be missing.
    name : str
        Dataset and sample, for error messages.
    """

    questions: tuple[str, ...]
    references: tuple[str, ...]
    images: tuple[str, ...]
    name: str

    @classmethod
    def of(cls, message: Message, dataset: str) -> _Asked:
        """Return what a message asks; an image becomes LLaVA's marker and a line break where it stands in the message."""
        images = tuple(item["value"] for item in message if item["type"] == "image")
        name = f"{dataset} ({os.path.basename(images[0])})" if images else dataset
        other = [item["type"] for item in message if item["type"] not in ("image", "text")]
        if other:
            raise UserError(f"{name}: the model reads images and text, not {other[0]}")
        item = _text_item(message)
        if TURNS in item:
            questions, references = zip(*item[TURNS], strict=True)
            return cls(tuple(questions), tuple(references), images, name)
        text = "".join(part["value"] for part in message if part["type"] == "text")
        if IMAGE_TOKEN not in text:
            text = "".join(
                f"{IMAGE_TOKEN}\n" if part["type"] == "image" else part["value"] for part in message
            )
        reference = item.get(REFERENCE)
        return cls((text.strip(),), (reference,) if reference else (), images, name)

    def request(self, style: PromptStyle, answers: list[str]) -> Request:
        """Return the next round behind `answers`, in the model's `style`."""
        turns = [*zip(self.questions, answers, strict=False), (self.questions[len(answers)], None)]
        return style.request(turns, self.images, self.name)

    def scored(self, style: PromptStyle) -> Request:
        """Return the whole conversation with its references, each of them scored."""
        turns = [*zip(self.questions[:-1], self.references[:-1], strict=True), (self.questions[-1], None)]
        return style.request(turns, self.images, self.name, self.references[-1])


class _LookAhead:
    """Answers computed before the kit asked for them.

    Parameters
    ----------
    dataset : vlmeval dataset or None
        Whose rows come next; without one nothing is looked up.
    size : int
        Rows asked about at once.
    prompt : callable
        (dataset, row) -> the message that the kit will ask.
    """

    def __init__(self, dataset: Any, size: int, prompt: Callable[[Any, Any], Message]) -> None:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rows = (
            range(int(os.environ.get("RANK", 0)), len(dataset.data), world)
            if dataset is not None
            else range(0)
        )
        self.rows = len(rows)
        self._rows: Iterator[int] = iter(rows)
        self._dataset, self._size, self._ask = dataset, size, prompt
        self._ready: dict[str, list[Any]] = {}  # two rows may ask the same

    def take(self, message: Message) -> Any:
        """Return the answer to `message`, or None where it isn't computed yet."""
        key = _key(message)
        answers = self._ready.get(key)
        if not answers:
            return None
        if len(answers) == 1:
            del self._ready[key]
        return answers.pop(0)

    def put(self, message: Message, answer: Any) -> None:
        """Keep an answer until the kit asks."""
        self._ready.setdefault(_key(message), []).append(answer)

    def following(self, message: Message) -> list[Message]:
        """Return `message` and the rows after it, a few batches in all, so that they can be sorted by length."""
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
        return self._ask(self._dataset, self._dataset.data.iloc[row])


def _key(message: Message) -> str:
    return json.dumps(message, sort_keys=True, default=str)


def _text_item(message: Message) -> dict[str, Any]:
    return next((item for item in message if item["type"] == "text"), {})


def _entry(request: Request, how: Any) -> str:
    # With the images' whole paths: those of two folders may have one name, and be asked the same.
    asked = (request.images, request.prompt, request.continuation, request.output_spans)
    return entry_key("vlmevalkit", request.name, *asked, how)
