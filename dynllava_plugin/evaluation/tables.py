"""The tidy table of results laid out for reading: as Markdown, LaTeX or CSV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.benchmarks import LMMS_EVAL, PERCENT, VLMEVALKIT, unit_of
from dynllava_plugin.evaluation.modes import mode_name
from dynllava_plugin.evaluation.order import in_order
from dynllava_plugin.evaluation.results import KEYS, SCORED, read_results

__all__ = [
    "LMMS_EVAL",
    "VLMEVALKIT",
    "by_benchmark",
    "frame_text",
    "mode_name",
    "pivot",
    "read_results",
    "render",
]

FORMATS = ("markdown", "csv", "latex")
_COUNT_COLUMNS = ("image tokens kept", "output tokens kept [%]", "equivalent tokens", "prefill GFLOPs")
# More than these don't fit beside each other: one benchmark a row then.
_BENCHMARKS_ACROSS = 4


def pivot(table: pd.DataFrame) -> pd.DataFrame:
    """Rows checkpoint and mode; columns benchmark, metric and harness; then questions and kept tokens.

    Where one setting was run on different numbers of questions, the largest stands. A cell without a figure
    says why ("needs judge"); NaN where nothing was run.
    """
    chosen = _largest_runs(table)
    out: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chosen.to_dict("records"):
        cells = out.setdefault((row["checkpoint"], row["mode"]), {})
        cells[_title(row)] = figure_or_status(row)
        cells[f"n {row['benchmark']}"] = row["n"]
    _add_counts(chosen, out)
    # Scores first, as the registry lists them; then questions; then tokens.
    ordered = in_order(chosen, first=("benchmark", "metric", "harness"))
    columns = list(dict.fromkeys(_title(row) for row in ordered.to_dict("records")))
    columns += list(dict.fromkeys(f"n {name}" for name in ordered["benchmark"]))
    columns += [name for name in _COUNT_COLUMNS if any(name in cells for cells in out.values())]
    index = pd.MultiIndex.from_tuples(list(out), names=["checkpoint", "mode"])
    return pd.DataFrame(list(out.values()), index=index, columns=columns)


def by_benchmark(table: pd.DataFrame) -> pd.DataFrame:
    """Rows benchmark and metric; columns harness under checkpoint and mode, and the number of questions."""
    chosen = in_order(_largest_runs(table), first=("benchmark", "metric"))
    several = chosen["checkpoint"].nunique() > 1
    runs = in_order(chosen)[["checkpoint", "mode", "harness"]].drop_duplicates().to_dict("records")

    def heading(row: Mapping[Any, Any]) -> str:
        return (f"{row['checkpoint']} " if several else "") + f"{row['mode']} {row['harness']}"

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chosen.to_dict("records"):
        unit = f" [{row['unit']}]" if row["unit"] else ""
        cells = rows.setdefault((row["benchmark"], row["metric"] + unit), {})
        cells[heading(row)] = figure_or_status(row)
        cells["n"] = row["n"]
    index = pd.MultiIndex.from_tuples(list(rows), names=["benchmark", "metric"])
    return pd.DataFrame(list(rows.values()), index=index, columns=[*(heading(run) for run in runs), "n"])


def figure_or_status(row: Mapping[Any, Any]) -> Any:
    """The value where there is one, else why there is none."""
    return row["value"] if row["status"] == SCORED else row["status"]


def render(table: pd.DataFrame, style: str) -> str:
    """The table as text, figures with two decimals.

    Markdown and LaTeX have one mode a row, or one benchmark a row where there are many; CSV one figure a row.

    Raises
    ------
    UserError
        For another style.
    """
    if style not in FORMATS:
        raise UserError(f"--format: unknown value {style!r}; choose markdown, csv or latex")
    if style == "csv":
        return table.to_csv(index=False)
    across = table["benchmark"].nunique() <= _BENCHMARKS_ACROSS
    wide = (pivot(table) if across else by_benchmark(table)).reset_index()
    for column in wide.columns:
        counts = across and not (f"[{PERCENT}]" in column or "ppl" in column)
        wide[column] = [_cell(value, 0 if counts or column == "n" else 2) for value in wide[column]]
    return frame_text(wide, style)


def frame_text(frame: pd.DataFrame, style: str) -> str:
    """A frame of finished cells as a Markdown or LaTeX table."""
    rows = [[str(value) for value in row] for row in frame.to_numpy().tolist()]
    if style == "latex":
        return _latex(list(frame.columns), rows)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "|".join(["---"] * len(frame.columns)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _largest_runs(table: pd.DataFrame) -> pd.DataFrame:
    return in_order(table.sort_values("n").drop_duplicates(list(KEYS), keep="last"))


def _title(row: Mapping[Any, Any]) -> str:
    unit = unit_of(row["metric"])
    return f"{row['benchmark']} {row['metric']}" + (f" [{unit}]" if unit else "") + f" {row['harness']}"


def _add_counts(chosen: pd.DataFrame, out: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Mean image tokens kept of a sample with an image, and the share of long answers' tokens that stay."""
    for (checkpoint, mode), rows in chosen.groupby(["checkpoint", "mode"]):
        cells = out[(str(checkpoint), str(mode))]
        with_image = rows[rows["image_tokens"] > 0]
        if len(with_image):
            total, kept = with_image["image_tokens"].mean(), with_image["kept_image_tokens"].mean()
            cells[_COUNT_COLUMNS[0]] = f"{kept:.0f} of {total:.0f}"
            for title, column in zip(
                _COUNT_COLUMNS[2:], ("equivalent_tokens", "prefill_gflops"), strict=True
            ):
                if with_image[column].notna().any():
                    cells[title] = f"{with_image[column].mean():.3g}"
        long = rows[(rows["generated_tokens"] >= 20) & rows["kept_output_share"].notna()]
        if len(long):
            cells[_COUNT_COLUMNS[1]] = 100 * long["kept_output_share"].mean()


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None or pd.isna(value) else f"{float(value):.{digits}f}"


def _latex(columns: list[str], rows: list[list[str]]) -> str:
    def escape(text: str) -> str:
        for character in ("\\", "_", "%", "&", "#", "|"):
            replacement = {"\\": r"\textbackslash{}", "|": r"\textbar{}"}.get(character, rf"\{character}")
            text = text.replace(character, replacement)
        return text

    lines = [r"\begin{tabular}{ll" + "r" * (len(columns) - 2) + "}", r"\hline"]
    lines.append(" & ".join(escape(name) for name in columns) + r" \\ \hline")
    lines += [" & ".join(escape(value) for value in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
