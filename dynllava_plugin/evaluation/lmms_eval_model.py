"""Dynamic-LLaVA as an lmms-eval model: translates its requests for the engine and decides nothing."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.answers import Answer
from dynllava_plugin.evaluation.engine import DEFAULT_BATCH_SIZE, Engine
from dynllava_plugin.evaluation.prompting import conversation_prompt
from dynllava_plugin.evaluation.records import RECORD
from dynllava_plugin.evaluation.requests import Generation, Request
from dynllava_plugin.evaluation.settings import ModelSettings


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
        A number as typed (text); ``auto``, or lmms-eval's own default (the number 1), is 8.
    max_batch_size : int, optional
        Upper bound of `batch_size`.
    model_args
        Fields of `ModelSettings`; anything else is an error that names it.
    """

    is_simple = True

    def __init__(
        self, batch_size: int | str | None = 1, max_batch_size: int | str | None = None, **model_args: Any
    ) -> None:
        super().__init__()
        settings = ModelSettings.from_dict(model_args)
        size = _batch_size(batch_size)
        if max_batch_size is not None:
            size = min(size, int(max_batch_size))
        if settings.device is None and torch.cuda.is_available():
            settings = replace(settings, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        RECORD.clear()
        self.engine = Engine.load(settings, size)
        RECORD.note_model(settings, self.engine.model)
        self.batch_size = size

    @property
    def device(self) -> torch.device:
        """Where the model runs; lmms-eval gathers counts there when several processes evaluate."""
        return self._device

    @property
    def engine(self) -> Engine:
        """The loaded model."""
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
        """Answers to single questions; tasks may be mixed."""
        items = []
        for request in requests:
            context, arguments, doc_to_visual, doc_id, task, split = request.args
            name = f"{task} {split} {doc_id}"
            visuals = self._visuals(doc_to_visual, doc_id, task, split, name)
            prompt = conversation_prompt([(context, None)], len(visuals), name)
            items.append((Request(prompt, visuals, name), arguments, task))
        answers = self._generate(items)
        return [_result(answer) for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[LossAndGreedy]:
        """``(mean loss, is_greedy)`` of each continuation; of choices, the smallest loss wins."""
        items = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            name = f"{task} {split} {doc_id}"
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc_id])
            visuals = self._visuals(doc_to_visual, doc_id, task, split, name)
            prompt = conversation_prompt([(context, None)], len(visuals), name)
            # vicuna_v1 puts one space between "ASSISTANT:" and the answer.
            items.append(Request(prompt, visuals, name, continuation=f" {str(continuation).strip()}"))
        with self._progress(len(items), "scoring") as bar:
            scores = self.engine.score(items, on_batch=bar.update)
        return [LossAndGreedy(score.loss, score.is_greedy) for score in scores]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers of every round, one list a request; a round's question may depend on earlier answers."""
        rounds = [_Rounds(self, request) for request in requests]
        while open_rounds := [item for item in rounds if not item.finished]:
            answers = self._generate([(item.request(), item.arguments, item.task) for item in open_rounds])
            for item, answer in zip(open_rounds, answers, strict=True):
                item.advance(answer.text)
        return [item.answers for item in rounds]

    def _generate(self, items: Sequence[tuple[Request, dict[str, Any], str]]) -> list[Answer]:
        """Answers in order; requests with the same generation arguments share batches across tasks."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, (_, arguments, _) in enumerate(items):
            groups[repr(sorted(arguments.items(), key=str))].append(index)
        answers: list[Answer | None] = [None] * len(items)
        with self._progress(len(items), "answering") as bar:
            for indices in groups.values():
                generation = Generation.from_task(items[indices[0]][1])
                started = time.perf_counter()
                results = self.engine.generate(
                    [items[i][0] for i in indices], generation, on_batch=bar.update
                )
                _log_throughput(results, time.perf_counter() - started)
                for index, answer in zip(indices, results, strict=True):
                    answers[index] = answer
                    RECORD.note_answers(items[index][2], [answer])
        return [answer for answer in answers if answer is not None]

    def _progress(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=f"dynllava {what}", disable=self.rank != 0)

    def _visuals(
        self, doc_to_visual: Callable[[Any], Any] | None, doc_id: int, task: str, split: str, name: str
    ) -> tuple[str | Image.Image, ...]:
        """The sample's images; `doc_to_visual` may give none, one, or a list, as PIL images or paths."""
        if doc_to_visual is None:
            return ()
        try:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        except UserError:
            raise
        except (OSError, SyntaxError) as error:
            raise UserError(f"{name}: its image can't be read ({error}); repair the dataset") from None
        visuals = [] if visuals is None else visuals if isinstance(visuals, (list, tuple)) else [visuals]
        for visual in visuals:
            if not isinstance(visual, (str, Image.Image)):
                raise UserError(f"{name}: LLaVA-1.5 reads images only, not {type(visual).__name__}")
        return tuple(visuals)


class _Rounds:
    """The state of one multi-round request.

    lmms-eval's protocol: the task writes every round's whole prompt, which may quote earlier answers, and
    names its images.
    """

    def __init__(self, lm: DynamicLlava, request: Instance) -> None:
        self._context, self.arguments, doc_to_visual, self._next, doc_id, self.task, split = request.args
        self._doc = lm.task_dict[self.task][split][doc_id]
        self._name = f"{self.task} {split} {doc_id}"
        self._visuals = lm._visuals(doc_to_visual, doc_id, self.task, split, self._name)
        self._info: Any = None
        self.answers: list[str] = []
        self.finished = False

    def request(self) -> Request:
        """The open round's prompt."""
        prompt = conversation_prompt([(self._context, None)], len(self._visuals), self._name)
        return Request(prompt, self._visuals, self._name)

    def advance(self, answer: str) -> None:
        """Take the round's answer and ask the task for the next round."""
        self.answers.append(answer)
        visuals, context, self.finished, answers, self._info = self._next(
            self._doc,
            previous_output=list(self.answers),
            round_idx=len(self.answers),
            previous_round_info=self._info,
        )
        if self.finished:
            self.answers = self.answers if answers is None else list(answers)
        else:
            self._context, self._visuals = context, tuple(visuals or ())


def _batch_size(value: int | str | None) -> int:
    # lmms-eval passes what the user typed as text, and 1 as a number where nothing was typed.
    if value is None or value == 1 or str(value).startswith("auto"):
        return DEFAULT_BATCH_SIZE
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
