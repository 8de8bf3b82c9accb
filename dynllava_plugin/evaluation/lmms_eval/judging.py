"""lmms-eval's judged tasks within bounds: a judge that fails ends in missing scores, not in minutes for each sample.

lmms-eval asks for MM-Vet's number again and again, for ever where it isn't between 0 and 1, and takes 0 in the end as
if the judge had said so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynllava_plugin.evaluation.judges import KEY, TIMEOUT, Judge, Patience, llava_scores, mm_vet_score


def prepare_judged(loaded: dict[Any, Any], tasks: set[str], judge: Judge | None) -> None:
    """Prepare those of the loaded tasks that only a judge can score.

    With a judge each score is asked for three times at most. Without one `tasks` end with their predictions, whatever
    else is evaluated: lmms-eval would ask anyway and count 0 points for each answer that it doesn't get.
    """
    for name, task in loaded.items():
        if isinstance(task, dict):
            prepare_judged(task, tasks, judge)
        elif judge is None and name in tasks:
            task.override_metric(metric_name="bypass")
        elif judge is not None and name in _REPAIRS:
            # The functions that a task's YAML names live in a module of their own for each task.
            _REPAIRS[name](task.config.process_results.__globals__, Patience(f"{judge.url} of {name}"))


@contextmanager
def any_key() -> Iterator[None]:
    """Have some key while tasks are loaded: MM-Vet makes a client on import, and a client wants one."""
    key = os.environ.get(KEY)
    os.environ[KEY] = key or "no-judge"
    try:
        yield
    finally:
        os.environ[KEY] = key or ""


def _repair_mm_vet(module: dict[str, Any], patience: Patience) -> None:
    server, model = _impatient(module["server"]), module["MODEL_VERSION"]

    def get_response(prompt: str, temperature: float = 0.0, **kwargs: Any) -> tuple[str, str]:
        """Return the judge's number and name; both empty, which the task counts as no score, where it gave none."""
        from lmms_eval.llm_judge import Request

        def question(attempt: int) -> float | None:
            config = _once(model, attempt * 0.5, 128)
            request = Request(messages=[{"role": "user", "content": prompt}], config=config)
            return mm_vet_score(server.evaluate(request).content)

        score = patience.ask(question)
        return ("", "") if score is None else (str(score), model)

    module["get_chat_response"] = get_response


def _repair_llava(module: dict[str, Any], patience: Patience) -> None:
    model, result = module["MODEL_VERSION"], module["VerifyResult"]
    made: list[Any] = []

    def verify(content: str = "", **kwargs: Any) -> Any:
        """Return the judge's scores; where it gave no two, both are -1, which `judges.unanswered` counts."""
        from lmms_eval.llm_judge import Request, get_server

        if not made:
            made.append(_impatient(get_server(module["API_TYPE"], config=_once(model, 0.0, 1024))))
        said = [""]

        def question(attempt: int) -> tuple[float, float] | None:
            request = Request(messages=[{"role": "user", "content": content}], config=_once(model, 0.0, 1024))
            said.append(made[0].evaluate(request).content)
            return llava_scores(said[-1])

        scores = patience.ask(question) or (-1.0, -1.0)
        return result(score=0.0, is_correct=False, raw_output=said[-1], metadata={"scores": list(scores)})

    module["_get_pipeline"] = lambda: verify


def _once(model: str, temperature: float, max_tokens: int) -> Any:
    from lmms_eval.llm_judge import ServerConfig

    return ServerConfig(model, temperature, max_tokens, timeout=TIMEOUT, num_retries=1, retry_delay=0)


def _impatient(server: Any) -> Any:
    """The client waits ten minutes for an answer, three times."""
    if getattr(server, "client", None) is not None:
        server.client = server.client.with_options(timeout=TIMEOUT, max_retries=0)
    return server


_REPAIRS = {"mmvet": _repair_mm_vet, "llava_in_the_wild": _repair_llava}
