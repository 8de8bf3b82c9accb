"""The tidy table of results laid out for reading: as Markdown, LaTeX or CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from math import floor, isnan, log10
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import PERCENT, UNITS
from dynllava_plugin.evaluation.results.results import KEYS, SCORED, in_order
from dynllava_plugin.markup import LATEX, MARKDOWN

COUNT_COLUMNS = ("image tokens kept", "output tokens kept [%]", "equivalent tokens", "prefill GFLOPs")
_LONG = 20  # tokens; which of fewer stay says nothing
# Figures for reading; CSV and JSON are never rounded.
_PPL = "ppl"
_MOST = 12  # what is smaller still is rounding
# Settings that a table tells only where its runs differ in them.
_SHOWN_WHERE_DIFFERENT = {
    "random_seed": "seed {:.0f}",
    "dtype": "{}",
    "attn_implementation": "{}",
    "prompts": "{} prompts",
    "generation": "{}",
}
# More than these don't fit beside each other: one benchmark a row then.
_BENCHMARKS_ACROSS = 4


def printed(row: Mapping[Any, Any]) -> str:
    """Return the value, with the digits to read, where there is one, else why there is none."""
    return figure_text(row["metric"], row["value"]) if row["status"] == SCORED else _cell(row["status"])


def pivot(table: pd.DataFrame) -> pd.DataFrame:
    """Return a frame: rows checkpoint and mode; columns benchmark, metric and harness; then questions and kept tokens.

    Where one setting was run on different numbers of questions, the largest stands. A cell without a figure
    says why ("needs judge"); NaN where nothing was run.
    """
    chosen = largest_runs(table)
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chosen.to_dict("records"):
        cells = out.setdefault((row["checkpoint"], row["mode"]), {})
        cells[_title(row)] = printed(row)
        cells[f"n {row['benchmark']} {row['harness']}"] = row["n"]
    for setting, cells in out.items():
        cells |= setting_counts(chosen, *setting)
    # Scores first, as the registry lists them; then questions; then tokens.
    ordered = in_order(chosen, first=("benchmark", "metric", "harness"))
    columns = list(dict.fromkeys(_title(row) for row in ordered.to_dict("records")))
    pairs = zip(ordered["benchmark"], ordered["harness"], strict=True)
    columns += list(dict.fromkeys(f"n {name} {harness}" for name, harness in pairs))
    columns += [name for name in COUNT_COLUMNS if any(name in cells for cells in out.values())]
    index = pd.MultiIndex.from_tuples(list(out), names=["checkpoint", "mode"])
    return pd.DataFrame(list(out.values()), index=index, columns=columns)


def by_benchmark(table: pd.DataFrame) -> pd.DataFrame:
    """Return a frame: rows benchmark and metric; columns harness under checkpoint and mode, and each harness's number of questions."""
    chosen = in_order(largest_runs(table), first=("benchmark", "metric"))
    several = chosen["checkpoint"].nunique() > 1
    runs = in_order(chosen)[["checkpoint", "mode", "harness"]].drop_duplicates().to_dict("records")

    def heading(row: Mapping[Any, Any]) -> str:
        return (f"{row['checkpoint']} " if several else "") + f"{row['mode']} {row['harness']}"

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (benchmark, metric), group in chosen.groupby(["benchmark", "metric"], sort=False):
        records = group.to_dict("records")
        unit = f" [{records[0]['unit']}]" if records[0]["unit"] else ""
        cells = rows.setdefault((str(benchmark), f"{metric}{unit}"), {})
        cells |= {heading(row): printed(row) for row in records}
        for harness, of_harness in group.groupby("harness"):
            cells[f"n {harness}"] = span(of_harness["n"])
    index = pd.MultiIndex.from_tuples(list(rows), names=["benchmark", "metric"])
    columns = [heading(run) for run in runs] + [f"n {name}" for name in sorted(set(chosen["harness"]))]
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def by_setting(table: pd.DataFrame) -> pd.DataFrame:
    """Return a frame: rows checkpoint and mode, columns `COUNT_COLUMNS`: what every figure of a setting was reached with."""
    chosen = largest_runs(table)
    rows = [
        {"checkpoint": checkpoint, "mode": mode, **setting_counts(chosen, checkpoint, mode)}
        for checkpoint, mode in settings_of(chosen)
    ]
    found = pd.DataFrame(rows).dropna(axis="columns", how="all")
    return found.set_index(["checkpoint", "mode"])


