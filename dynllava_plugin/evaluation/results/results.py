"""Both harnesses' files as one tidy table: a row is one figure."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, LMMS_EVAL, METRICS, UNITS, VLMEVALKIT
from dynllava_plugin.evaluation.results.manifest import NAME as MANIFEST_NAME
from dynllava_plugin.evaluation.results.manifest import (
    SETTINGS,
    beside,
    generation_label,
    number,
    read_manifest,
    read_object,
    run_settings,
)
from dynllava_plugin.evaluation.results.predictions import vlmevalkit_table

SAVED = "table.csv"
COUNTS = (
    "image_tokens",
    "kept_image_tokens",
    "generated_tokens",
    "kept_tokens",
    "kept_output_share",
    "equivalent_tokens",
    "prefill_gflops",
)
COSTS = ("kv_mib", "decode_tflops", "decode_tflops_kept")
KEYS = ("checkpoint", "mode", "harness", "benchmark", "metric")
COLUMNS = (*KEYS, "value", "stderr", "unit", "n", "status", *SETTINGS, *COUNTS, "seconds", "file")
NUMBERS = ("value", "stderr", "seconds", *COUNTS, "vision_keep_rate", "text_keep_rate", "random_seed")
SCORED = "scored"  # the `status` of a figure
_KIT_RUN = re.compile(r"T\d{8}[-_].*")  # the folder in which a kit notes one start
_said: set[str] = set()
_MODES = ("full", "image", "image_text", "random")
_RANKS = {
    "benchmark": {item.name: rank for rank, item in enumerate(BENCHMARKS)},
    "metric": {
        name: rank
        for rank, name in enumerate(
            dict.fromkeys(metric.name for item in BENCHMARKS for metric in item.metrics)
        )
    },
}
# What a cell without a figure says: nobody ran it is "-", these were run; or a judge failed (`failure`).
NEEDS_JUDGE, SUBMISSION, NO_FIGURE = "needs judge", "submission file", "no figure"


def read_results(folder: Path, only: Iterable[Path] | None = None) -> pd.DataFrame:
    """Return every figure under `folder`, one a row.

    Parameters
    ----------
    folder : Path
        Searched recursively for lmms-eval's ``*_results.json`` and VLMEvalKit's ``status.json``; settings and
        token counts come from the ``dynllava_run.json`` beside them. Where there are none of either, a
        ``table.csv`` directly in it, as a suite or the demo wrote it, is read instead.
    only : iterable of Path, optional
        Folders in `folder`; the others aren't looked at.

    Returns
    -------
    DataFrame
        Columns `COLUMNS`: `value` and `stderr` in the metric's unit (percent where it has one), NaN where
        `status` isn't "scored"; `n` questions; token counts as means over samples, NaN where not measured.
        Of two runs of the same checkpoint with the same settings and `n` the later one stands.

    Raises
    ------
    UserError
        For a folder that doesn't exist or holds no results. A file that isn't what a harness writes is left out,
        and a line on the error output names it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    places = [folder] if only is None else list(only)
    rows = [row for path in _files(places) for row in _rows(path)]
    saved = folder / SAVED
    if not rows and only is None and saved.is_file():
        table = read_saved(saved)
        return in_order(table).reset_index(drop=True)
    if not rows:
        raise UserError(f"{folder}: no results of lmms-eval or VLMEvalKit in it")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in NUMBERS:
        table[column] = pd.to_numeric(table[column])
    table["file"] = [os.path.relpath(file, folder) for file in table["file"]]
    table = table.drop_duplicates([*KEYS, "n", *SETTINGS], keep="last")
    return in_order(table).reset_index(drop=True)


def read_saved(path: Path) -> pd.DataFrame:
    """Return the rows as they were, columns that the file lacks empty; `UserError` for a file that is no such table."""
    needed, numbers = (*KEYS, "value"), ("n", *NUMBERS)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from None
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(f"{path}: no table of results (it has no column {', '.join(missing)})")
    unnamed = table[[name for name in needed if name not in numbers]].isna().any(axis="columns")
    if table.empty or unnamed.any():
        raise UserError(
            f"{path}: no table of results ({'a row without a name' if len(table) else 'no rows'})"
        )
    known = set(table)
    table = table.reindex(columns=list(COLUMNS)).astype(object)
    for name in numbers:
        try:
            table[name] = table[name].astype(float)
        except ValueError as error:
            raise UserError(f"{path}: column {name}: {error}") from None
    table["unit"] = table["unit"].fillna("") if "unit" in known else table["metric"].map(UNITS).fillna("")
    table["status"] = table["status"].where(table["status"].notna() | table["value"].isna(), SCORED)
    table = table.where(table.notna(), None).astype(dict.fromkeys(numbers, float))
    counted = table["n"].notna().all()
    return table.astype({"n": int}) if counted else table


