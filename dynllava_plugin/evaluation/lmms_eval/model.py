"""Dynamic-LLaVA as an lmms-eval model: translates its requests for the engine and decides nothing."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.engine.answers import Answer, Score, joined
from dynllava_plugin.evaluation.engine.engine import DEFAULT_BATCH_SIZE, Engine
from dynllava_plugin.evaluation.engine.requests import Generation
from dynllava_plugin.evaluation.lmms_eval.questions import Item, LazyRequests, Question, Rounds, is_padding
from dynllava_plugin.evaluation.results.journal import Journal
from dynllava_plugin.evaluation.results.record import RunRecord
from dynllava_plugin.evaluation.settings import AUTO, ModelSettings


class LossAndGreedy(tuple, GenerationResult):
    """``(loss, is_greedy)`` of a loglikelihood request.

    lmms-eval 0.7.3 passes model outputs through `unwrap_generation_output`, which turns a plain tuple of
    numbers into a string; it leaves alone what a `GenerationResult` carries as its text.
    """

    def __new__(cls, loss: float, is_greedy: bool) -> LossAndGreedy:
        pair = super().__new__(cls, (loss, is_greedy))
        pair.text = (loss, is_greedy)
        pair.token_counts = None
        return pair

    def __init__(self, loss: float, is_greedy: bool) -> None:
        """Everything is set in `__new__`, as a tuple's content must be."""