def settings_of(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (checkpoint, mode), each once, in the table's order."""
    return list(dict.fromkeys(zip(table["checkpoint"], table["mode"], strict=True)))


def setting_counts(table: pd.DataFrame, checkpoint: str, mode: str) -> dict[str, Any]:
    """Return the means over samples with an image, as a range where benchmarks differ; long answers' share of tokens that stays."""
    rows = table[(table["checkpoint"] == checkpoint) & (table["mode"] == mode)]
    cells: dict[str, Any] = {}
    with_image = rows[rows["image_tokens"] > 0]
    if len(with_image):
        total, kept = span(with_image["image_tokens"]), span(with_image["kept_image_tokens"])
        cells[COUNT_COLUMNS[0]] = f"{kept} of {total}"
        for title, column in zip(COUNT_COLUMNS[2:], ("equivalent_tokens", "prefill_gflops"), strict=True):
            if with_image[column].notna().any():
                cells[title] = span(with_image[column], lambda value: significant(value, 4))
    long = rows[(rows["generated_tokens"] >= _LONG) & rows["kept_output_share"].notna()]
    if len(long):
        cells[COUNT_COLUMNS[1]] = span(100 * long["kept_output_share"], "{:.1f}".format)
    return cells


def span(values: pd.Series, text: Callable[[float], str] = "{:.0f}".format) -> str:
    """Return values as ``12``, or ``12 to 15`` where the values differ: unlike things aren't averaged."""
    known = values.dropna().sort_values()
    ends = [text(known.iloc[place]) for place in (0, -1)] if len(known) else ["-"]
    return " to ".join(dict.fromkeys(ends))


def render(table: pd.DataFrame, style: str) -> str:
    """Return the table as text.

    Markdown and LaTeX have one mode a row, or one benchmark a row where there are many; CSV one figure a row. A `UserError` names
    another style.
    """
    if style == "csv":
        return table.to_csv(index=False)
    notes = left_out(table) if style == "markdown" else ""
    if table["benchmark"].nunique() <= _BENCHMARKS_ACROSS:
        return frame_text(_finished(pivot(table)), style) + notes
    parts = [_finished(by_benchmark(table)), _finished(by_setting(table))]
    return "\n".join(frame_text(part, style) for part in parts if len(part.columns) > 2) + notes


def _finished(wide: pd.DataFrame) -> pd.DataFrame:
    wide = wide.reset_index()
    for column in wide.columns:
        wide[column] = [_cell(value) for value in wide[column]]
    return wide


def frame_text(frame: pd.DataFrame, style: str) -> str:
    """Return a frame of finished cells as a Markdown or LaTeX table; `UserError` for another style."""
    if style not in ("markdown", "latex"):
        raise UserError(f"--format: unknown value {style!r}; choose markdown, csv or latex")
    escapes = LATEX if style == "latex" else MARKDOWN
    columns = [name.translate(escapes) for name in frame.columns]
    rows = [[str(value).translate(escapes) for value in row] for row in frame.to_numpy().tolist()]
    if style == "latex":
        return _latex(columns, rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---"] * len(columns)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def told_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Return the tidy table with `checkpoint` and `mode` spelled out where two runs differ in nothing else that is shown.

    Two checkpoints of one name get their hashes, two runs of one mode their data types, prompts and so on. The
    mode as it was is in the column ``method``.
    """
    table = table.assign(method=table["mode"])
    hashes = (
        table.fillna({"checkpoint_hash": ""}).groupby("checkpoint")["checkpoint_hash"].transform("nunique")
    )
    several = (hashes > 1) & table["checkpoint_hash"].notna()
    table.loc[several, "checkpoint"] += " (" + table.loc[several, "checkpoint_hash"].astype(str) + ")"
    for column, text in _SHOWN_WHERE_DIFFERENT.items():
        # A run that asked for nothing is a run of its own beside one that did; elsewhere nothing means not known.
        if table[column].nunique(dropna=column != "generation") > 1:
            known = table[column].notna()
            table.loc[known, "mode"] += [", " + text.format(value) for value in table.loc[known, column]]
    return table


def largest_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the figures to show, one for each checkpoint, mode, harness, benchmark and metric."""
    return in_order(_by_size(table).drop_duplicates(list(KEYS), keep="last"))


def left_out(table: pd.DataFrame) -> str:
    """Return lines that name what `largest_runs` doesn't show; empty where it shows everything."""
    shown = _by_size(table)
    hidden = in_order(shown[shown.duplicated(list(KEYS), keep="last")])
    text = ""
    runs = hidden.groupby(["checkpoint", "mode", "harness", "n"], sort=False, dropna=False)
    for (*names, questions), rows in runs:
        run = ", ".join([*map(str, names), *rows["benchmark"].unique()])
        count = _cell(questions).replace("-", "unknown")
        text += f"* left out, an older or smaller run of {run.translate(MARKDOWN)}: n = {count}\n"
    return f"\n{text}" if text else ""


def _by_size(table: pd.DataFrame) -> pd.DataFrame:
    return told_apart(table).sort_values("n", kind="stable", na_position="first")


def _title(row: Mapping[Any, Any]) -> str:
    unit = UNITS.get(row["metric"])
    return f"{row['benchmark']} {row['metric']}" + (f" [{unit}]" if unit else "") + f" {row['harness']}"


def _cell(value: Any) -> str:
    """Texts as they are; of numbers only counts of questions are left."""
    if isinstance(value, str):
        return value
    return "-" if value is None or pd.isna(value) else f"{float(value):.0f}"


def _latex(columns: list[str], rows: list[list[str]]) -> str:
    lines = [r"\begin{tabular}{ll" + "r" * (len(columns) - 2) + "}", r"\hline"]
    lines.append(" & ".join(columns) + r" \\ \hline")
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def figure_text(metric: str, value: float, percent: int = 2) -> str:
    """Return the figure, without its unit; ``-`` for NaN."""
    return "-" if isnan(value) else f"{value:.{decimals(metric, value, percent)}f}"


def decimals(metric: str, value: float, percent: int = 2) -> int:
    """Return how many decimals a figure has: of percentages `percent`; of small amounts three digits; else two.

    Of perplexities near 1 at least four, and two digits of what is above 1.
    """
    if UNITS.get(metric) == PERCENT:
        return percent
    if metric == _PPL:
        return max(4, _place(value - 1) + 1) if value < 2 else 2
    return max(2, _place(value) + 2) if abs(value) < 1 else 2


def significant(value: float, digits: int) -> str:
    """Return `value` with that many digits, never with an exponent: ``10100``, ``0.00312``."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


def _place(value: float) -> int:
    """The decimal of the first digit that isn't 0."""
    return -floor(log10(abs(value))) if abs(value) >= 10**-_MOST else 0