def _files(places: Iterable[Path]) -> list[Path]:
    """Results of both harnesses, the oldest first."""
    files: dict[Path, float] = {}
    for place in places:
        for path in [*place.rglob("[0-9]*_results.json"), *place.rglob("status.json")]:
            if path.name == "status.json" and _KIT_RUN.fullmatch(path.parent.name):
                continue  # a kit's notes of one start of its own; the model's folder above has the results
            try:
                files[path] = path.stat().st_mtime
            except OSError as error:
                say_skipped(f"{path}: can't be read ({error.strerror})")
    return sorted(files, key=lambda path: (files[path], path.name))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The figures of one file; none, and a line that says so, where it isn't what a harness writes."""
    try:
        rows = list(_vlmevalkit_rows(path) if path.name == "status.json" else _lmms_eval_rows(path))
        for row in rows:
            _check(row)
        return rows
    except UserError as error:
        say_skipped(error)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # a list for an object, a text for a number
        say_skipped(f"{path}: not a harness's results ({type(error).__name__}: {error}); delete it")
    return []


def _check(row: dict[str, Any]) -> None:
    """`TypeError` for a row with something in it that is neither a text nor a number, or a text for a number."""
    for name, value in row.items():
        wanted = (int, float) if name in ("n", *NUMBERS) else (str, int, float)
        if value is not None and not isinstance(value, wanted):
            raise TypeError(f"{name} is {str(value)[:40]!r}")


def _lmms_eval_rows(path: Path) -> Iterator[dict[str, Any]]:
    content = read_object(path)
    manifest = read_manifest(beside(path))
    config = content.get("config", {})
    common = run_settings(manifest, config.get("model_args", ""), path, generation_label(config, manifest))
    for task, scores in content.get("results", {}).items():
        count = question_count(content.get("n-samples", {}).get(task, {}).get("effective"), path)
        yield from _task_rows(common, LMMS_EVAL, task, scores, count, manifest, path)


def _vlmevalkit_rows(path: Path) -> Iterator[dict[str, Any]]:
    content = read_object(path)
    manifest = read_manifest(path.with_name(MANIFEST_NAME))
    common = run_settings(manifest, "", path, generation_label({}, manifest))
    model = content.get("model_name", path.parent.name)
    for dataset, entry in content.get("datasets", {}).items():
        if not isinstance(entry, dict) or entry.get("status", "done") != "done":
            continue
        failed = entry.get("error_message")
        scores = {} if failed else entry.get("metrics") or {}
        rows = (manifest.get("questions") or {}).get(dataset) or _counts(manifest, dataset).get("n")
        count = question_count(rows, path) or prediction_rows(path.parent, f"{model}_{dataset}")
        if scores or count or failed:  # something was asked
            yield from _task_rows(common, VLMEVALKIT, dataset, scores, count, manifest, path)


def _task_rows(
    common: dict[str, Any],
    harness: str,
    task: str,
    scores: dict[str, Any],
    count: int | None,
    manifest: dict[str, Any],
    path: Path,
) -> list[dict[str, Any]]:
    """A row for each figure that is there; where there is none, one that says why."""
    counts, judge = _counts(manifest, task), manifest.get("judge") or {}
    failed = judge.get("unanswered", {}).get(task)
    judged = bool(judge.get("model")) and task in judge.get("tasks", [task])
    rows: list[dict[str, Any]] = []
    for benchmark, metric, key, factor in METRICS.get((harness, task), ()):
        names = {"harness": harness, "benchmark": benchmark.name, "metric": metric.name, "unit": metric.unit}
        tokens = {name: counts.get(name) for name in COUNTS}
        row = {**common, **names, "value": None, "stderr": None, "n": count, **tokens, "file": str(path)}
        value, stderr = _figure(scores, key), _figure(scores, f"{key}_stderr")
        value = _recorded(manifest, task, key) if value is None else value
        if benchmark.server:
            row["status"] = SUBMISSION
        elif benchmark.judge and (failed or not judged):
            row["status"] = failure(failed, count) if failed else NEEDS_JUDGE
        elif value is not None:
            row |= {"value": value * factor, "stderr": stderr and stderr * factor, "status": SCORED}
        else:
            row["status"] = NO_FIGURE
        rows.append(row)
    # A task reports some of its metrics (METEOR with synonyms or without); where it reports none, its first cell says so.
    found = [row for row in rows if row["status"] != NO_FIGURE]
    if all(row["metric"].startswith(COSTS) for row in found):
        found = [*rows[:1], *found]
        if problem := renamed(harness, task, scores):
            say_skipped(f"{path}: {problem}")
    return found


