"""The paper's figures, and ours beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS, find_benchmark
from dynllava_plugin.evaluation.lmms_eval import command as lmms_eval_command
from dynllava_plugin.evaluation.own_sets import easy_vqa
from dynllava_plugin.evaluation.results.command import benchmarks_text
from dynllava_plugin.evaluation.results.footer import footer
from dynllava_plugin.evaluation.results.paper import (
    METHODS,
    compare,
    paper_results,
    paper_value,
    render_comparison,
)
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import by_benchmark, render
from dynllava_plugin.evaluation.vlmevalkit import command as vlmevalkit_command

CSV = (
    Path(__file__).resolve().parents[1]
    / "dynllava_plugin"
    / "evaluation"
    / "results"
    / "data"
    / "paper_results.csv"
)


def write_run(folder: Path, mode: str, scores: dict[str, dict[str, Any]], **manifest: Any) -> None:
    """lmms-eval's results of one run with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = {task: {"effective": 8} for task in scores}
    (folder / "20260101_000000_results.json").write_text(
        json.dumps({"results": scores, "n-samples": samples})
    )
    run = {
        "settings": {"checkpoint": "org/Dynamic-LLaVA-7B"},
        "sparsity": {"mode": mode, "vision_keep_rate": 0.2, "text_keep_rate": 0.5},
        "versions": {"torch": "2.14"},
        "checkpoint_hash": "abc123",
        "seconds": 7,
        **manifest,
    }
    (folder / "20260101_000000_dynllava_run.json").write_text(json.dumps(run))


