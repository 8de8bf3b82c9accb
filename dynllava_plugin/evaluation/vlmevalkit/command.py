"""`run_vlmevalkit.py`: VLMEvalKit's own command line with our model and datasets and an honest exit code."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, VLMEVALKIT
from dynllava_plugin.evaluation.engine.engine import Engine
from dynllava_plugin.evaluation.judges import Judge, checked_url, find_judge, judge_tasks
from dynllava_plugin.evaluation.locks import locks
from dynllava_plugin.evaluation.patches import Patches
from dynllava_plugin.evaluation.results.identity import source_digest
from dynllava_plugin.evaluation.results.journal import VARIABLE, entry_key
from dynllava_plugin.evaluation.results.manifest import NAME
from dynllava_plugin.evaluation.results.record import RunRecord, write_joined
from dynllava_plugin.evaluation.results.results import prediction_rows
from dynllava_plugin.evaluation.settings import ModelSettings, as_folder_name
from dynllava_plugin.evaluation.vlmevalkit.arguments import KitSettings, kit_parser, own_parser, settings_of
from dynllava_plugin.evaluation.vlmevalkit.cells import keep_cells
from dynllava_plugin.evaluation.vlmevalkit.judging import (
    BOUNDS,
    draw_nothing,
    match_by_rules,
    repair_judged,
    without_judge,
)
from dynllava_plugin.evaluation.vlmevalkit.outcome import (
    check_run,
    forget_finished,
    judge_failures,
    unmatched,
)
from dynllava_plugin.evaluation.vlmevalkit.setup import (
    MODEL_NAME,
    check_datasets,
    check_models,
    import_kit,
    known_datasets,
    leave_processes,
    leave_unscored,
    register,
    share_processes,
    use_local_data,
)
from dynllava_plugin.files import check_folder, read_json

DEFAULT_OUTPUT = Path("results/vlmevalkit")
_DATASETS = {name for item in BENCHMARKS for name in item.tasks(VLMEVALKIT)}
# Their cells must come back as they were written; Excel's don't ("=1+1" becomes 0).
_OWN_DATASETS = {name for item in BENCHMARKS if not item.repo for name in item.tasks(VLMEVALKIT)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kit as typed; returns 0, 1 where a dataset failed, 2 where the user can mend the cause."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    leave_processes()
    return code


def run(arguments: Sequence[str], load: Callable[..., Any] | None = None) -> int:
    """Run the kit's command line, as often as it is called.

    Parameters
    ----------
    arguments : sequence of str
        As typed behind ``run_vlmevalkit.py``.
    load : callable, optional
        As `DynamicLlava`'s: what gives our model's engine instead of loading it.

    Returns
    -------
    int
        0, 1 where a dataset failed, 2 where the user can mend the cause.
    """
    try:
        with Patches() as patches:
            return _run(list(arguments), load, patches)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str], load: Callable[..., Any] | None, patches: Patches) -> int:
    parser = own_parser()
    own, forwarded = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        print("\nAll other options are VLMEvalKit's:\n")
    settings, asked, kit_mode = settings_of(own)
    peek, _ = kit_parser().parse_known_args(forwarded)
    if peek.data is None and peek.config is None and not {"-h", "--help"} & set(arguments):
        raise UserError("--data: name at least one dataset (`dynllava benchmarks` lists those of the paper)")
    if kit_mode:
        forwarded += ["--mode", kit_mode]
    if asked.limit:
        forwarded += ["--limit", str(asked.limit)]
    if peek.model is None and peek.config is None:
        forwarded += ["--model", MODEL_NAME]
    if peek.work_dir is None:
        # Another folder wherever another answer may be: the kit takes up old files without asking whose they are.
        peek.work_dir = DEFAULT_OUTPUT / as_folder_name([settings.slug(), *asked.labels()])
        forwarded += ["--work-dir", str(peek.work_dir)]
    work_dir = Path(os.environ.get("MMEVAL_ROOT") or peek.work_dir)
    asks_help = bool({"-h", "--help"} & set(arguments))
    check_folder("--work-dir", work_dir)
    models, datasets = _selected(peek)
    if MODEL_NAME in models and peek.config is None and not asks_help and kit_mode != "eval":
        settings.check()
    judge = _judge(peek, datasets, forwarded)

    if set(datasets) and set(datasets) <= _OWN_DATASETS:
        os.environ.setdefault("PRED_FORMAT", "tsv")
    fresh = kit_mode != "eval" and not peek.reuse and MODEL_NAME in models
    kit, record = import_kit(), RunRecord()
    keep_cells(patches, kit)
    given = {name: getattr(asked, name) for name in ("batch_size", "max_new_tokens", "prompts")}
    register(patches, settings, **given, record=record, load=load or Engine.load)
    if asked.data_root is not None:
        use_local_data(asked.data_root)
    if peek.config is None:
        check_models(models)
        check_datasets(datasets)
    unjudged = judge_tasks(VLMEVALKIT) & set(datasets) if judge is None else set()
    without_judge(patches, unjudged)
    unscored = leave_unscored(patches, datasets) if peek.config is None else set()
    unjudged |= unscored
    draw_nothing(patches)
    if judge is not None:
        repair_judged(patches, judge.url)
        if peek.judge is None:
            match_by_rules(patches, kit, _DATASETS - judge_tasks(VLMEVALKIT))
    share_processes(patches, record)
    patches.put(sys, "argv", lambda before: [before[0], *forwarded])
    kit.parse_args()  # which ends here for an option that the kit hasn't got
    # One process holds the folder for all of a distributed run.
    alone = {work_dir} if int(os.environ.get("RANK", 0)) == 0 and not asks_help else set()
    with locks(alone, "another `run_vlmevalkit.py`"):
        journal = _journal(work_dir, settings, asked) if fresh and peek.config is None else None
        if journal is not None:
            patches.callback(os.environ.pop, VARIABLE, None)
        if fresh:
            forget_finished(work_dir / MODEL_NAME, MODEL_NAME, datasets, known_datasets())
        started = time.time()
        logging.getLogger(
            "vlmeval"
        ).handlers.clear()  # else its log goes where the process's first run has it
        kit.main()
        if int(os.environ.get("RANK", 0)) != 0:
            return 0
        failures = []
        for model in models:
            failures += check_run(work_dir / model, model, datasets, started, unjudged)
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
        if len(models) == 1:
            facts: dict[str, Any] = {
                "tasks": datasets,
                "limit": asked.limit,
                "prompts": asked.prompts,
                "arguments": arguments,
            }
            facts["max_new_tokens"] = asked.max_new_tokens
            facts |= _scored(
                work_dir / models[0], None if kit_mode == "infer" else judge, datasets, peek.reuse
            )
            facts["unmatched"] = unmatched(work_dir / models[0], peek.judge or "", datasets)
            for name, count in facts["unmatched"].items():
                print(
                    f"{name}: judge {peek.judge} named no option for {count} answers; they count as wrong",
                    file=sys.stderr,
                )
            write_joined(work_dir / models[0] / NAME, record, datasets, facts)
        if journal is not None and not failures:
            shutil.rmtree(journal, ignore_errors=True)  # a finished run's answers are in its files
    for name in sorted(unscored):
        print(f"{name}: nothing to compare with; the answers are {work_dir / models[0]}/{models[0]}_{name}.*")
    print(f"results: {work_dir}")
    return 1 if failures else 0


def _scored(folder: Path, judge: Judge | None, datasets: list[str], reused: bool) -> dict[str, Any]:
    """Return which judge scored, and how many answers there are where the kit may have taken an earlier run's."""
    found: dict[str, Any] = {"judge": None}
    if judge is not None:
        found["judge"] = {"model": judge.model, "url": judge.url, "tasks": list(datasets)}
        found["judge"]["unanswered"] = judge_failures(folder)
    if reused:
        rows = {name: prediction_rows(folder, f"{folder.name}_{name}") for name in datasets}
        found["questions"] = {name: count for name, count in rows.items() if count}
    return found


