"""The paper's figures (arXiv 2412.00876, tables 1-14) and ours beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import (
    BENCHMARKS,
    HARNESSES,
    LMMS_EVAL,
    VLMEVALKIT,
    Benchmark,
    Metric,
    find_benchmark,
)
from dynllava_plugin.evaluation.results.results import SCORED
from dynllava_plugin.evaluation.results.tables import (
    COUNT_COLUMNS,
    decimals,
    frame_text,
    largest_runs,
    setting_counts,
    settings_of,
)

# Which of the paper's rows a mode stands beside. A mode "full" of a trained checkpoint isn't LLaVA-1.5's
# weights; its row is still the one of full context.
METHODS = {"full": "LLaVA-1.5", "image": "Dynamic-LLaVA_I", "image_text": "Dynamic-LLaVA_I|T"}
LLMS = ("7B", "13B")
TITLES = {"1": "Table 1 (understanding)", "3": "Table 3 (generation)", "12": "Table 12"}
_CSV_TABLES = {"1": "1/11"}
DIFFERENCES = {
    f"{first} - {second}": (first, second)
    for first, second in ((VLMEVALKIT, LMMS_EVAL), (LMMS_EVAL, "paper"), (VLMEVALKIT, "paper"))
}
COMPARISON = (
    *("table", "checkpoint", "mode", "benchmark", "metric", "unit", LMMS_EVAL, VLMEVALKIT),
    *("vlmevalkit - lmms-eval", "paper_method", "paper", "lmms-eval - paper", "vlmevalkit - paper"),
    *("n lmms-eval", "n vlmevalkit", *COUNT_COLUMNS, "note"),
)


@cache
def paper_results() -> pd.DataFrame:
    """Return every number of the paper's tables: table, llm, method, image_tokens, prefill_tflops, benchmark, metric, value."""
    path = files("dynllava_plugin.evaluation.results") / "data" / "paper_results.csv"
    with path.open("r", encoding="utf-8") as file:
        return pd.read_csv(file)


def paper_value(benchmark: Benchmark, metric: Metric, method: str, llm: str) -> float | None:
    """Return the paper's figure in the metric's unit; None where the paper has none.

    Parameters
    ----------
    method : str
        As the paper names it, e.g. ``Dynamic-LLaVA_I|T``.
    llm : str
        ``7B`` or ``13B``.
    """
    rows = _rows_of(benchmark, metric)
    mine = rows[(rows["llm"] == llm) & (rows["method"] == method) & (rows["benchmark"] == benchmark.name)]
    known = metric.paper and len(mine)
    return float(mine["value"].iloc[0]) * metric.paper_factor if known else None


def paper_decimals(benchmark: Benchmark, metric: Metric) -> int:
    """Return how many decimals the paper's figures of a metric have, in the metric's unit."""
    values = _rows_of(benchmark, metric)["value"] * metric.paper_factor
    return max(len(f"{value:.6g}".partition(".")[2]) for value in values)


def _rows_of(benchmark: Benchmark, metric: Metric) -> pd.DataFrame:
    """The rows of a metric, of all benchmarks in the paper's table that has `benchmark`."""
    rows = paper_results()
    table = _CSV_TABLES.get(benchmark.paper_table, benchmark.paper_table)
    return rows[(rows["table"] == table) & (rows["metric"] == metric.paper)]


