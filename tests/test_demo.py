"""The demo's orchestration: what runs, what is left out in a rerun, how a failure is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynllava_plugin.demo import chart
from dynllava_plugin.demo.__main__ import main, parse_arguments
from dynllava_plugin.demo.parts import PartFailed, make
from dynllava_plugin.demo.runs import DESCRIBED, LONG, SETTINGS, SHORT, evaluate, plan
from dynllava_plugin.demo.summary import summary
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
from dynllava_plugin.evaluation.results.manifest import mode_name
from tests.test_suite import fake


def test_every_setting_runs_in_both_harnesses(tmp_path: Path) -> None:
    runs = plan(tmp_path, "tiny", 7, 16, 2)
    names = {(run.harness, run.mode, run.benchmark.name) for run in runs}
    assert names == {
        (harness, setting, name)
        for harness in (LMMS_EVAL, VLMEVALKIT)
        for setting in SETTINGS
        for name in ([*SHORT, LONG] if setting in DESCRIBED else SHORT)
    }
    assert len({run.folder for run in runs}) == len(runs) and len({run.root for run in runs}) == len(SETTINGS)
    assert all(run.command[run.command.index("--limit") + 1] == "7" for run in runs)
    assert not any("--limit" in run.command for run in plan(tmp_path, "tiny", None, 16, 2))


def test_settings_are_called_as_the_table_calls_them() -> None:
    for name, changes in SETTINGS.items():
        assert mode_name({"mode": "image_text", "vision_keep_rate": 0.2, **changes}) == name


def test_failures_are_named_after_all_have_run_and_only_they_run_again(tmp_path: Path) -> None:
    note = "p = journal.parents[4] / 'calls'; p.write_text((p.read_text() if p.exists() else '') + journal.parent.name + ' ')"
    fails = f"{note}; import sys; print('error: no such image'); sys.exit(3)"
    bad, good = fake(tmp_path, "bad", fails), fake(tmp_path, "good", note)
    for _ in range(2):
        with pytest.raises(
            PartFailed,
            match=r"^easy_vqa in lmms-eval, mode bad: ended with 3 \(no such image; see .*log\.txt\)$",
        ):
            evaluate([bad, good], 1)
    assert (tmp_path / "calls").read_text().split() == ["bad", "good", "bad"]


def test_a_part_is_made_again_only_from_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(code: str, made_from: dict[str, int]) -> str:
        make(
            tmp_path,
            "data: a file",
            [sys.executable, "-c", code],
            made_from,
            {"NAME": str(tmp_path / "calls")},
        )
        return capsys.readouterr().out

    call = "import os; open(os.environ['NAME'], 'a').write('x')"
    assert made(call, {"a": 1}) == "data: a file\n" and made(call, {"a": 1}) == "data: done before\n"
    assert made(call, {"a": 2}) == "data: a file\n" and (tmp_path / "calls").read_text() == "xx"
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(PartFailed, match=r"^data ended with 3; its message is above$"):
        made("exit(3)", {"a": 2})
    made(call, {"a": 2})
    assert (tmp_path / "calls").read_text() == "xxx"


def test_bad_flags_end_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--limit", "0"])
    assert ended.value.code == 2 and "--limit 0: must be positive" in capsys.readouterr().err


def row(harness: str, mode: str, benchmark: str, metric: str, value: float) -> dict[str, object]:
    kept = 64.0 if mode == "full" else 12.0
    return {
        "checkpoint": "tiny", "harness": harness, "mode": mode, "benchmark": benchmark, "metric": metric, "value": value, "n": 10,
        "image_tokens": 64.0, "kept_image_tokens": kept, "kept_output_share": 0.504,
        "generated_tokens": 70.0 if benchmark == "easy_vqa_describe" else 2.0, "equivalent_tokens": np.nan, "prefill_gflops": np.nan,
    }  # fmt: skip


def test_the_printed_table_shows_two_figures_only_where_the_harnesses_differ() -> None:
    rows = [
        row(LMMS_EVAL, "full", "easy_vqa", "accuracy", 99.0),
        row(VLMEVALKIT, "full", "easy_vqa", "accuracy", 99.04),
        row(LMMS_EVAL, "image", "easy_vqa", "accuracy", 98.0),
        row(VLMEVALKIT, "image", "easy_vqa", "accuracy", 97.0),
        row(LMMS_EVAL, "image", "easy_vqa_describe", "ppl", 1.25),
    ]
    lines = summary(pd.DataFrame(rows)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert cells[0] == ["full", "64 of 64", "99.0", "-", "-"]
    assert cells[1] == ["image", "12 of 64", "98.0 / 97.0", "1.2500", "50.4"]
    assert "METEOR" not in lines[0] and "easy_vqa_describe 10" in lines[-1]


def test_only_the_full_table_is_written_over_the_committed_one():
    assert parse_arguments([]).output == Path("results/demo_1000")
    assert parse_arguments(["--full"]).output == Path("results/demo")
    assert parse_arguments([]).work == parse_arguments(["--full"]).work == Path("results/demo_work")


def test_the_chart_has_each_figure_once_with_the_tables_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One label where the harnesses agree, four digits of a perplexity, and what was not run says so."""
    drawn: list[Any] = []
    monkeypatch.setattr(chart, "write_figure", lambda path, figure: drawn.append(figure))
    rows = [
        row(harness, mode, benchmark, metric, value)
        for harness in (LMMS_EVAL, VLMEVALKIT)
        for mode, benchmark, metric, value in (
            ("full", "easy_vqa", "accuracy", 99.98),
            ("image", "easy_vqa", "accuracy", 98.0 if harness == LMMS_EVAL else 97.0),
            ("full", "easy_vqa_describe", "ppl", 1.0038),
        )
    ]
    chart.draw(pd.DataFrame(rows), tmp_path / "chart.png")
    accuracy, ppl = drawn[0].axes
    assert [text.get_text() for text in accuracy.texts] == ["100.0", "98.0 / 97.0"]
    assert [text.get_text() for text in ppl.texts] == ["1.0038", "not run"]
    drawn[0].draw_without_rendering()
    for axis in (accuracy, ppl):
        low, high = axis.get_xlim()
        points = [x for dots in axis.collections for x, _ in dots.get_offsets()]
        assert low < min(points) <= max(points) < high and 4 <= len(points) + (axis is ppl) * 2
        right = axis.title.get_window_extent().x1
        assert right <= drawn[0].bbox.x1