def _journal(work_dir: Path, settings: ModelSettings, asked: KitSettings) -> Path | None:
    """Where a run that is killed leaves its answers for the next one of the same model, settings and code.

    The kit's own half-done files have no settings with them, nor what the answers cost. None where
    `dynllava eval` has its own place for them.
    """
    if os.environ.get(VARIABLE):
        return None
    facts = [settings.slug(), asked.prompts, asked.max_new_tokens, source_digest()]
    folder = work_dir / MODEL_NAME / f"journal-{entry_key('vlmevalkit', *facts)[:12]}"
    os.environ[VARIABLE] = str(folder)
    return folder


def _judge(peek: argparse.Namespace, datasets: list[str], forwarded: list[str]) -> Judge | None:
    """The judge that scores free answers, if one is configured and answers; the kit is told of it."""
    if peek.judge_base_url:
        os.environ["OPENAI_API_URL"] = checked_url(peek.judge_base_url)
    if peek.judge_key:
        os.environ["OPENAI_API_KEY"] = peek.judge_key
    if peek.judge and peek.judge != "exact_matching":
        os.environ["MODEL_VERSION"] = peek.judge
    judge = find_judge(VLMEVALKIT, datasets)
    if judge is None:
        if peek.judge is None:
            # Without a judge the kit asks OpenAI for half a minute, then matches answers by its rules anyway.
            forwarded += ["--judge", "exact_matching"]
        return None
    if peek.judge is None:
        forwarded += ["--judge", judge.model]
    if not peek.judge_base_url:
        forwarded += ["--judge-base-url", judge.url]
    for name, bound in BOUNDS.items():
        if getattr(peek, name) is None:
            forwarded += [f"--{name.replace('_', '-')}", bound]
    return judge


def _selected(peek: argparse.Namespace) -> tuple[list[str], list[str]]:
    if peek.config is None:
        return peek.model or [MODEL_NAME], peek.data or []
    config = read_json(Path(peek.config))
    for key in ("model", "data"):
        if not isinstance(config.get(key), dict):
            raise UserError(
                f"--config {peek.config}: expected an object {key!r} in it, as VLMEvalKit's docs say"
            )
    return list(config["model"]), list(config["data"])


if __name__ == "__main__":
    sys.exit(main())
