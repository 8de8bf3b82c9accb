"""The demo's table as a person reads it: a row a mode, a column a benchmark, both harnesses in one cell."""

from __future__ import annotations

import pandas as pd

from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, VLMEVALKIT
from dynllava_plugin.evaluation.results.tables import COUNT_COLUMNS, figure_text, setting_counts

COLUMNS = {
    ("easy_vqa", "accuracy"): "easy-VQA [%]",
    ("easy_vqa_scenes", "accuracy"): "scenes [%]",
    ("easy_vqa_describe", "meteor"): "METEOR [%]",
    ("easy_vqa_describe", "meteor_exact_stem"): "METEOR without synonyms [%]",
    ("easy_vqa_describe", "ppl"): "PPL",
}

IMAGE_TOKENS, OUTPUT_TOKENS = COUNT_COLUMNS[:2]


def summary(table: pd.DataFrame) -> str:
    """Return `read_results`' rows as Markdown.

    A cell holds one figure where both harnesses give the same to the printed digit, else "lmms-eval / VLMEvalKit"; "-" where the
    mode was not run.
    """
    shown = {key: title for key, title in COLUMNS.items() if not benchmark_rows(table, key).empty}
    lines = []
    for mode in dict.fromkeys(table["mode"]):
        rows = table[table["mode"] == mode]
        stays = setting_counts(table, rows["checkpoint"].iloc[0], mode)
        cells = {"mode": mode, "image tokens": stays.get(IMAGE_TOKENS, "-")}
        for key, title in shown.items():
            cells[title] = cell(benchmark_rows(rows, key))
        cells[OUTPUT_TOKENS] = stays.get(OUTPUT_TOKENS, "-")
        lines.append(cells)
    counts = table.groupby("benchmark")["n"].max()
    note = ", ".join(f"{benchmark} {int(n)}" for benchmark, n in counts.items())
    return (
        pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
        + f"\n\nQuestions: {note}. One figure: both harnesses agree; two: lmms-eval / VLMEvalKit.\n"
    )


def benchmark_rows(table: pd.DataFrame, key: tuple[str, str]) -> pd.DataFrame:
    """Return the rows of one of `COLUMNS`."""
    return table[(table["benchmark"] == key[0]) & (table["metric"] == key[1])]


def cell(rows: pd.DataFrame) -> str:
    """Return one mode's figure: both where the harnesses differ in a printed digit, "-" where it was not run."""
    by_harness = {
        row["harness"]: figure_text(row["metric"], row["value"], 1) for row in rows.to_dict("records")
    }
    figures = [by_harness[name] for name in (LMMS_EVAL, VLMEVALKIT) if name in by_harness]
    return " / ".join(dict.fromkeys(figures)) or "-"
