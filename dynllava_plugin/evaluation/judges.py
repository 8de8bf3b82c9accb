"""The judge model that some benchmarks need: what is configured, whether it answers, where it was missing.

A judge is any OpenAI-compatible endpoint: ``OPENAI_API_KEY``, with ``OPENAI_API_URL`` (ending in ``/v1``) and
``MODEL_VERSION`` for another than OpenAI's. Without one the benchmarks keep their predictions and have no score.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS

KEY, URL, MODEL = "OPENAI_API_KEY", "OPENAI_API_URL", "MODEL_VERSION"
DEFAULT_URL, DEFAULT_MODEL = "https://api.openai.com/v1", "gpt-4o-2024-11-20"
_WAIT = 20  # seconds for the first answer


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
    if not wanted or not os.environ.get(KEY):
        return None
    url = checked_url(os.environ.get(URL, DEFAULT_URL)).removesuffix("/chat/completions").rstrip("/")
    judge = Judge(os.environ.get(MODEL, DEFAULT_MODEL), url)
    problem = _problem(judge)
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
