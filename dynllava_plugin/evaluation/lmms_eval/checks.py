"""What can be wrong or surprising in an `lmms_eval` command, told before a model is loaded."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UNREACHABLE, UserError, nearest
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, LMMS_EVAL
from dynllava_plugin.evaluation.engine.requests import GENERATION_KEYS

_GENERATION_KEYS = (*GENERATION_KEYS, "max_gen_toks", "until")


def check_model(name: str, arguments: str | None = None) -> None:
    """Raise `UserError` for a model that lmms-eval hasn't got, or for `--model_args` that it couldn't take apart."""
    from lmms_eval.models import list_available_models

    known = list_available_models(include_aliases=True)
    if name not in known:
        near = nearest(name, known, "`lmms_eval models --aliases` lists them")
        raise UserError(f"--model {name}: no such model; {near}")
    for part in (arguments or "").split(",") if "{" not in (arguments or "") else ():
        if part and "=" not in part:
            raise UserError(
                f"--model_args {part}: expected name=value,name=value (of a schedule steps=2:fastv:0.5-6:random:0.3)"
            )


def check_tasks(args: Namespace) -> None:
    """Raise `UserError` where a name of ``--tasks`` is unknown to lmms-eval's own matching (groups, tags, wildcards)."""
    from lmms_eval.tasks import TaskManager

    if Path(args.tasks).is_dir():
        return
    manager = TaskManager(args.verbosity, include_path=args.include_path, model_name=args.model)
    given = args.tasks.split(",")
    found: list[str] = manager.match_tasks(given)
    others = [name for name in given if name not in found and not Path(name).is_file()]
    nothing = not found and len(others) == len(given)
    wrong = [name for name in others if "*" not in name or nothing]  # one wildcard of several may match none
    if wrong:
        near = nearest(wrong[0], manager.all_tasks, "`lmms_eval tasks list` lists them")
        raise UserError(f"--tasks {wrong[0]}: no such task; {near}")


def checked_generation(given: str | None) -> str | None:
    """Return `--gen_kwargs` as it is meant: a temperature above 0 samples, as in the harness's own LLaVA.

    Raises
    ------
    UserError
        For an argument that our model would leave out in silence, with the nearest that it knows.
    """
    if not given:
        return given
    from lmms_eval.utils import simple_parse_args_string

    try:
        asked = simple_parse_args_string(given)
    except ValueError:
        raise UserError(f"--gen_kwargs {given}: expected name=value,name=value") from None
    for name in asked:
        if name not in _GENERATION_KEYS:
            near = nearest(name, _GENERATION_KEYS, f"known are {', '.join(_GENERATION_KEYS)}")
            raise UserError(f"--gen_kwargs {name}: no such argument of dynllava's generation; {near}")
    temperature = asked.get("temperature")
    if temperature is not None and (isinstance(temperature, (bool, str)) or temperature < 0):
        raise UserError(f"--gen_kwargs temperature={temperature}: expected a number from 0")
    return f"{given},do_sample=True" if temperature and "do_sample" not in asked else given


def check_conversation(args: Namespace) -> None:
    """Take ``--apply_chat_template`` as done: our model words every question by its checkpoint's template.

    lmms-eval 0.7.3 itself would look for functions that it hasn't got, and so it would with ``--fewshot_as_multiturn``.

    Raises
    ------
    UserError
        For the latter.
    """
    if args.fewshot_as_multiturn:
        raise UserError("--fewshot_as_multiturn: lmms-eval 0.7.3 can't make such conversations; leave it out")
    if args.apply_chat_template:
        args.apply_chat_template = False
        said = "dynllava words every question by its checkpoint's template; the option changes nothing"
        print(f"--apply_chat_template: {said}", file=sys.stderr, flush=True)


def check_examples(loaded: dict[Any, Any], num_fewshot: int | None) -> None:
    """Raise `UserError` for a task, among loaded ones, that would have to show examples and has none."""
    for name, task in loaded.items():
        if isinstance(task, dict):
            check_examples(task, num_fewshot)
            continue
        own = task.get_config("num_fewshot")
        if num_fewshot and own != 0 and not hasattr(task, "sampler"):
            raise UserError(
                f"--num_fewshot {num_fewshot}: lmms-eval's task {name} names no examples to show (`fewshot_config` in "
                "its YAML); leave it out, or the task"
            )


def tell_test_splits(tasks: str) -> None:
    """Print a line for each group of `--tasks` that asks a test split's questions too, which only a server can score."""
    for name in tasks.split(","):
        for benchmark in BENCHMARKS:
            for task in benchmark.tasks(LMMS_EVAL) if benchmark.server else []:
                group = task.removesuffix("_test")
                if name == group:
                    print(
                        f"--tasks {name}: {group}_val and {task}, whose {benchmark.questions:,} questions only a "
                        f"server scores; name {group}_val for the score alone",
                        file=sys.stderr,
                        flush=True,
                    )


def missing_data(error: BaseException) -> UserError | None:
    """Return one line for a dataset that is neither here nor can be fetched, from what lmms-eval raised; else None."""
    causes = list(_causes(error))
    if not any(
        sign in type(cause).__name__ or sign in str(cause) for cause in causes for sign in UNREACHABLE
    ):
        return None
    text = "\n".join(str(cause) for cause in causes)
    known = [benchmark.repo for benchmark in BENCHMARKS if benchmark.repo and benchmark.repo in text]
    repo = known or re.findall(r"['\"\s/]([\w.-]+/[\w.-]+)['\"]", text)
    if not repo:
        return None
    fetch = f"hf download {repo[0]} --repo-type dataset --local-dir {repo[0]}"
    return UserError(
        f"dataset {repo[0]} isn't here and can't be downloaded; run `{fetch}` where there is a network, and "
        "lmms_eval in the folder that holds it"
    )


def _causes(error: BaseException | None) -> Any:
    """An error and those behind it, also inside what a retry wraps."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        attempt = getattr(error, "last_attempt", None)  # tenacity.RetryError
        error = (attempt.exception() if attempt is not None else None) or error.__cause__ or error.__context__


def user_error(error: BaseException) -> UserError | None:
    """Return the `UserError` behind an error, or one for data that is missing; None where there is neither."""
    found = next((cause for cause in _causes(error) if isinstance(cause, UserError)), None)
    return found or missing_data(error)
