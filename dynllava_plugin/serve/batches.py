"""Requests that wait and have the same settings, answered together on the server's one inference thread."""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.cli.serving.utils import set_torch_seed

from dynllava_plugin.errors import UserError, one_line
from dynllava_plugin.evaluation.engine.encoding import joined_images, padded_on_the_left

LOG = logging.getLogger("uvicorn.error")


class Fault(NamedTuple):
    """Why there is no answer: an HTTP status and one line."""

    status: int
    reason: str


class Answer:
    """A request that waits for its answer, or the answer as it grows.

    Parameters
    ----------
    inputs : dict
        The model's arguments, `input_ids` int64 [1, L].
    config : GenerationConfig
    policy : str, optional
        Of this request; default: the model's.
    seed : int, optional
        Set right before it is answered, alone.
    feed : callable
        Takes each token (int); returns whether the answer has reached a stop text.
    end : callable
        Called once, with a fault or None.
    """

    def __init__(
        self,
        inputs: Any,
        config: GenerationConfig,
        policy: str | None,
        seed: int | None,
        feed: Callable[[int], bool],
        end: Callable[[Fault | None], None],
    ) -> None:
        self.inputs, self.config, self.policy, self.seed = inputs, config, policy, seed
        self.ids: list[int] = inputs["input_ids"][0].tolist()
        self.tokens: list[int] = []
        self.left, self.ended = threading.Event(), False
        self.reason: Fault | None = None  # why it is left; None: by its client
        self.cut = False  # by its length, and not by its own end
        self._feed, self._end = feed, end

    def goes_with(self, other: Answer) -> bool:
        """Return whether both can be answered by one call, each as it would be alone."""
        if self.policy != other.policy or self._settings() != other._settings():
            return False
        if any(answer.seed is not None and answer.config.do_sample for answer in (self, other)):
            return False
        # That looks at the order of all tokens, padding before a prompt included.
        return not self.config.no_repeat_ngram_size or len(self.ids) == len(other.ids)

    def _settings(self) -> dict[str, Any]:
        return {**self.config.to_dict(), "max_new_tokens": None, "stop_strings": None}

    def take(self, token: int, ends: Sequence[int]) -> None:
        """Add a token, unless the answer has ended; `ends` are those that end it."""
        if self.ended:
            return
        if self.left.is_set():
            self.end(self.reason)
            return
        self.tokens.append(token)
        stopped = self._feed(token) or token in ends
        self.cut = not stopped and len(self.tokens) == self.config.max_new_tokens
        if stopped or self.cut:
            self.end()

    def end(self, fault: Fault | None = None) -> None:
        """Say that nothing more comes."""
        if not self.ended:
            self.ended = True
            self._end(fault)


class Batches:
    """The inference thread: CUDA graphs belong to the thread that captured them, and answers take turns on it.

    Parameters
    ----------
    model : SparseVLM
    most : int
        Requests that are answered together.
    """

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most = model, most
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, answer: Answer) -> None:
        """Let `answer` wait for its turn."""
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()

    def leave_all(self) -> None:
        """Let every answer end with its next token: the server ends."""
        with self._changed:
            for answer in (*self._waiting, *self._running):
                answer.reason = Fault(503, "the server ends")
                answer.left.set()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = self._next()
            self._answer(self._running)
            self._running = []

    def _next(self) -> list[Answer]:
        """Take the first that waits, and those behind it that go with it; the others keep their places."""
        first = self._waiting.popleft()
        taken = [first, *(answer for answer in self._waiting if answer.goes_with(first))][: self.most]
        self._waiting = deque(answer for answer in self._waiting if answer not in taken)
        return taken

    def _answer(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if answer.left.is_set():
                answer.end(answer.reason)
        answers = [answer for answer in answers if not answer.ended]
        if not answers:
            return
        try:
            self._generate(answers)
            return
        except Exception as error:
            fault = Fault(400 if isinstance(error, UserError) else 500, one_line(error))
            last = len(answers) == 1 or any(answer.tokens for answer in answers)
            if last and fault.status == 500:
                LOG.exception("%d requests failed", len(answers))
        if last:
            for answer in answers:
                answer.end(fault)
            return
        # It may be one request's own fault, or the memory's: outside of the handler, which holds what filled that.
        half = len(answers) // 2
        self._answer(answers[:half])
        self._answer(answers[half:])

    def _generate(self, answers: Sequence[Answer]) -> None:
        first, model = answers[0], self.model
        config = copy.deepcopy(first.config)
        config.max_new_tokens = max(answer.config.max_new_tokens for answer in answers)
        config.stop_strings = None  # each answer looks for its own
        ends = model.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
        image_token = model.config.image_token_id
        inputs = padded_on_the_left([answer.ids for answer in answers], image_token, model.device)
        inputs |= joined_images(model.image_inputs, [answer.inputs for answer in answers], model.device)
        if first.seed is not None:
            set_torch_seed(first.seed)
        model.generate(
            **inputs, generation_config=config, policy=first.policy,
            stopping_criteria=[_EachAnswer(answers, [ends] if isinstance(ends, int) else ends or [])],
        )  # fmt: skip
        for answer in answers:
            answer.end()


class _EachAnswer(StoppingCriteria):
    """Hands each row's newest token to its answer; a row stops where its answer has ended."""

    def __init__(self, answers: Sequence[Answer], ends: Sequence[int]) -> None:
        self.answers, self.ends = answers, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return bool [B], which rows have ended, behind `input_ids` int64 [B, L]."""
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            answer.take(token, self.ends)
        return torch.tensor([answer.ended for answer in self.answers], device=input_ids.device)