class DynamicLlava(lmms):
    """``--model dynllava``.

    Parameters
    ----------
    batch_size : int or str
        A number as typed (text); lmms-eval's own default (the number 1) is 8, ``auto`` the largest that fits.
    max_batch_size : int, optional
        Upper bound of `batch_size`.
    model_args
        Fields of `ModelSettings`; anything else is an error that names it.

    Attributes
    ----------
    load : callable
        (settings, batch size) -> `Engine`; a class of its own may have one that is loaded already.
    new_journal : callable
        () -> `Journal`, where answers are written down as they come.
    record : RunRecord
        What was answered, for the run's manifest.
    """

    is_simple = True
    load = staticmethod(Engine.load)
    new_journal = staticmethod(Journal.from_environment)

    def __init__(
        self, batch_size: int | str | None = 1, max_batch_size: int | str | None = None, **model_args: Any
    ) -> None:
        super().__init__()
        settings = ModelSettings.from_dict(model_args)
        size = _batch_size(batch_size)
        if settings.device is None and torch.cuda.is_available():
            settings = replace(settings, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        self.record = RunRecord()
        self.engine = self.load(settings, size)
        if max_batch_size is not None:
            self.engine.batch_size = min(self.engine.batch_size, _batch_size(str(max_batch_size)))
        self.record.note_model(settings, self.engine.model)
        self.batch_size = self.engine.batch_size
        self._journal = self.new_journal()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()  # lmms-eval waits for the other processes through it

    @property
    def device(self) -> torch.device:
        """Return where the model runs; lmms-eval gathers counts there when several processes evaluate."""
        return self._device

    @property
    def engine(self) -> Engine:
        """Return the loaded model."""
        if self._engine is None:
            raise RuntimeError("the model was released after the last request")
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._device: torch.device = engine.model.device

    def clean(self) -> None:
        """Release the model before scoring (lmms-eval may start a judge then)."""
        self._engine = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return answers to single questions; tasks may be mixed."""
        items = []
        for request in requests:
            context, arguments, doc_to_visual, doc_id, task, split = request.args
            question = Question(self.engine.style, self.task_dict, doc_to_visual, doc_id, task, split)
            build = partial(question.ask, [(context, None)])
            items.append(Item(build, question.name, [context], arguments, task, is_padding(request)))
        answers = self._generate(items)
        return [_result(answer) for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[LossAndGreedy]:
        """Return ``(mean loss, is_greedy)`` of each continuation; of choices, the smallest loss wins.

        A continuation may be a conversation, a list of (question, answer): its loss is the logarithm of its
        rounds' mean perplexity.
        """
        items = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            question = Question(self.engine.style, self.task_dict, doc_to_visual, doc_id, task, split)
            if callable(continuation):
                continuation = continuation(question.document)
            if isinstance(continuation, str):
                continuation = [(context, continuation)]
            turns = [(str(asked), str(answer)) for asked, answer in continuation]
            build = partial(question.ask, [*turns[:-1], (turns[-1][0], None)], turns[-1][1])
            items.append(Item(build, question.name, turns, {}, task, is_padding(request)))
        scores = self._score(items)
        return [LossAndGreedy(math.log(score.perplexity), score.is_greedy) for score in scores]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Return answers of every round, one list a request; a round's question may depend on earlier answers."""
        rounds = [Rounds(self.engine.style, self.task_dict, request) for request in requests]
        while open_rounds := [item for item in rounds if not item.finished]:
            answers = self._generate([item.question() for item in open_rounds], noted=False)
            for item, answer in zip(open_rounds, answers, strict=True):
                item.advance(answer)
        for item, request in zip(rounds, requests, strict=True):
            if not is_padding(request):
                self.record.note_answers(item.task, [joined(item.given)])
        return [item.answers for item in rounds]

    def _generate(self, items: Sequence[Item], noted: bool = True) -> list[Answer]:
        """Answers in order; requests with the same generation arguments share batches across tasks."""

        def ask(chosen: list[Item], note: Callable[..., None]) -> list[Answer]:
            groups: dict[str, list[int]] = defaultdict(list)
            for place, item in enumerate(chosen):
                groups[repr(sorted(item.arguments.items(), key=str))].append(place)
            answers: dict[int, Answer] = {}
            for places in groups.values():
                started = time.perf_counter()
                found = self.engine.generate(
                    LazyRequests([chosen[place] for place in places]),
                    Generation.from_task(chosen[places[0]].arguments),
                    lambda numbers, results, places=places: note([places[n] for n in numbers], results),
                )
                _log_throughput(found, time.perf_counter() - started)
                answers.update(zip(places, found, strict=True))
            return [answers[place] for place in range(len(chosen))]

        return self._completed(items, ask, "answering", self.record.note_answers if noted else None)

    def _score(self, items: Sequence[Item]) -> list[Score]:
        def ask(chosen: list[Item], note: Callable[..., None]) -> list[Score]:
            return self.engine.score(LazyRequests(chosen), note)

        return self._completed(items, ask, "scoring", self.record.note_scores)

    def _completed(
        self,
        items: Sequence[Item],
        ask: Callable[..., list[Any]],
        what: str,
        record: Callable[..., None] | None,
    ) -> list[Any]:
        """Results in order, those that are in the journal not asked for again; `record` is told of each."""
        self._journal.expect(len(items))
        found = self._journal.completed(
            [item.key for item in items],
            lambda places, note: ask([items[place] for place in places], note),
            f"dynllava {what}",
            self._journal.count,
        )
        for item, result in zip(items, found, strict=True):
            if record and not item.padding:
                record(item.task, [result])
        self.record.note_time(self.engine)
        return found


def _batch_size(value: int | str | None) -> Any:
    # lmms-eval passes what the user typed as text, and 1 as a number where nothing was typed.
    if value is None or value == 1:
        return DEFAULT_BATCH_SIZE
    if value == AUTO:
        return AUTO
    text = str(value)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"batch_size: {value!r} is neither a positive integer nor 'auto'")
    return int(text)


def _result(answer: Answer) -> GenerationResult:
    return GenerationResult(
        answer.text, TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.generated_tokens)
    )


def _log_throughput(answers: Sequence[Answer], seconds: float) -> None:
    tokens = sum(answer.generated_tokens for answer in answers)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={"total_requests": len(answers)},
    )
