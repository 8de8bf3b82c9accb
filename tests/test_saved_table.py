"""`dynllava table` on a folder that holds only a written table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dynllava_plugin.cli import main
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.results.results import COLUMNS, read_results
from dynllava_plugin.evaluation.results.tables import render
from tests.test_paper import write_kit, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """Of runs with figures, without a judge, with a policy, and of full context."""
    scores = {"gqa": {"exact_match,none": 1 / 3}, "mmvet": {"gpt_eval_score,none": 0.0}}
    write_run(tmp_path / "runs" / "a", "image_text", {**scores, "lvis_vqa_single_ppl": {"ppl,none": 1.00038}})
    write_run(tmp_path / "runs" / "b", "full", scores)
    policy = {"mode": "image_text", "policy": "fastv", "policy_args": {"k": 3}}
    write_kit(tmp_path / "runs" / "c", "", {"POPE": {"metrics": {"Overall": 80.0}}}, sparsity=policy)
    return read_results(tmp_path / "runs")


def test_a_written_table_is_read_back_as_it_was(tmp_path: Path, table: pd.DataFrame) -> None:
    saved = tmp_path / "table.csv"
    saved.write_text(render(table, "csv"))
    (tmp_path / "runs").rename(tmp_path.with_name(f"{tmp_path.name}_runs"))
    found = read_results(tmp_path)
    assert render(found, "csv") == render(table, "csv")
    for style in ("markdown", "latex"):
        assert render(found, style) == render(table, style)
    assert main(["table", str(tmp_path), "--compare-paper"]) == 0


def test_runs_go_before_a_written_table_and_a_suite_never_reads_one(
    tmp_path: Path, table: pd.DataFrame
) -> None:
    (tmp_path / "table.csv").write_text(render(table.assign(value=1.0), "csv"))
    assert set(read_results(tmp_path)["value"].dropna()) == set(table["value"].dropna())
    with pytest.raises(UserError, match="no results of lmms-eval or VLMEvalKit in it"):
        read_results(tmp_path, only=[])


def test_columns_that_are_missing_are_empty(tmp_path: Path, table: pd.DataFrame) -> None:
    few = table[["checkpoint", "mode", "harness", "benchmark", "metric", "value"]]
    (tmp_path / "old").mkdir()
    few[few["benchmark"] == "GQA"].to_csv(tmp_path / "old" / "table.csv", index=False)
    found = read_results(tmp_path / "old")
    assert (
        tuple(found.columns) == COLUMNS and set(found["unit"]) == {"%"} and set(found["status"]) == {"scored"}
    )
    assert found["n"].isna().all() and "| 33.33 | - |" in render(found, "markdown")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kind,seconds\nprefill,1\n", "no table of results (it has no column checkpoint, mode,"),
        ("", "not a readable table (No columns to parse from file)"),
        ("checkpoint,mode,harness,benchmark,metric,value\n", "no table of results (no rows)"),
        ("checkpoint,mode,harness,benchmark,metric,value\na,,lmms-eval,GQA,accuracy,1\n", "(a row without a name)"),
        ("checkpoint,mode,harness,benchmark,metric,value\na,full,lmms-eval,GQA,accuracy,x\n", "column value: could not"),
        ("a,b\n1,2,3\n1,2,3,4\n", "not a readable table (Error tokenizing data."),
    ],
)  # fmt: skip
def test_another_file_of_that_name_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    (tmp_path / "table.csv").write_text(text)
    assert main(["table", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'table.csv'}: " in error and problem in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_committed_tables_are_those_of_their_rows(name: str) -> None:
    text = (ROOT / "results" / name / "table.md").read_text(encoding="utf-8")
    assert render(read_results(ROOT / "results" / name), "markdown") in text
