"""lmms-eval's requests as questions for the engine, built only when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer
from dynllava_plugin.evaluation.engine.prompting import PromptStyle, Turn
from dynllava_plugin.evaluation.engine.requests import Request
from dynllava_plugin.evaluation.results.journal import entry_key


@dataclass(frozen=True)
class Item:
    """One thing to ask, whose request is built only when its turn comes.

    Attributes
    ----------
    build : callable
        Decodes the images.
    name : str
        Task and sample.
    text : list
        What is asked, for the journal.
    arguments : dict
        The task's generation arguments.
    padding : bool
        A copy that only keeps several processes in step.
    """

    build: Callable[[], Request]
    name: str
    text: list[Any]
    arguments: dict[str, Any]
    task: str
    padding: bool = False

    @property
    def key(self) -> str:
        """Return the question's name in the journal; a sampled answer, which isn't reused, has one that never comes again."""
        sampled = [id(self)] if self.arguments.get("do_sample") else []
        return entry_key("lmms-eval", self.name, self.text, self.arguments, *sampled)


class LazyRequests(Sequence[Request]):
    """Requests that are built when they are indexed."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index].build()


class Question:
    """One document of a task, and how it is asked.

    Parameters
    ----------
    style : PromptStyle
        The model's.
    documents : mapping
        Task -> split -> documents.
    """

    def __init__(
        self,
        style: PromptStyle,
        documents: Mapping[str, Any],
        doc_to_visual: Callable[[Any], Any] | None,
        doc_id: int,
        task: str,
        split: str,
    ) -> None:
        self._documents, self._doc_to_visual, self._doc_id = documents[task][split], doc_to_visual, doc_id
        self._style = style
        self.name = f"{task} {split} {doc_id}"

    @property
    def document(self) -> Any:
        """Return the document, images decoded."""
        return self._documents[self._doc_id]

    def ask(
        self,
        turns: Sequence[Turn],
        continuation: str = "",
        visuals: Sequence[str | Image.Image] | None = None,
    ) -> Request:
        """Return the conversation's open round, about the document's images or `visuals` in their place."""
        visuals = self.visuals() if visuals is None else visuals
        return self._style.request(turns, visuals, self.name, continuation)

    def visuals(self) -> tuple[str | Image.Image, ...]:
        """Return the document's images and videos; `doc_to_visual` may give none, one, or a list, as PIL images or paths."""
        if self._doc_to_visual is None:
            return ()
        try:
            visuals = self._doc_to_visual(self.document)
        except UserError:
            raise
        except (OSError, SyntaxError) as error:
            raise UserError(f"{self.name}: its image can't be read ({error}); repair the dataset") from None
        return checked_visuals(visuals, self.name)


def checked_visuals(visuals: Any, name: str) -> tuple[str | Image.Image, ...]:
    """Return what `doc_to_visual` gave, as a tuple; a `UserError` where it isn't images."""
    visuals = [] if visuals is None else visuals if isinstance(visuals, (list, tuple)) else [visuals]
    for visual in visuals:
        if not isinstance(visual, (str, Image.Image)):
            raise UserError(f"{name}: the model reads images and video files, not {type(visual).__name__}")
    return tuple(visuals)


class Rounds:
    """The state of one multi-round request.

    lmms-eval's protocol: the task writes every round's whole prompt, which may quote earlier answers, and
    names its images. Where the task's round information says ``{"conversation": True}``, the prompt is only
    the next question and the rounds before it are its context.
    """

    def __init__(self, style: PromptStyle, documents: Mapping[str, Any], request: Instance) -> None:
        self._context, self.arguments, doc_to_visual, self._next, doc_id, self.task, split = request.args
        self._question = Question(style, documents, doc_to_visual, doc_id, self.task, split)
        self._padding = is_padding(request)
        self._visuals: tuple[str | Image.Image, ...] | None = None
        self._info: Any = None
        self._turns: list[Turn] = []
        self.given: list[Answer] = []
        self.answers: list[str] = []
        self.finished = False

    def question(self) -> Item:
        """Return the open round."""
        turns = [*self._turns, (self._context, None)]
        build = partial(self._question.ask, turns, visuals=self._visuals)
        return Item(build, self._question.name, turns, self.arguments, self.task, self._padding)

    def advance(self, answer: Answer) -> None:
        """Take the round's answer and ask the task for the next round."""
        self.given.append(answer)
        self.answers.append(answer.text)
        asked = self._context
        visuals, context, self.finished, answers, self._info = self._next(
            self._question.document,
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self._info,
        )
        if isinstance(self._info, dict) and self._info.get("conversation"):
            self._turns.append((asked, answer.text))
        else:
            self._visuals = checked_visuals(visuals, self._question.name)
        if self.finished:
            self.answers = self.answers if answers is None else list(answers)
        else:
            self._context = context


def is_padding(request: Instance) -> bool:
    """Whether the request is a copy that only keeps several processes in step."""
    return bool((request.metadata or {}).get("__padding_only__"))