def write_kit(folder: Path, mode: str, datasets: dict[str, dict[str, Any]], **manifest: Any) -> None:
    """VLMEvalKit's status of one run with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"model_name": "dynllava", "datasets": datasets}))
    run = {
        "settings": {"checkpoint": "org/Dynamic-LLaVA-7B"},
        "sparsity": {"mode": mode, "vision_keep_rate": 0.2, "text_keep_rate": 0.5},
        "tokens": {dataset: {"n": 8} for dataset in datasets},
        "checkpoint_hash": "abc123",
        **manifest,
    }
    (folder / "dynllava_run.json").write_text(json.dumps(run))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    scores = {
        "gqa": {"exact_match,none": 0.6, "exact_match_stderr,none": 0.01},
        "mmvet": {"gpt_eval_score,none": 0.0},
        "vqav2_test": {"submission,none": None},
        "lvis_vqa_single_ppl": {"ppl,none": 5.0, "kv_mib,none": 60.0},
        "lvis_vqa_single_answer": {"meteor,none": 0.3},
    }
    write_run(tmp_path / "lmms", "image_text", scores)
    kit = {
        "GQA_TestDev_Balanced": {"metrics": {"split=none|Overall": 61.0}},
        "MMVet": {"skip_reason": "evaluate_returned_none"},
        "RealWorldQA": {"metrics": {"Overall": 0.5}},
    }
    write_kit(tmp_path / "kit", "image_text", kit)
    return tmp_path


def row(frame: pd.DataFrame, **wanted: Any) -> pd.Series:
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_every_paper_figure_of_the_three_tables_is_reached_by_the_registry() -> None:
    """Read from the file once more, without the code under test."""
    with CSV.open(encoding="utf-8") as file:
        rows = [item for item in csv.DictReader(file) if item["table"] in ("1/11", "3", "12")]
    assert len(rows) == len(paper_results()[paper_results()["table"].isin(["1/11", "3", "12"])]) > 150
    registry = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for item in rows:
        benchmark = registry[item["benchmark"]]
        (metric,) = [metric for metric in benchmark.metrics if metric.paper == item["metric"]]
        assert paper_value(benchmark, metric, item["method"], item["llm"]) == pytest.approx(
            float(item["value"]) * metric.paper_factor
        )
    assert {item["method"] for item in rows} > set(METHODS.values())


def test_judges_and_servers_are_never_faked(results: Path) -> None:
    table = read_results(results)
    for harness in ("lmms-eval", "vlmevalkit"):
        judged = row(table, benchmark="MM-Vet", harness=harness)
        assert judged["status"] == "needs judge" and pd.isna(judged["value"]) and judged["n"] == 8
    assert row(table, benchmark="VQAv2-test")["status"] == "submission file"
    assert row(table, benchmark="GQA", harness="lmms-eval")["stderr"] == pytest.approx(1.0)
    text = render(table, "markdown")
    assert "| MM-Vet | score [%] | needs judge | needs judge | 8 | 8 |" in text
    assert "| RealWorldQA | accuracy [%] | - | 50.00 | - | 8 |" in text  # missing, which is something else
    assert by_benchmark(table).loc[("GQA", "accuracy [%]"), "image_text vlmevalkit"] == "61.00"


@pytest.mark.parametrize(("unanswered", "status"), [(0, "scored"), (1, "judge failed: 1 of 8")])
def test_a_judge_counts_where_it_answered_everything(tmp_path: Path, unanswered: int, status: str) -> None:
    judge = {"model": "gpt", "unanswered": {"mmvet": unanswered}}
    write_run(tmp_path, "image", {"mmvet": {"gpt_eval_score,none": 31.0}}, judge=judge)
    found = row(read_results(tmp_path), benchmark="MM-Vet")
    assert found["status"] == status and (found["value"] == 31.0) == (status == "scored")


def test_comparison(results: Path) -> None:
    comparison = compare(read_results(results))
    gqa = row(comparison, benchmark="GQA")
    assert gqa["lmms-eval"] == 60 and gqa["vlmevalkit"] == 61 and gqa["vlmevalkit - lmms-eval"] == 1
    assert gqa["paper"] == 61.3 and gqa["paper_method"] == "Dynamic-LLaVA_I|T 7B"
    assert gqa["lmms-eval - paper"] == pytest.approx(-1.3)
    assert row(compare(read_results(results), "13B"), benchmark="GQA")["paper"] == 62.5
    meteor = row(comparison, metric="meteor")
    assert meteor["lmms-eval"] == 30 and meteor["paper"] == pytest.approx(31.08)
    judged = row(comparison, benchmark="MM-Vet")
    assert judged["lmms-eval"] == "needs judge" and pd.isna(judged["lmms-eval - paper"])
    assert "VQAv2-test" not in set(comparison["benchmark"])

    text = render_comparison(comparison, "markdown")
    assert "### Table 1 (understanding): org/Dynamic-LLaVA-7B, mode image_text" in text
    assert "| GQA | accuracy [%] | 60.00 | 61.00 | +1.00 | 61.3 | -1.3 | -0.3 | 8 | 8 |" in text
    assert "| RealWorldQA | accuracy [%] | - | 50.00 | - | 57.0 | - | -7.0 | - | 8 |" in text
    assert "| LVIS-VQA single | kv_mib_ppl_run | 60.00 | - | - | 63 | -3 | - | 8 | - |" in text
    assert "* MM-Vet" not in text and "Table 3 (generation)" in text and "Table 12" in text
    latex = render_comparison(comparison, "latex")
    assert latex.count(r"\begin{tabular}") == 3 and "GQA & accuracy [\\%] & 60.00" in latex
    assert len(render_comparison(comparison, "csv").splitlines()) == len(comparison) + 1


def test_modes_that_the_paper_does_not_have(tmp_path: Path) -> None:
    write_run(tmp_path, "image", {"gqa": {"exact_match,none": 0.5}})
    manifest = tmp_path / "20260101_000000_dynllava_run.json"
    run = json.loads(manifest.read_text())
    run["sparsity"]["vision_keep_rate"] = 0.1
    manifest.write_text(json.dumps(run))
    comparison = compare(read_results(tmp_path))
    assert pd.isna(comparison["paper"][0]) and comparison["paper_method"][0] is None
    assert "which the paper doesn't have" in render_comparison(comparison, "markdown")


def test_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(results), "--compare-paper"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("### Table 1") and "Checkpoint: org/Dynamic-LLaVA-7B (abc123)" in out
    assert "Versions: torch 2.14" in out and "Time: answering 7 s in 2 runs  \n" in out
    write_run(tmp_path / "other", "full", {"easy_vqa": {"exact_match,none": 1.0}})
    assert main(["table", str(tmp_path / "other"), "--compare-paper"]) == 2
    assert "none of the results is of a benchmark in the paper's tables" in capsys.readouterr().err


def test_the_footer_says_what_the_suites_processes_took(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name / "output" / "tiny", "image", {"gqa": {"exact_match,none": 0.5}})
        (tmp_path / name / "run.json").write_text(json.dumps({"state": "done", "seconds": 91.5}))
    assert "Time: answering 14 s in 2 runs, whole processes 183 s  \n" in footer([tmp_path])
    assert "whole processes 183 s" in footer([tmp_path / name / "output" for name in ("a", "b")])
    (tmp_path / "b" / "run.json").write_text(json.dumps({"state": "running"}))
    assert "Time: answering 14 s in 2 runs  \n" in footer([tmp_path])


@pytest.mark.parametrize(
    ("name", "found"),
    [("gqa", "GQA"), ("MMBench_DEV_EN", "MMBench"), ("lvis_vqa_multi_ppl", "LVIS-VQA multi")],
)
def test_benchmarks_are_found_by_any_of_their_names(name: str, found: str) -> None:
    assert find_benchmark(name).name == found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mm-vett", "did you mean MM-Vet"),
        ("CV-Bench", "CVBench-2D"),
        ("xyzzy", "`dynllava benchmarks` lists"),
    ],
)
def test_an_unknown_benchmark_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such benchmark; .*{hint}"):
        find_benchmark(name)


ROOT = Path(__file__).resolve().parents[1]


def test_docs_name_the_folders_that_the_harnesses_write_to() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert (
        f"`{lmms_eval_command.DEFAULT_OUTPUT}` and `{vlmevalkit_command.DEFAULT_OUTPUT}/<settings>`" in text
    )


def test_docs_have_the_registry() -> None:
    """The guide's table is the registry's, row by row: name, split, lmms-eval's tasks, VLMEvalKit's dataset, needs."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    chapter = text.partition("\n## Every benchmark, in each harness\n")[2].partition("\n## ")[0]
    rows = [line for line in chapter.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]
    wanted = [
        [
            item.name,
            item.split,
            f"`{','.join(item.tasks('lmms-eval'))}`" if item.tasks("lmms-eval") else "-",
            f"`{' '.join(item.tasks('vlmevalkit'))}`" if item.tasks("vlmevalkit") else "-",
            item.needs,
        ]
        for item in BENCHMARKS
    ]
    assert found == wanted


def test_what_a_benchmark_needs() -> None:
    needs = {item.name: item.needs for item in BENCHMARKS}
    assert {name for name, text in needs.items() if text == "`demo` extra"} == set(easy_vqa.BENCHMARKS)
    assert {name for name, text in needs.items() if text == "a judge"} == {"MM-Vet", "LLaVA-Wild"}
    assert {name for name, text in needs.items() if text == "`build-lvis`"} == {
        "LVIS-VQA single",
        "LVIS-VQA multi",
        "ShareGPT4V-VQA",
    }
    assert all((text == "its server") == name.endswith("-test") for name, text in needs.items())
    assert needs["GQA"] == "" and "| `EasyVQA` | accuracy | `demo` extra |" in benchmarks_text()
