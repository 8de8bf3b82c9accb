"""What became of a VLMEvalKit run: its files tell, its exit code doesn't."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from dynllava_plugin.evaluation.benchmarks import VLMEVALKIT
from dynllava_plugin.evaluation.results.predictions import vlmevalkit_table
from dynllava_plugin.evaluation.results.results import failed_samples, renamed
from dynllava_plugin.files import read_json, saved_json, write_json

_DRAWN = "thus randomly generate one"  # in the kit's log of an answer (`judging.draw_nothing`)
# What the kit notes where it left out an evaluation on purpose, as its user asked or its dataset is made.
_NO_SCORE_WANTED = (
    "mode_infer",
    "official_submission",
    "external_submission",
    "without_ground_truth",
    "not_supported",
)


def forget_finished(folder: Path, model: str, datasets: list[str], known: Collection[str] = ()) -> None:
    """Remove our old predictions and scores: without `--reuse` the kit promises a fresh start, yet keeps them.

    Parameters
    ----------
    folder : Path
        Work-dir / model.
    datasets : list of str
        Whose files go: predictions, matched answers, judgements and scores, half-done ones too (the answers of a
        run that was killed are in its journal), and what `status.json` says of them.
    known : collection of str
        The kit's datasets: what belongs to one whose name is longer stays.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    for dataset in datasets:
        longer = [f"{model}_{name}" for name in known if name != dataset and name.startswith(dataset)]
        others = tuple(stem + end for stem in longer for end in "._")
        for path in [*folder.glob(f"{model}_{dataset}.*"), *folder.glob(f"{model}_{dataset}_*")]:
            if path.is_file() and not path.name.startswith(others):
                path.unlink()
        for path in folder.glob(f"*_{dataset}.pkl"):
            if path.stem.removesuffix(f"_{dataset}").isdigit():  # its rank and the number of processes
                path.unlink()
    _forget_status(folder / "status.json", datasets)


def _forget_status(path: Path, datasets: list[str]) -> None:
    """The kit never takes back that a dataset is done, so an old score would outlive a run that is killed."""
    status = saved_json(path)
    if isinstance(
        status.get("datasets"), dict
    ):  # else there is none, or the kit will say what is wrong with it
        for dataset in datasets:
            status["datasets"].pop(dataset, None)
        write_json(path, status)


def check_run(
    folder: Path, model: str, datasets: list[str], started: float, unjudged: Collection[str] = ()
) -> list[str]:
    """Return what went wrong, one line a dataset; the kit's exit code doesn't tell.

    Parameters
    ----------
    folder : Path
        Work-dir / model: holds `status.json` (recent kits) and the prediction and score files.
    started : float
        Files older than this (seconds since the epoch) are an earlier run's.
    unjudged : collection of str
        Datasets that were to end with their predictions, for want of a judge or of answers to compare with.
    """
    status_file = folder / "status.json"
    if not status_file.is_file():
        # An older kit: a dataset is done where it left a prediction file and a score file.
        missing = []
        for dataset in datasets:
            files = [
                path for path in folder.rglob(f"{model}_{dataset}*") if path.stat().st_mtime >= started - 1
            ]
            if not any(path.stem != f"{model}_{dataset}" and path.suffix != ".pkl" for path in files):
                missing.append(f"{dataset}: VLMEvalKit wrote no score in {folder}")
        return missing
    status = read_json(status_file).get("datasets", {})
    failures = []
    for dataset in datasets:
        entry = status.get(dataset, {})
        if not _is_of_this_run(entry, started):
            entry = {}  # an earlier run's, or another's that wrote meanwhile
        reason = entry.get("error_message") or entry.get("skip_reason")
        if entry.get("status") != "done":
            failures.append(f"{dataset}: VLMEvalKit didn't finish it (see its log in {folder.parent})")
        elif reason and dataset not in unjudged and not any(text in reason for text in _NO_SCORE_WANTED):
            failures.append(f"{dataset}: {reason}")
        elif not reason and not entry.get("metrics"):
            failures.append(f"{dataset}: VLMEvalKit scored nothing")
        elif not reason and (problem := renamed(VLMEVALKIT, dataset, entry["metrics"])):
            failures.append(problem)
    return failures


def unmatched(folder: Path, judge: str, datasets: Iterable[str]) -> dict[str, int]:
    """Return the answers that the judge named no option for, by dataset; datasets without any are left out."""
    found = {}
    for dataset in datasets:
        for path in folder.glob(f"{glob.escape(f'{folder.name}_{dataset}_{judge}')}_result.[tx]*"):
            found[dataset] = sum(_DRAWN in text for text in vlmevalkit_table(path).get("log", ()))
    return {name: count for name, count in found.items() if count}


def _is_of_this_run(entry: dict[str, Any], started: float) -> bool:
    """Whether the kit wrote an entry of `status.json` since `started`; one without a time may be."""
    written = entry.get("updated_at")
    try:
        return written is None or datetime.fromisoformat(written).timestamp() >= started - 1
    except (TypeError, ValueError):
        return False


def judge_failures(folder: Path) -> dict[str, int]:
    """Return the answers that the judge gave no score, by dataset; datasets without any are left out."""
    from vlmeval.smp import collect_run_benchmark_report

    rows = collect_run_benchmark_report(str(folder)) or []
    # Of a dataset with an error the kit counts all answers; ours says how many.
    told = {row["benchmark"]: failed_samples(str(row.get("eval_error"))) for row in rows}
    failed = {row["benchmark"]: told[row["benchmark"]] or row.get("judge_failed") for row in rows}
    return {name: int(count) for name, count in failed.items() if count}