def compare(table: pd.DataFrame, llm: str | None = None) -> pd.DataFrame:
    """Return every figure of the paper's tables 1, 3 and 12 that was run, beside the paper's and the other harness's.

    Parameters
    ----------
    table : DataFrame
        As `read_results` gives it.
    llm : str, optional
        ``7B`` or ``13B``; from the checkpoint's name where None, else 7B.

    Returns
    -------
    DataFrame
        Columns `COMPARISON`, one row a checkpoint, mode, benchmark and metric. A harness's column holds a
        figure, a reason ("needs judge"), or None; `COUNT_COLUMNS` are the setting's.

    Raises
    ------
    UserError
        For another `llm`, or where no benchmark of those tables was run.
    """
    if llm is not None and llm not in LLMS:
        raise UserError(f"--llm: unknown value {llm!r}; choose {' or '.join(LLMS)}")
    chosen = largest_runs(table)
    registry = {item.name: item for item in BENCHMARKS if item.paper_table}
    costs = {setting: setting_counts(chosen, *setting) for setting in settings_of(chosen)}
    rows: list[dict[str, Any]] = []
    for keys, group in chosen.groupby(["checkpoint", "mode", "benchmark", "metric"], sort=False):
        checkpoint, mode, name, metric_name = (str(key) for key in keys)
        if name not in registry:
            continue
        benchmark = registry[name]
        metric = next(item for item in benchmark.metrics if item.name == metric_name)
        size = llm or ("13B" if "13b" in checkpoint.lower() else "7B")
        method = METHODS.get(group["method"].iloc[0], "")
        row: dict[str, Any] = {"table": benchmark.paper_table, "checkpoint": checkpoint, "mode": mode}
        row |= {"benchmark": name, "metric": metric_name, "unit": metric.unit, "note": benchmark.note}
        for found in group.to_dict("records"):
            scored = found["status"] == SCORED
            row[str(found["harness"])] = found["value"] if scored else str(found["status"])
            row[f"n {found['harness']}"] = found["n"]
        row["paper"] = paper_value(benchmark, metric, method, size)
        row["paper_method"] = f"{method} {size}" if method and row["paper"] is not None else None
        row |= {title: _difference(*map(row.get, names)) for title, names in DIFFERENCES.items()}
        rows.append(row | costs[checkpoint, mode])
    if not rows:
        raise UserError(
            "--compare-paper: none of the results is of a benchmark in the paper's tables 1, 3 or 12"
        )
    return pd.DataFrame(rows, columns=list(COMPARISON))


def render_comparison(comparison: pd.DataFrame, style: str) -> str:
    """Return one table for each of the paper's tables, checkpoint and mode, with the notes that belong to it."""
    if style == "csv":
        return comparison.to_csv(index=False)
    # What is no table: headings and notes of Markdown, comments of LaTeX.
    heading_mark, note_mark, gap = ("% ", "% ", "") if style == "latex" else ("### ", "* ", "\n")
    parts = []
    for table, title in TITLES.items():
        of_table = comparison[comparison["table"] == table]
        for (checkpoint, mode), rows in of_table.groupby(["checkpoint", "mode"], sort=False):
            methods = [name for name in rows["paper_method"] if isinstance(name, str)]
            beside = f", beside the paper's {methods[0]}" if methods else ", which the paper doesn't have"
            heading = f"{heading_mark}{title}: {checkpoint}, mode {mode}{beside}\n"
            counts = f"{'% ' if style == 'latex' else ''}{_counts(rows.iloc[0])}\n"
            notes = [f"{row['benchmark']}: {row['note']}." for row in rows.to_dict("records") if row["note"]]
            lines = "".join(f"{note_mark}{note}\n" for note in dict.fromkeys(notes))
            text = [heading, counts, frame_text(_cells(rows), style), *([lines] if lines else [])]
            parts.append(gap.join(text))
    return "\n".join(parts)


def _counts(row: pd.Series) -> str:
    """A line with what the setting's figures were reached with."""
    known = [f"{name} {row[name]}" for name in COUNT_COLUMNS if isinstance(row[name], str)]
    return f"Of every figure: {', '.join(known)}." if known else "Token counts were not recorded."


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    out = []
    for row in rows.to_dict("records"):
        unit = f" [{row['unit']}]" if row["unit"] else ""
        cells = {"benchmark": row["benchmark"], "metric": row["metric"] + unit}
        digits = {name: decimals(row["metric"], row[name]) for name in HARNESSES if _is_number(row[name])}
        if _is_number(row["paper"]):
            benchmark = find_benchmark(row["benchmark"])
            metric = next(item for item in benchmark.metrics if item.name == row["metric"])
            digits["paper"] = paper_decimals(benchmark, metric)
        for column in (name for name in COMPARISON if name in (*HARNESSES, "paper", *DIFFERENCES)):
            cells[column] = _text(row[column], column, digits)
        for column in ("n lmms-eval", "n vlmevalkit"):
            cells[column] = "-" if pd.isna(row[column]) else f"{row[column]:.0f}"
        out.append(cells)
    return pd.DataFrame(out)


def _text(value: Any, column: str, digits: Mapping[str, int]) -> str:
    """A difference has the decimals of the coarser of its figures."""
    if isinstance(value, str):
        return value
    if not _is_number(value):
        return "-"
    names = column.split(" - ")
    sign = "+" if len(names) == 2 else ""
    return f"{float(value):{sign}.{min(digits[name] for name in names)}f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not pd.isna(value)


def _difference(first: Any, second: Any) -> float | None:
    return float(first) - float(second) if _is_number(first) and _is_number(second) else None
