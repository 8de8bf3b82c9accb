"""The judge model that some benchmarks need: what is configured, whether it answers, where it was missing.

A judge is any OpenAI-compatible endpoint: ``OPENAI_API_KEY``, with ``OPENAI_API_URL`` (ending in ``/v1``) and
``MODEL_VERSION`` for another than OpenAI's. Without one the benchmarks keep their predictions and have no score.

It is asked within bounds, three times for a sample, and not again once it has failed three samples in a row: both harnesses would
ask a judge that fails for minutes for each sample, and then count 0 points for it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS

KEY, URL, MODEL = "OPENAI_API_KEY", "OPENAI_API_URL", "MODEL_VERSION"
DEFAULT_URL, DEFAULT_MODEL = "https://api.openai.com/v1", "gpt-4o-2024-11-20"
_WAIT = 20  # seconds for the first answer
TRIES, FAILED_IN_A_ROW = 3, 3
TIMEOUT = 60  # seconds that one answer may take

T = TypeVar("T")


@dataclass(frozen=True)
class Judge:
    """An endpoint that answers.

    Attributes
    ----------
    url : str
        Without ``/chat/completions``.
    """

    model: str
    url: str


def judge_tasks(harness: str) -> set[str]:
    """Return the harness's tasks or datasets that only a judge can score."""
    return {task for benchmark in BENCHMARKS if benchmark.judge for task in benchmark.tasks(harness)}


def find_judge(harness: str, tasks: Iterable[str]) -> Judge | None:
    """Return the configured judge if one of `tasks` needs it and it answers; say in a line where it doesn't."""
    wanted = sorted(judge_tasks(harness) & set(tasks))
    if not wanted or not (os.environ.get(KEY) or os.environ.get(URL)):
        return None
    url = checked_url(os.environ.get(URL, DEFAULT_URL)).removesuffix("/chat/completions").rstrip("/")
    judge = Judge(os.environ.get(MODEL, DEFAULT_MODEL), url)
    unasked = f"{KEY} isn't set (any text does for a server that wants none)"
    problem = _problem(judge) if os.environ.get(KEY) else unasked
    if problem is None:
        return judge
    print(
        f"judge {judge.url}: {problem}; {', '.join(wanted)} keep their predictions and get no score",
        file=sys.stderr,
        flush=True,
    )
    return None


def checked_url(url: str) -> str:
    """Return a judge's address, or raise `UserError` where it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0) and " " not in url
    except ValueError:
        named = False
    if not named or parts.scheme not in ("http", "https"):
        raise UserError(f"--judge-url {url!r} ({URL}): no address of a judge; give one such as {DEFAULT_URL}")
    return url


@cache
def _problem(judge: Judge) -> str | None:
    """Why the judge can't be used; None where it answers."""
    body = {"model": judge.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{judge.url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, '')}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_WAIT) as response:
            json.loads(response.read())["choices"]
    except urllib.error.HTTPError as error:
        return f"refuses model {judge.model} ({error.code} {error.reason})"
    except (OSError, ValueError, KeyError) as error:
        return f"doesn't answer ({getattr(error, 'reason', None) or error})"
    return None


def unanswered(samples: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> dict[str, int]:
    """Return the samples of lmms-eval's judge tasks that the judge gave no score, by task; tasks without any are left out.

    lmms-eval counts such a sample as 0 points (MM-Vet) or leaves it in the mean as -1 (LLaVA-Wild).
    """
    counts = {}
    for task in judge_tasks("lmms-eval") & set(samples or {}):
        missing = 0
        for sample in (samples or {})[task]:
            score = sample.get("gpt_eval_score") or sample.get("gpt_eval_llava_all") or {}
            missing += score.get("eval_model") in ("", None, "Failed Request") or -1 in score.get(
                "scores", ()
            )
        if missing:
            counts[task] = missing
    return counts


class Patience:
    """What a judge has left of it, for all threads of a run."""

    def __init__(self, judge: str) -> None:
        self._judge = judge
        self._lock = threading.Lock()
        self._failed = 0

    @property
    def is_over(self) -> bool:
        """Whether the judge isn't to be asked again."""
        return self._failed >= FAILED_IN_A_ROW

    def ask(self, question: Callable[[int], T | None]) -> T | None:
        """Return what `question` (called with the number of the try, from 0) returns; None where the judge gave no score.

        Errors of `question` are answers without a score.
        """
        said = "nothing"
        for attempt in range(TRIES):
            if self.is_over:
                return None
            try:
                found = question(attempt)
            except Exception as error:  # each client has its own for a server that fails
                said = str(error).partition("\n")[0][:200] or type(error).__name__
                continue
            if found is not None:
                with self._lock:
                    # One that has been given up stays so, whatever other threads still hear.
                    self._failed = self._failed if self.is_over else 0
                return found
            said = "no score"
        with self._lock:
            self._failed += 1
            given_up = self._failed == FAILED_IN_A_ROW
        if given_up:
            print(
                f"judge {self._judge}: no score for {FAILED_IN_A_ROW} samples in a row ({said}); it isn't "
                "asked again, and there is no figure",
                file=sys.stderr,
                flush=True,
            )
        return None


def mm_vet_score(text: str | None) -> float | None:
    """Return MM-Vet's score from 0 to 1 that a judge's answer begins with; None for anything else."""
    words = (text or "").split()
    try:
        score = float(words[0].rstrip(".")) if words else -1.0
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def llava_scores(text: str | None) -> tuple[float, float] | None:
    """Return LLaVA-Bench's scores of the reference and of the answer, the two numbers of a judge's first line; else None."""
    line = (text or "").strip().partition("\n")[0]
    try:
        numbers = [float(word) for word in line.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        return None
    # The mean of the reference's scores divides: it isn't to be 0.
    if len(numbers) != 2 or not (0 < numbers[0] <= 10 and 0 <= numbers[1] <= 10):
        return None
    return numbers[0], numbers[1]