def _figure(scores: dict[str, Any], key: str) -> float | None:
    """The figure under lmms-eval's ``key,<filter>`` or the kit's ``<row>|key``; None where there is none, or ``N/A``."""
    values = [number(value) for name, value in scores.items() if _is_called(name, key)]
    return next((value for value in values if value is not None), None)


def _is_called(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key},") or name.endswith(f"|{key}")


def renamed(harness: str, task: str, scores: dict[str, Any]) -> str:
    """Return what is wrong, in one line, where a harness reports figures of `task` and none under a name that we know."""
    keys = [
        key
        for benchmark, _, key, _ in METRICS.get((harness, task), ())
        if not (benchmark.server or key.startswith(COSTS))
    ]
    found = [name for name, value in scores.items() if number(value) is not None and "_stderr" not in name]
    if not keys or not found or any(_is_called(name, key) for name in scores for key in keys):
        return ""
    return f"{task}: {harness} reports no {' or '.join(keys)}, but {', '.join(found[:5])}; is it another version?"


def _recorded(manifest: dict[str, Any], task: str, key: str) -> float | None:
    """What the run's own record has of a task: the output text's costs.

    In lmms-eval perplexity and answers are two tasks; in VLMEvalKit one dataset, whose keys name the run.
    """
    name, generated = key.removesuffix("_ppl_run").removesuffix("_meteor_run"), not key.endswith("_ppl_run")
    if name not in COSTS:
        return None
    parts = [manifest.get(part) or {} for part in ("tokens", "scored")]
    if name == key:
        found = [part[task][name] for part in parts if name in part.get(task, {})]
    else:
        found = [parts[0 if generated else 1].get(task, {}).get(name)]
    return number(found[0]) if found else None


def failure(count: int, of: int | None) -> str:
    """Return what a cell says instead of a figure."""
    return f"judge failed: {count} of {of if of is not None else '?'}"


def failed_samples(text: str) -> int:
    """Return the count in what `failure` says; 0 in another text."""
    found = re.match(r"judge failed: (\d+) of ", text)
    return int(found[1]) if found else 0


def _counts(manifest: dict[str, Any], task: str) -> dict[str, Any]:
    tokens = manifest.get("tokens") or {}
    # The perplexity task generates nothing: its answer task's counts go with it, or those of what it scored.
    scored = (manifest.get("scored") or {}).get(task) or {}
    return tokens.get(task) or tokens.get(task.replace("_ppl", "_answer")) or scored


def in_order(table: pd.DataFrame, first: tuple[str, ...] = ("checkpoint", "mode")) -> pd.DataFrame:
    """Return the rows sorted by the columns `first`, then by the others that name a row.

    Full context comes first and controls last; benchmarks and metrics stand as the registry lists them.
    """

    def key(column: pd.Series) -> pd.Series:
        if column.name == "mode":
            return column.map(_mode_rank)
        ranks = _RANKS.get(str(column.name))
        return column if ranks is None else column.map(lambda name: ranks.get(name, len(ranks)))

    order = list(dict.fromkeys([*first, "checkpoint", "mode", "benchmark", "metric", "harness"]))
    return table.sort_values(order, key=key)


def _mode_rank(mode: str) -> str:
    name = re.split("@|, ", mode)[0]
    rank = _MODES.index(name) if name in _MODES else len(_MODES)
    return f"{'@' in mode:d}{rank}{mode}"  # other keep rates follow, method beside control


def question_count(value: Any, path: Path) -> int | None:
    """Return how many questions a file says were asked.

    Raises
    ------
    UserError
        For something that is no count.
    """
    found = number(value)
    if value is not None and (found is None or found < 0):
        raise UserError(f"{path}: not a harness's results (the number of questions is {value!r})")
    return None if found is None else int(found)


def prediction_rows(folder: Path, stem: str) -> int | None:
    """Return the number of questions in VLMEvalKit's prediction file; None where it has none that can be read."""
    for path in (folder / f"{stem}.tsv", folder / f"{stem}.xlsx"):
        if path.is_file():
            try:
                return len(vlmevalkit_table(path))
            except (
                Exception
            ) as error:  # its readers raise what the damage made of them: zip, XML and key errors
                say_skipped(f"{path}: not a readable file of predictions ({type(error).__name__})")
    return None


def say_skipped(problem: object) -> None:
    """Print one line, once, for a file that is left out of a table."""
    line = " ".join(str(problem).split())
    if line not in _said:
        _said.add(line)
        print(f"skipped: {line}", file=sys.stderr, flush=True)
