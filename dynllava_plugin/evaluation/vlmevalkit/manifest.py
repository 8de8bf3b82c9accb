"""The manifest of a `run_vlmevalkit.py` work-dir, which one run after another may write into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import VLMEVALKIT
from dynllava_plugin.evaluation.judges import Judge
from dynllava_plugin.evaluation.results.records import RECORD
from dynllava_plugin.evaluation.results.result_files import prediction_rows, read_manifest
from dynllava_plugin.evaluation.results.results import MANIFEST_NAME
from dynllava_plugin.evaluation.vlmevalkit.outcome import judge_failures
from dynllava_plugin.files import write_json


def write_manifest(
    folder: Path, judge: Judge | None, datasets: Sequence[str], reused: bool, facts: Mapping[str, Any]
) -> None:
    """Write what ran; what an earlier run of the same settings noted of other datasets stays.

    Parameters
    ----------
    folder : Path
        Work-dir / model.
    judge : Judge or None
        The one that scored.
    datasets : sequence of str
        Of this run.
    reused : bool
        Whether the kit may have taken answers from an earlier run: these weren't counted.
    facts : mapping
        Further entries.
    """
    path = folder / MANIFEST_NAME
    earlier = _read(path)
    if RECORD.settings is None:  # no question was asked: an earlier run's answers were scored
        if earlier:
            write_json(path, {**earlier, "judge": _judged(folder, judge, datasets, earlier)})
        return
    manifest = RECORD.to_dict(VLMEVALKIT, **facts)
    manifest["judge"] = _judged(folder, judge, datasets, earlier)
    if reused:
        rows = {name: prediction_rows(folder, f"{folder.name}_{name}") for name in datasets}
        manifest["questions"] = {name: count for name, count in rows.items() if count}
    if all(
        earlier.get(key) == manifest.get(key)
        for key in ("checkpoint_hash", "sparsity", "model", "prompts", "max_new_tokens")
    ):
        for part in ("tokens", "scored", "questions"):
            others = {
                name: value for name, value in (earlier.get(part) or {}).items() if name not in datasets
            }
            manifest[part] = {**others, **manifest.get(part, {})}
    write_json(path, manifest)


def _judged(
    folder: Path, judge: Judge | None, datasets: Sequence[str], earlier: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Which judge scored which datasets; where this run had none, an earlier run's other datasets keep theirs."""
    if judge is not None:
        facts = {"model": judge.model, "url": judge.url, "tasks": list(datasets)}
        return {**facts, "unanswered": judge_failures(folder)}
    before = earlier.get("judge") or {}
    tasks = [name for name in before.get("tasks", []) if name not in datasets]
    return {**before, "tasks": tasks} if tasks else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except UserError:
        return {}  # it is written anew
