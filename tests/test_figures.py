"""The digits that tables for reading show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.evaluation.results.paper import compare, render_comparison
from dynllava_plugin.evaluation.results.results import read_results
from dynllava_plugin.evaluation.results.tables import figure_text, render, significant
from dynllava_plugin.evaluation.suite.progress import headline
from tests.test_paper import write_run

SCORES = {
    "easy_vqa_describe_ppl": {"ppl,none": 1.00038},
    "lvis_vqa_single_ppl": {"ppl,none": 4.9, "decode_tflops,none": 0.00124537},
}


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 99.97932, "99.98"),
        ("accuracy", 0.0, "0.00"),
        ("meteor", 0.0004, "0.00"),
        ("ppl", 1.00038, "1.00038"),
        ("ppl", 1.00044, "1.00044"),
        ("ppl", 1.003767, "1.0038"),
        ("ppl", 1.25, "1.2500"),
        ("ppl", 1.0, "1.0000"),
        ("ppl", 7989.134, "7989.13"),
        ("decode_tflops_kept_meteor_run", 5.0381088e-05, "0.0000504"),
        ("decode_tflops_ppl_run", 2.745, "2.75"),
        ("kv_mib_ppl_run", 0.8263, "0.826"),
        ("kv_mib_ppl_run", 0.0, "0.00"),
        ("perception", 1479.8, "1479.80"),
        ("ppl", float("nan"), "-"),
        ("ppl", float("inf"), "inf"),
    ],
)
def test_digits(metric: str, value: float, text: str) -> None:
    assert figure_text(metric, value) == text


def test_significant_digits_have_no_exponent() -> None:
    assert [significant(value, 4) for value in (10123.4, 143.79, 2500.0, 0.000031234)] == [
        "10120", "143.8", "2500", "0.00003123",
    ]  # fmt: skip


def test_every_table_shows_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path, "image", SCORES)
    table = read_results(tmp_path)
    for style in ("markdown", "latex"):
        text = render(table, style)
        assert "1.00038" in text and "0.00125" in text and "4.90" in text
    assert "1.00038," in render(table, "csv") and "0.00124537," in render(table, "csv")
    many = pd.concat([table, *(table.assign(benchmark=name) for name in ("b", "c", "d"))])
    assert "| easy_vqa_describe | ppl | 1.00038 | 8 |" in render(many, "markdown")
    run = SimpleNamespace(output=tmp_path, benchmark=find_benchmark("easy_vqa_describe"))
    assert headline(run) == "ppl 1.00038, 8 questions"  # type: ignore[arg-type]


def test_beside_the_paper_a_difference_is_no_finer_than_its_figures(tmp_path: Path) -> None:
    write_run(tmp_path, "image_text", {**SCORES, "gqa": {"exact_match,none": 0.61333}})
    text = render_comparison(compare(read_results(tmp_path)), "markdown")
    assert "| GQA | accuracy [%] | 61.33 | - | - | 61.3 | +0.0 | - | 8 | - |" in text
    assert "| LVIS-VQA single | ppl | 4.90 | - | - | 4.90 | +0.00 | - | 8 | - |" in text
