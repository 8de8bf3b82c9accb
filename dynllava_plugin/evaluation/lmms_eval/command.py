"""The console command `lmms_eval`: lmms-eval's own command line, with our tasks and an honest exit code.

lmms-eval ends with 0 even where the evaluation raised. Its command line is run unchanged; around the function
that evaluates one configuration stand a default output folder, a check of what it returned and wrote, and the
run manifest. Its internals that are replaced (`Patches`) were checked on 0.7.3; `tests/test_harnesses.py` runs them.
"""

from __future__ import annotations

import dynllava_plugin.interrupts  # noqa: F401  before all that takes time

# isort: split
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL
from dynllava_plugin.evaluation.judges import Judge, find_judge, judge_tasks, unanswered
from dynllava_plugin.evaluation.lmms_eval.checks import (
    check_conversation,
    check_examples,
    check_model,
    check_tasks,
    checked_generation,
    tell_test_splits,
    user_error,
)
from dynllava_plugin.evaluation.lmms_eval.judging import any_key, prepare_judged
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.settings import arguments_help
from dynllava_plugin.files import check_folder, write_json

DEFAULT_OUTPUT = "results/lmms-eval"
_OURS = ("dynllava", "dynamic_llava")
# What lmms-eval finds in its own task files takes it three seconds, for each configuration and each check anew.
_TASKS: dict[tuple[tuple[str, ...], bool], dict[str, Any]] = {}
_LISTINGS = ("list", "list_groups", "list_tags", "list_subtasks")


