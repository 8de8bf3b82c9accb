"""Every cell of the smoke table against a second computation from what the runs saved."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, find_benchmark
from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.own_sets.text_metrics import meteor
from dynllava_plugin.evaluation.results.predictions import (
    lmms_eval_predictions,
    lmms_eval_samples,
    vlmevalkit_predictions,
    vlmevalkit_rows,
)
from dynllava_plugin.evaluation.results.results import COSTS, NEEDS_JUDGE, SCORED, SUBMISSION
from dynllava_plugin.evaluation.suite.runs import Run
from dynllava_plugin.model.checkpoints.sources import find_checkpoint
from tests.smoke.expected import EXPECTED

TOLERANCE = 1e-4  # of percent; perplexity passes through float32 losses


def check_table(table: pd.DataFrame, runs: Sequence[Run], minis: Path, limit: int | None) -> list[str]:
    """What is wrong with the table, one line each; empty where every cell is as it has to be.

    Parameters
    ----------
    table : DataFrame
        As `read_results` gives it, of one setting.
    runs : sequence of Run
        Each has to have its cells.
    minis : Path
        What `make_minis` wrote.
    limit : int or None
        Questions of each benchmark.
    """
    problems = _check_pairs(runs)
    for run in runs:
        rows = table[(table["benchmark"] == run.benchmark.name) & (table["harness"] == run.harness)]
        if rows.empty:
            problems.append(f"{run.title}: no cell")
        for row in rows.to_dict("records"):
            problem = _check_cell({str(key): value for key, value in row.items()}, run, minis, limit)
            if problem:
                problems.append(f"{run.title}, {row['metric']}: {problem}")
    return problems


# Both harnesses ask these in the same words.
_SAME_WORDS = (
    "easy_vqa",
    "easy_vqa_scenes",
    "easy_vqa_describe",
    "VQAv2",
    "GQA",
    "POPE",
    "LVIS-VQA single",
    "LVIS-VQA multi",
    "ShareGPT4V-VQA",
)


def _check_pairs(runs: Sequence[Run]) -> list[str]:
    """The same question has the same answer in both harnesses."""
    problems = []
    for name in _SAME_WORDS:
        pair = {run.harness: run for run in runs if run.benchmark.name == name}
        if len(pair) == 2:
            said = [list(_answers(run).values()) for run in pair.values()]
            if said[0] != said[1]:
                problems.append(f"{name}: the harnesses' saved answers differ")
    return problems


def _answers(run: Run) -> dict[int, str]:
    tasks = run.benchmark.tasks(run.harness)
    if run.harness == LMMS_EVAL:
        task = next((task for task in tasks if task.endswith("_answer")), tasks[0])
        return lmms_eval_predictions(run.output, task)
    found = vlmevalkit_predictions(run.output, tasks[0])
    # A conversation of one answer is a list in one harness and a text in the other.
    return {row: _unpacked(text) for row, text in found.items()}


def _unpacked(text: str) -> str:
    answers = json.loads(text) if text.startswith("[") else [text]
    return answers[0] if len(answers) == 1 else json.dumps(answers)


def _check_cell(row: dict[str, Any], run: Run, minis: Path, limit: int | None) -> str:
    if run.benchmark.judge:
        return _check_unjudged(row, run, minis)
    if run.benchmark.server:
        return _check_submission(row, run, minis)
    if row["status"] != SCORED or math.isnan(row["value"]):
        return f"no number ({row['status']})"
    wanted = expected_value(row["metric"], run, minis, limit)
    if isinstance(wanted, tuple):
        low, high = wanted
        return "" if low <= row["value"] <= high else f"{row['value']} is outside {low} to {high}"
    if not math.isclose(row["value"], wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return f"the table has {row['value']}, the predictions give {wanted}"
    return ""


def expected_value(metric: str, run: Run, minis: Path, limit: int | None) -> float | tuple[float, float]:
    """The cell, or the bounds it must lie in, from the saved predictions."""
    name = run.benchmark.name
    for cost in COSTS:
        if metric.startswith(cost):
            # The longest name that fits: decode_tflops is the beginning of decode_tflops_kept.
            stem = max((item for item in COSTS if metric.startswith(item)), key=len)
            return _cost(stem, metric.endswith("_ppl_run"), run)
    if (name, run.harness) in EXPECTED:
        return EXPECTED[name, run.harness](_predictions(run), read_truth(minis, name))
    if name in ("easy_vqa", "easy_vqa_scenes"):
        answers = [row["answer"] for row in easy_vqa.load_rows(name)[:limit]]
        said = _predictions(run)
        hits = [said[place].strip().lower() == answer for place, answer in enumerate(answers)]
        return 100 * sum(hits) / len(hits)
    return _perplexity(run) if metric == "ppl" else 100 * _meteor(run, limit)


def read_truth(minis: Path, name: str) -> list[dict[str, Any]]:
    """The questions and answers that a miniature was made from."""
    text = (minis / "truth" / f"{name.removesuffix('-OCR')}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _predictions(run: Run) -> dict[int, str]:
    task = run.benchmark.tasks(run.harness)[0]
    read = lmms_eval_predictions if run.harness == LMMS_EVAL else vlmevalkit_predictions
    return read(run.output, task)


def _task(run: Run, ending: str) -> str:
    return next(task for task in run.benchmark.tasks(run.harness) if task.endswith(ending))


def _perplexity(run: Run) -> float:
    """The mean over samples of what each was scored with."""
    if run.harness == LMMS_EVAL:
        rows = lmms_eval_samples(run.output, _task(run, "_ppl"))
        values = [math.exp(_first(row["filtered_resps"])) for row in rows]
    else:
        rows = vlmevalkit_rows(run.output, run.benchmark.tasks(run.harness)[0])
        values = [ast.literal_eval(row["extra_records"])["ppl"] for row in rows]
    journal = [_mean_perplexity(score) for score in journal_entries(run.journal, "score")]
    mean = sum(values) / len(values)
    # Once more from the log-probabilities written down with the answers.
    if not math.isclose(mean, sum(journal) / len(journal), rel_tol=TOLERANCE):
        return math.nan
    return mean


def _first(value: Any) -> float:
    while isinstance(value, list):
        value = value[0]
    return float(value)


def _mean_perplexity(score: dict[str, Any]) -> float:
    parts = score["rounds"] or [score]
    return sum(math.exp(-part["logprob"] / part["tokens"]) for part in parts) / len(parts)


def _meteor(run: Run, limit: int | None) -> float:
    from dynllava_plugin.evaluation.own_sets.long_answers import load_rows

    if run.benchmark.name == "easy_vqa_describe":
        references = [[row["answer"]] for row in easy_vqa.load_rows("easy_vqa_describe")[:limit]]
    else:
        name = _task_stem(run)
        references = [[answer for _, answer in row["turns"]] for row in load_rows(name)[:limit]]
    if run.harness == LMMS_EVAL:
        said = lmms_eval_predictions(run.output, _task(run, "_answer"))
    else:
        said = vlmevalkit_predictions(run.output, run.benchmark.tasks(run.harness)[0])
    totals = []
    for place, wanted in enumerate(references):
        text = said[place]
        answers = json.loads(text) if text.startswith("[") else [text]
        totals.append(sum(meteor(r, a) for r, a in zip(wanted, answers, strict=True)) / len(wanted))
    return sum(totals) / len(totals)


def _task_stem(run: Run) -> str:
    return find_benchmark(run.benchmark.name).tasks(LMMS_EVAL)[0].removesuffix("_ppl")


def _cost(stem: str, scored: bool, run: Run) -> float | tuple[float, float]:
    """From the token counts written down with each answer: exact bytes, bounds of FLOPs."""
    text = json.loads(
        (find_checkpoint(run.answers_from["settings"]["pretrained"]) / "config.json").read_text()
    )
    text = text["text_config"]
    heads, width = text["num_attention_heads"], text["hidden_size"]
    kv_heads = text.get("num_key_value_heads") or heads
    below = (text.get("sparsity") or {}).get("sparse_layer", 2)
    above = text["num_hidden_layers"] - below
    head = text.get("head_dim") or width // heads
    entries = list(journal_entries(run.journal, "score" if scored else "answer"))
    fed = sum(entry["tokens"] if scored else entry["cached_tokens"] for entry in entries)
    kept = sum(entry["kept_tokens"] for entry in entries)
    samples = _sample_count(run)
    if stem == "kv_mib":
        values = 2 * kv_heads * head * 4  # float32
        return (below * fed + above * kept) * values / samples / 2**20
    linear = 2 * (width * head * 2 * (heads + kv_heads) + 3 * width * text["intermediate_size"])
    words = 2 * width * text["vocab_size"]
    whole, projected = (kept, kept) if stem.endswith("kept") else (fed, fed)
    layers = below * fed + above * whole
    low = (layers * linear + projected * words) / samples / 1e12
    attention = layers * 4 * width * 4096 / samples / 1e12  # no context is longer than this
    return 0.99 * low, 1.01 * low + attention  # a token for images may have been added to the vocabulary


def _sample_count(run: Run) -> int:
    if run.harness == LMMS_EVAL:
        return len(lmms_eval_samples(run.output, _task(run, "_answer")))
    return len(vlmevalkit_rows(run.output, run.benchmark.tasks(run.harness)[0]))


def _check_unjudged(row: dict[str, Any], run: Run, minis: Path) -> str:
    if row["status"] != NEEDS_JUDGE or not math.isnan(row["value"]):
        return f"a score without a judge ({row['value']}, {row['status']})"
    said, truth = _predictions(run), read_truth(minis, run.benchmark.name)
    if len(said) != len(truth) or not all(text.strip() for text in said.values()):
        return f"{len(said)} saved predictions, some perhaps empty, of {len(truth)}"
    return ""


def _check_submission(row: dict[str, Any], run: Run, minis: Path) -> str:
    if row["status"] != SUBMISSION:
        return f"status {row['status']}"
    files = sorted(run.output.rglob("*submission*.json"))
    if not files:
        return "no submission file"
    entries = json.loads(files[-1].read_text(encoding="utf-8"))
    said, truth = _predictions(run), read_truth(minis, run.benchmark.name)
    if len(entries) != len(truth):
        return f"{len(entries)} entries of {len(truth)}"
    answers = [entry["answer"] for entry in entries]
    if [answer.lower() for answer in answers] != [said[place].lower() for place in range(len(truth))]:
        return "the file doesn't hold the predictions"
    return ""


def journal_entries(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Return the answers (or scores) that a run wrote down, each question once."""
    seen = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if kind in entry and entry["key"] not in seen:
                seen.add(entry["key"])
                yield entry[kind]
