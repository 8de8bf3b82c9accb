"""`dynllava table`: both harnesses' files become one table with equal units."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dynllava_plugin.cli import main
from dynllava_plugin.demo.chart import draw
from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import BENCHMARKS
from dynllava_plugin.evaluation.results.footer import footer
from dynllava_plugin.evaluation.results.manifest import mode_name
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import pivot, render


def manifest(harness: str, tokens: dict[str, Any], **sparsity: Any) -> dict[str, Any]:
    settings = {"mode": "image_text", "image_policy": "learned", "vision_keep_rate": 0.2, **sparsity}
    return {
        "harness": harness,
        "settings": {"checkpoint": "dynamic"},
        "sparsity": settings,
        "tokens": tokens,
        "seconds": 9.5,
    }


def write_lmms_eval(folder: Path, date: str, accuracy: float, questions: int = 50, **sparsity: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        "easy_vqa": {"alias": "easy_vqa", "exact_match,none": accuracy, "exact_match_stderr,none": 0.01},
        "easy_vqa_describe_answer": {"meteor_exact_stem,none": 0.5},
        "easy_vqa_describe_ppl": {"ppl,none": 1.25, "ppl_stderr,none": "N/A"},
        "pope": {"pope_f1_score,none": 0.8, "pope_accuracy,none": 0.9},
        "other_task": {"acc,none": 0.1},
    }
    count = {task: {"original": 9999, "effective": questions} for task in scores}
    content = {
        "results": scores,
        "n-samples": count,
        "config": {"model_args": "pretrained=x/dynamic,mode=image"},
    }
    (folder / f"{date}_results.json").write_text(json.dumps(content))
    counts = {"n": questions, "image_tokens": 64.0, "kept_image_tokens": 12.0, "generated_tokens": 2.0}
    long = {**counts, "generated_tokens": 70.0, "kept_tokens": 34.5, "kept_output_share": 0.5}
    run = manifest("lmms-eval", {"easy_vqa": counts, "easy_vqa_describe_answer": long}, **sparsity)
    (folder / f"{date}_dynllava_run.json").write_text(json.dumps(run))


def write_vlmevalkit(folder: Path, accuracy: float, questions: int = 50, **sparsity: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {
        "EasyVQA": {"status": "done", "metrics": {"Overall": accuracy}},
        "RealWorldQA": {"status": "done", "metrics": {"split=none|Overall": 0.54}},
        "POPE": {"status": "done", "error_message": "no judge", "metrics": {"Overall": 1.0}},
    }
    (folder / "status.json").write_text(json.dumps({"model_name": "dynllava", "datasets": datasets}))
    tokens = {"EasyVQA": {"n": questions, "image_tokens": 64.0, "kept_image_tokens": 12.0}}
    (folder / "dynllava_run.json").write_text(json.dumps(manifest("vlmevalkit", tokens, **sparsity)))
    (folder / "dynllava_RealWorldQA.tsv").write_text("index\tprediction\n1\tA\n2\t\n3\tNone\n")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_lmms_eval(tmp_path / "a" / "x__dynamic", "20260101_000000", 0.96)
    write_vlmevalkit(tmp_path / "b" / "dynllava", 96.0)
    return tmp_path


def cell(table: pd.DataFrame, **wanted: Any) -> pd.Series:
    rows = table
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_units_counts_and_settings(results: Path) -> None:
    table = read_results(results)
    for harness in ("lmms-eval", "vlmevalkit"):
        row = cell(table, harness=harness, benchmark="easy_vqa")
        assert (row["value"], row["n"], row["checkpoint"], row["mode"]) == (96.0, 50, "dynamic", "image_text")
        assert (row["image_tokens"], row["kept_image_tokens"], row["vision_keep_rate"]) == (64, 12, 0.2)
    assert cell(table, benchmark="POPE", harness="lmms-eval")["value"] == pytest.approx(80)  # F1
    failed = cell(table, benchmark="POPE", harness="vlmevalkit")
    assert failed["status"] == "no figure" and pd.isna(failed["value"])
    assert cell(table, benchmark="RealWorldQA")["value"] == pytest.approx(54)
    assert cell(table, benchmark="RealWorldQA")["n"] == 3
    assert cell(table, metric="ppl")["value"] == 1.25
    assert cell(table, metric="ppl")["kept_output_share"] == 0.5
    assert cell(table, metric="meteor_exact_stem")["value"] == 50
    assert "other_task" not in set(table["benchmark"])
    assert not Path(table["file"][0]).is_absolute()


def test_later_run_of_the_same_settings_stands(results: Path) -> None:
    write_lmms_eval(results / "a" / "x__dynamic", "20260102_000000", 0.5)
    write_lmms_eval(results / "c", "20260103_000000", 0.7, vision_keep_rate=0.1)
    table = read_results(results)
    assert cell(table, harness="lmms-eval", benchmark="easy_vqa", mode="image_text")["value"] == 50
    assert cell(table, harness="lmms-eval", benchmark="easy_vqa", mode="image_text@10%")["value"] == 70


def test_pivot_and_formats(results: Path) -> None:
    write_lmms_eval(results / "full", "20260102_000000", 0.97, mode="full")
    write_lmms_eval(results / "more", "20260102_000000", 0.99, questions=80)
    wide = pivot(read_results(results))
    assert list(wide.index) == [("dynamic", "full"), ("dynamic", "image_text")]
    assert wide.loc[("dynamic", "image_text"), "easy_vqa accuracy [%] lmms-eval"] == "99.00"
    assert wide.loc[("dynamic", "image_text"), "easy_vqa accuracy [%] vlmevalkit"] == "96.00"
    assert wide.loc[("dynamic", "image_text"), "image tokens kept"] == "12 of 64"
    assert wide.loc[("dynamic", "full"), "output tokens kept [%]"] == "50.0"
    assert wide.loc[("dynamic", "image_text"), "n easy_vqa lmms-eval"] == 80
    assert wide.loc[("dynamic", "image_text"), "n easy_vqa vlmevalkit"] == 50
    table = read_results(results)
    text = render(table, "markdown")
    assert "| 97.00 | - |" in text and len({line.count("|") for line in text.splitlines()[:4]}) == 1
    assert render(table, "latex").count(r"\\") == 3 and r"easy\_vqa" in render(table, "latex")
    assert len(render(table, "csv").splitlines()) == len(table) + 1
    with pytest.raises(UserError, match="--format: unknown value 'html'"):
        render(table, "html")


def test_a_checkpoints_name_breaks_no_table(results: Path) -> None:
    name = r"a|b<i>&\c_5%#$x^2~{y}"
    for path in results.rglob("*dynllava_run.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "settings": {"checkpoint": name}}))
    write_lmms_eval(results / "smaller", "20260102_000000", 0.5, questions=8)
    smaller = results / "smaller" / "20260102_000000_dynllava_run.json"
    smaller.write_text(smaller.read_text().replace('"dynamic"', json.dumps(name)))
    table = read_results(results)
    text = render(table, "markdown") + footer([results])
    assert "<" not in text and text.count("left out, an older or smaller run of a") == 1
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1
    assert html.unescape(rows[2][1].strip().replace(r"\|", "|")) == name
    escaped = r"a\textbar{}b\textless{}i\textgreater{}\&\textbackslash{}c\_5\%\#\$x\textasciicircum{}2\textasciitilde{}\{y\}"
    assert f"\n{escaped} & " in render(table, "latex")


def test_runs_without_a_manifest_are_read_from_their_arguments(results: Path) -> None:
    (results / "a" / "x__dynamic" / "20260101_000000_dynllava_run.json").unlink()
    row = cell(read_results(results), harness="lmms-eval", benchmark="easy_vqa")
    assert (row["checkpoint"], row["mode"]) == ("dynamic", "image") and pd.isna(row["kept_image_tokens"])


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [
        ({"mode": "full", "vision_keep_rate": 0.1}, "full"),
        ({"mode": "image"}, "image"),
        ({"mode": "image_text", "vision_keep_rate": 0.125}, "image_text@12.5%"),
        ({"mode": "image_text", "image_policy": "random"}, "random"),
        ({"mode": "image_text", "image_policy": "random", "vision_keep_rate": 0.1}, "random@10%"),
        ({"mode": "image", "image_policy": "random"}, "random_image"),
    ],
)
def test_mode_names(sparsity: dict, name: str) -> None:
    assert mode_name(sparsity) == name


def test_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "table.json"
    assert main(["table", str(results), "--json", str(target)]) == 0
    assert capsys.readouterr().out.startswith("| checkpoint | mode | easy_vqa accuracy [%] lmms-eval |")
    assert {row["benchmark"] for row in json.loads(target.read_text())} >= {"easy_vqa", "POPE"}
    assert main(["table", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["table", str(tmp_path / "empty")]) == 2
    assert "no results" in capsys.readouterr().err
    (results / "a" / "x__dynamic" / "20260101_000000_results.json").write_text("{")
    assert main(["table", str(results)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("skipped: ") and "easy_vqa accuracy [%] vlmevalkit" in printed.out
    assert not list(tmp_path.glob("out/.*"))


def test_chart_is_written_whole(results: Path, tmp_path: Path) -> None:
    target = tmp_path / "chart.png"
    draw(read_results(results), target)
    assert target.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".chart*"))


def test_registry_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmarks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(BENCHMARKS)
    assert all(line.replace("\\|", "").count("|") == 8 for line in lines)
    assert "| VQAv2 | validation | `vqav2_val` | `VQAv2_VAL` | accuracy |  | 77.9 |" in lines


def test_registry_names_each_place_once() -> None:
    places = [m.lmms_eval[:2] for b in BENCHMARKS for m in b.metrics if m.lmms_eval]
    places += [m.vlmevalkit[:2] for b in BENCHMARKS for m in b.metrics if m.vlmevalkit]
    assert len(set(places)) == len(places)