def main() -> None:
    """Run lmms-eval as typed; exit with 1 where a task failed, 2 where the user can mend the cause."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], load: Callable[..., Any] | None = None) -> int:
    """Run lmms-eval's command line, as often as it is called.

    Parameters
    ----------
    arguments : sequence of str
        As typed behind ``lmms_eval``.
    load : callable, optional
        As `DynamicLlava.load`: what gives our model's engine instead of loading it.

    Returns
    -------
    int
        0, 1 where a task failed, 2 where the user can mend the cause.
    """
    evaluates = bool(arguments) and (arguments[0].startswith("-") or arguments[0] == "eval")
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    with Patches() as patches:
        patches.put(sys, "argv", lambda before: [before[0], *arguments])
        runs = _Runs(list(arguments), load, patches)
        if arguments and not asks_for_help:
            _add_tasks(patches)
            if evaluates:
                runs.watch()
        from lmms_eval.cli.dispatch import main as dispatch

        try:
            dispatch()
        except SystemExit as left:
            if asks_for_help and evaluates and not left.code:
                print(f"\n{arguments_help()}")
            raise
        except UserError as error:
            runs.fail(error)
        except ValueError as error:  # a bad --config: lmms-eval checks it outside its own try
            print(f"error: {error}", file=sys.stderr)
            return 2
        return runs.exit_code()


def _add_tasks(patches: Patches) -> None:
    """Let every task manager look into our folder too, after those that the user names, and ask as the model wants."""
    from lmms_eval.tasks import TaskManager

    from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER, tell_how_to_ask

    def searching(search: Callable[..., Any]) -> Callable[..., Any]:
        def with_our_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
            given = [include_path] if isinstance(include_path, str) else list(include_path or [])
            folders = (*given, str(TASKS_FOLDER))
            if (folders, include_defaults) not in _TASKS:
                _TASKS[folders, include_defaults] = search(self, list(folders), include_defaults)
            return deepcopy(_TASKS[folders, include_defaults])

        return with_our_tasks

    def telling(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_for(self: Any, task_list: Any = None, task_type: str = "simple") -> Any:
            loaded = load(self, task_list, task_type)
            tell_how_to_ask(loaded, messages=task_type == "chat")
            return loaded

        return load_for

    patches.put(TaskManager, "initialize_tasks", searching)
    patches.put(TaskManager, "load_task_or_group", telling)


class _Runs:
    """What became of each configuration that the command evaluated."""

    def __init__(self, arguments: list[str], load: Callable[..., Any] | None, patches: Patches) -> None:
        self._arguments, self._load, self._patches = arguments, load, patches
        self._failed = self._user_error = False
        # Of the configuration that is evaluated: our model, what a judge scores, the judge, and how many examples are shown.
        self._model: Any = None
        self._judged: set[str] = set()
        self._judge: Judge | None = None
        self._examples: int | None = None

    def exit_code(self) -> int:
        """Return 0, or 1 for a failed run, or 2 for one that failed for what the user gave."""
        return 2 if self._user_error else int(self._failed)

    def fail(self, error: Exception | str) -> None:
        """Note a failure and say why, in one line."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._failed = True
        self._user_error |= isinstance(error, UserError)

    def watch(self) -> None:
        """Stand around lmms-eval's evaluation of one configuration, and see the model that it makes."""
        import lmms_eval.__main__ as harness
        from lmms_eval import evaluator, models

        self._patches.put(models, "get_model", self._seeing)
        self._patches.put(evaluator, "get_task_dict", self._loading)
        self._patches.put(harness, "cli_evaluate_single", self._watching)

    def _seeing(self, get_model: Callable[..., Any]) -> Callable[..., Any]:
        def get(name: str, *args: Any, **kwargs: Any) -> Any:
            found = get_model(name, *args, **kwargs)
            if name not in _OURS:
                return found
            made, runs = {"load": staticmethod(self._load)} if self._load else {}, self

            def initialize(model: Any, *args: Any, **kwargs: Any) -> None:
                found.__init__(model, *args, **kwargs)
                runs._model = model

            return type(found.__name__, (found,), {"__init__": initialize, **made})

        return get

    def _watching(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def watched(args: Namespace) -> tuple[Any, Any]:
            if args.tasks in _LISTINGS:
                return evaluate(args)
            try:
                judge = self._prepare(args)
                results, samples = evaluate(args)
                if self._model is not None:
                    self._model.record.gather()
                self._check(args, results, judge, unanswered(samples) if judge else {})
                return results, samples
            except Exception as error:
                cause = user_error(error)
                if cause is None:
                    traceback.print_exc()
                self.fail(cause or f"--tasks {args.tasks}: {type(error).__name__}: {error}")
                return None, None

        return watched

    def _prepare(self, args: Namespace) -> Judge | None:
        """Check what was given, fill in our defaults, and find the judge; `UserError` for what can't be meant."""
        if not args.tasks:
            raise UserError("--tasks: name at least one task (`lmms_eval tasks list` lists them)")
        check_model(args.model, args.model_args if isinstance(args.model_args, str) else None)
        check_tasks(args)
        if args.model in _OURS:
            args.gen_kwargs = checked_generation(args.gen_kwargs)
            check_conversation(args)
        args.output_path = args.output_path or DEFAULT_OUTPUT
        check_folder("--output_path", Path(args.output_path))
        tell_test_splits(args.tasks)
        self._model = None
        wanted = judge_tasks(LMMS_EVAL) & set(args.tasks.split(","))
        args.log_samples |= bool(wanted)  # what a judge has to read stays
        self._judged, self._examples = wanted, args.num_fewshot
        self._judge = find_judge(LMMS_EVAL, wanted)
        return self._judge

    def _loading(self, load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def load_checked(*args: Any, **kwargs: Any) -> dict[str, Any]:
            with any_key():
                loaded = load(*args, **kwargs)
            check_examples(loaded, self._examples)
            prepare_judged(loaded, self._judged, self._judge)
            return loaded

        return load_checked

    def _check(
        self,
        args: Namespace,
        results: dict[str, Any] | None,
        judge: Judge | None,
        missing: dict[str, int],
    ) -> None:
        if int(os.environ.get("RANK", 0)) != 0:
            return  # rank 0 gathers the results
        from dynllava_plugin.evaluation.results.manifest import beside
        from dynllava_plugin.evaluation.results.results import failure, renamed

        if results is None:
            return self.fail(f"--tasks {args.tasks}: lmms-eval returned no results")
        scored = results.get("results", {})
        for task in () if args.predict_only else results.get("configs", {}):
            figures = scored.get(task, {})
            if not any("," in key and "_stderr" not in key for key in figures):
                self.fail(f"task {task}: no result")
            # A limit may leave none of the questions that are counted.
            elif not args.limit and (task not in self._judged or judge):
                if problem := renamed(LMMS_EVAL, task, figures):
                    self.fail(f"task {problem}")
        date = str(results.get("date")).replace(":", "-")
        written = next(Path(args.output_path).glob(f"**/{date}_results.json"), None)
        if written is None:
            return self.fail(f"--output_path {args.output_path}: lmms-eval wrote no results file there")
        for task, count in missing.items():
            asked = results.get("n-samples", {}).get(task, {}).get("effective")
            self.fail(f"task {task}: {failure(count, asked)}; run it again")
        if self._model is not None:
            facts = {"results": written.name, "tasks": args.tasks.split(","), "limit": args.limit}
            facts["judge"] = (
                {"model": judge.model, "url": judge.url, "unanswered": missing} if judge else None
            )
            manifest = self._model.record.to_dict(LMMS_EVAL, arguments=self._arguments, **facts)
            write_json(beside(written), manifest)
        print(f"results: {written}")


if __name__ == "__main__":
    main()
