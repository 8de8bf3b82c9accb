"""The console command `lmms_eval`: lmms-eval's own command line, with our tasks and an honest exit code.

lmms-eval ends with 0 even where the evaluation raised. Its command line is run unchanged; around the function
that evaluates one configuration stand a default output folder, a check of what it returned and wrote, and the
run manifest.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation import judges, judging
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL
from dynllava_plugin.evaluation.judges import Judge, find_judge, judge_tasks, unanswered
from dynllava_plugin.evaluation.lmms_eval.checks import checked_generation, tell_test_splits, user_error
from dynllava_plugin.evaluation.lmms_eval.judging import bound_judge
from dynllava_plugin.evaluation.lmms_eval.names import check_model, watch_task_names
from dynllava_plugin.evaluation.settings import arguments_help
from dynllava_plugin.files import check_folder

DEFAULT_OUTPUT = "results/lmms-eval"
_OURS = ("dynllava", "dynamic_llava")
_LISTINGS = ("list", "list_groups", "list_tags", "list_subtasks")


def main() -> None:
    """Run lmms-eval as typed; exit with 1 where a task failed, 2 where the user can mend the cause."""
    arguments = sys.argv[1:]
    evaluates = bool(arguments) and (arguments[0].startswith("-") or arguments[0] == "eval")
    runs = _Runs()
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if arguments and not asks_for_help:
        _add_tasks()
        if evaluates:
            watch_task_names()
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
        sys.exit(2)
    sys.exit(runs.exit_code())


def _add_tasks() -> None:
    """Let every task manager look into our folder too, after those that the user names, and ask as the model wants."""
    from lmms_eval.tasks import TaskManager

    from dynllava_plugin.evaluation.lmms_eval.tasks import TASKS_FOLDER, tell_how_to_ask

    initialize, load = TaskManager.initialize_tasks, TaskManager.load_task_or_group

    def with_our_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        given = [include_path] if isinstance(include_path, str) else list(include_path or [])
        return initialize(self, include_path=[*given, str(TASKS_FOLDER)], include_defaults=include_defaults)

    def load_for(self: Any, task_list: Any = None, task_type: str = "simple") -> Any:
        loaded = load(self, task_list, task_type)
        tell_how_to_ask(loaded, messages=task_type == "chat")
        return loaded

    TaskManager.initialize_tasks = with_our_tasks  # type: ignore[method-assign]
    TaskManager.load_task_or_group = load_for  # type: ignore[method-assign,assignment]


def _without_judge(tasks: set[str]) -> None:
    """Let the tasks that only a judge can score end with their predictions, whatever else is evaluated.

    lmms-eval would ask the judge anyway and count 0 points for each answer it doesn't give.
    """
    import lmms_eval.evaluator as harness

    load: Callable[..., dict[str, Any]] = harness.get_task_dict

    def bypassed(loaded: dict[Any, Any]) -> None:
        for name, task in loaded.items():
            if isinstance(task, dict):
                bypassed(task)
            elif name in tasks:
                task.override_metric(metric_name="bypass")

    def load_bypassed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        key = os.environ.get(judges.KEY)
        os.environ[judges.KEY] = (
            key or "no-judge"
        )  # MM-Vet makes a client on import, and a client wants a key
        try:
            loaded = load(*args, **kwargs)
        finally:
            os.environ[judges.KEY] = key or ""
        bypassed(loaded)
        return loaded

    harness.get_task_dict = load_bypassed


class _Runs:
    """What became of each configuration that the command evaluated."""

    def __init__(self) -> None:
        self._failed = False
        self._user_error = False

    def exit_code(self) -> int:
        """0, or 1 for a failed run, or 2 for one that failed for what the user gave."""
        return 2 if self._user_error else int(self._failed)

    def fail(self, error: Exception | str) -> None:
        """Note a failure and say why, in one line."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._failed = True
        self._user_error |= isinstance(error, UserError)

    def watch(self) -> None:
        """Stand around lmms-eval's evaluation of one configuration."""
        import lmms_eval.__main__ as harness

        evaluate: Callable[[Namespace], tuple[Any, Any]] = harness.cli_evaluate_single

        def watched(args: Namespace) -> tuple[Any, Any]:
            if args.tasks is None:
                self.fail(UserError("--tasks: name at least one task (`lmms_eval tasks list` lists them)"))
                return None, None
            if args.tasks in _LISTINGS:
                return evaluate(args)
            try:
                check_model(args.model)
                if args.model in _OURS:
                    args.gen_kwargs = checked_generation(args.gen_kwargs)
                args.output_path = args.output_path or DEFAULT_OUTPUT
                check_folder("--output_path", Path(args.output_path))
            except UserError as error:
                self.fail(error)
                return None, None
            tell_test_splits(args.tasks)
            wanted = judge_tasks(LMMS_EVAL) & set(args.tasks.split(","))
            judge = find_judge(LMMS_EVAL, wanted)
            if wanted:
                args.log_samples = True  # what a judge has to read stays
                if judge is None:
                    _without_judge(wanted)
                else:
                    bound_judge(judge.url)
            try:
                results, samples = evaluate(args)
                from dynllava_plugin.evaluation.results.records import RECORD

                RECORD.gather()
                self._check(args, results, judge, unanswered(samples) if judge else {})
                return results, samples
            except Exception as error:
                cause = user_error(error)
                if cause is None:
                    traceback.print_exc()
                self.fail(cause or f"--tasks {args.tasks}: {type(error).__name__}: {error}")
                return None, None

        harness.cli_evaluate_single = watched

    def _check(
        self,
        args: Namespace,
        results: dict[str, Any] | None,
        judge: Judge | None,
        missing: dict[str, int],
    ) -> None:
        if int(os.environ.get("RANK", 0)) != 0:
            return  # rank 0 gathers the results
        if results is None:
            return self.fail(f"--tasks {args.tasks}: lmms-eval returned no results")
        scored = results.get("results", {})
        for task in results.get("configs", {}):
            values = [
                value for key, value in scored.get(task, {}).items() if "," in key and "_stderr" not in key
            ]
            if not values and not args.predict_only:
                self.fail(f"task {task}: no result")
        date = str(results.get("date")).replace(":", "-")
        written = next(Path(args.output_path).glob(f"**/{date}_results.json"), None)
        if written is None:
            return self.fail(f"--output_path {args.output_path}: lmms-eval wrote no results file there")
        for task, count in missing.items():
            asked = results.get("n-samples", {}).get(task, {}).get("effective")
            self.fail(f"task {task}: {judging.failure(count, asked)}; run it again")
        facts = {"model": judge.model, "url": judge.url, "unanswered": missing} if judge else None
        _write_manifest(written, args, facts)
        print(f"results: {written}")


def _write_manifest(results_file: Path, args: Namespace, judge: dict[str, Any] | None) -> None:
    """Beside the results, under the same date: `<date>_dynllava_run.json`."""
    from dynllava_plugin.evaluation.results.records import RECORD
    from dynllava_plugin.evaluation.results.results import MANIFEST_NAME
    from dynllava_plugin.files import write_json

    if RECORD.settings is None:
        return  # another model than ours was evaluated
    manifest = RECORD.to_dict(
        LMMS_EVAL,
        results=results_file.name,
        tasks=args.tasks.split(","),
        limit=args.limit,
        arguments=sys.argv[1:],
        judge=judge,
    )
    date = results_file.name.removesuffix("_results.json")
    write_json(results_file.with_name(f"{date}_{MANIFEST_NAME}"), manifest)


if __name__ == "__main__":
    main()
