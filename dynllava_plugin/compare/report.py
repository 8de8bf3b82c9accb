"""The comparison's table (tidy CSV and Markdown) and its plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynllava_plugin.compare.answers import Figure
from dynllava_plugin.compare.bootstrap import interval, resampled_means
from dynllava_plugin.compare.subjects import Subject
from dynllava_plugin.evaluation.results.figures import decimals
from dynllava_plugin.files import write_figure
from dynllava_plugin.markup import in_markdown

COLUMNS = (
    "policy", "keep", "benchmark", "metric", "value", "n", "equivalent_tokens", "prefill_ms",
    "low", "high", "behind_full", "behind_low", "behind_high",
    "image_tokens", "kept_image_tokens", "kept_output_share", "prefill_gflops", "prefill_iqr_ms", "cache_kib",
)  # fmt: skip
FULL = "full"
LOWER_IS_BETTER = ("ppl",)


def make_table(measured: Iterable[tuple[Subject, list[Figure], dict[str, Any]]]) -> pd.DataFrame:
    """One figure a row.

    Parameters
    ----------
    measured : iterable of (Subject, figures, costs)
        `costs` fills the columns of its names.

    Returns
    -------
    DataFrame
        Columns `COLUMNS`. `low` and `high` are the 95% interval of `value`; `behind_full` is the figure of full context
        minus this one (or the reverse, where less is better), with its paired interval. NaN where the task's figure is
        no mean over questions.
    """
    rows = []
    for subject, figures, costs in measured:
        for figure in figures:
            facts = {
                **{k: v for k, v in figure.counts.items() if k in COLUMNS},
                **costs.get(figure.benchmark, {}),
            }
            rows.append(
                {
                    "policy": subject.name, "keep": subject.keep, "benchmark": figure.benchmark,
                    "metric": figure.metric, "value": figure.value, "n": len(figure.questions) or figure.counts.get("n"),
                    **facts, "figure": figure,
                }
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=[*COLUMNS, "figure"])
    for _, group in table.groupby(["benchmark", "metric"]):
        _add_intervals(table, group)
    return table.drop(columns="figure").sort_values(
        ["benchmark", "metric", "keep", "policy"], ascending=[True, True, False, True], na_position="first"
    ).reset_index(drop=True)  # fmt: skip


def _add_intervals(table: pd.DataFrame, group: pd.DataFrame) -> None:
    """Paired over the questions that all policies of the group with as many answered."""
    full = group[group["policy"] == FULL]
    for questions, same in group.groupby(group["figure"].map(lambda figure: tuple(figure.questions))):
        if not questions:
            continue
        means = resampled_means(np.array([figure.scores for figure in same["figure"]]))
        rows = dict(zip(same.index, means, strict=True))
        for index, mean in rows.items():
            table.loc[index, ["low", "high"]] = interval(mean)
        base = next((index for index in full.index if index in rows), None)
        if base is None:
            continue
        sign = -1 if table.loc[base, "metric"] in LOWER_IS_BETTER else 1
        for index, mean in rows.items():
            table.loc[index, "behind_full"] = sign * (table.loc[base, "value"] - table.loc[index, "value"])
            table.loc[index, ["behind_low", "behind_high"]] = interval(sign * (rows[base] - mean))


def to_markdown(table: pd.DataFrame) -> str:
    """One block a benchmark and metric: policies by share, with intervals and costs."""
    lines: list[str] = []
    for (benchmark, metric), group in table.groupby(["benchmark", "metric"], sort=False):
        lines += [f"### {benchmark}, {metric}", ""]
        head: list[Any] = [
            "policy",
            "keep",
            metric,
            "95%",
            "behind full (paired 95%)",
            "n",
            "equivalent tokens",
        ]
        head += ["prefill GFLOPs", "prefill ms"]
        extra = [("output kept", "kept_output_share", "{:.0%}"), ("cache KiB", "cache_kib", "{:.1f}")]
        extra = [item for item in extra if group[item[1]].notna().any()]
        head += [title for title, _, _ in extra]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        order = group.sort_values("keep", ascending=False, na_position="first", kind="stable")
        for row in order.to_dict("records"):
            form = f"{{:.{decimals(str(metric), row['value'])}f}}"
            behind = _range(row["behind_low"], row["behind_high"], form)
            cells = [
                in_markdown(row["policy"]), _cell(row["keep"], "{:.0%}"), _cell(row["value"], form),
                _range(row["low"], row["high"], form),
                _cell(row["behind_full"], form) + _in_brackets(behind),
                _cell(row["n"], "{:.0f}"), _cell(row["equivalent_tokens"], "{:.1f}"),
                _cell(row["prefill_gflops"], "{:.3g}"), _cell(row["prefill_ms"], "{:.2f}"),
            ]  # fmt: skip
            cells += [_cell(row[column], form) for _, column, form in extra]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None or pd.isna(value) else form.format(value)


def _range(low: float, high: float, form: str) -> str:
    return "-" if pd.isna(low) else f"{form.format(low)} to {form.format(high)}"


def _in_brackets(text: str) -> str:
    return "" if text == "-" else f" ({text})"


def draw(table: pd.DataFrame, benchmark: str, metric: str, path: Path) -> None:
    """A PNG: the figure against equivalent tokens and against prefill time, a line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table[(table["benchmark"] == benchmark) & (table["metric"] == metric)]
    axes_of = [
        ("equivalent_tokens", "equivalent image tokens (mean over layers)"),
        ("prefill_ms", "prefill [ms]"),
    ]
    axes_of = [item for item in axes_of if rows[item[0]].notna().any()]
    figure, axes = plt.subplots(
        1, max(1, len(axes_of)), figsize=(1.6 + 5.4 * max(1, len(axes_of)), 4.8), sharey=True, squeeze=False
    )
    policies = sorted(set(rows["policy"]), key=lambda name: (name != FULL, name not in LEARNED, name))
    markers = "osv^<>DPX*hd"
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axis, (column, title) in zip(axes[0], axes_of, strict=False):
        for index, policy in enumerate(policies):
            mine = rows[(rows["policy"] == policy) & rows[column].notna()].sort_values(column)
            known = mine["low"].notna()
            bars = None
            if known.all() and len(mine):
                bars = np.abs([mine["value"] - mine["low"], mine["high"] - mine["value"]])
            axis.errorbar(
                mine[column], mine["value"], yerr=bars, label=policy, capsize=2, elinewidth=0.8,
                marker=markers[index % len(markers)], color=colors[index % len(colors)],
                linewidth=2.4 if policy in LEARNED else 1.1, zorder=3 if policy in LEARNED else 2, markersize=5,
            )  # fmt: skip
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(metric)
    if axes_of:
        axes[0][-1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(
        f"{benchmark}: policies on one checkpoint, bars are 95% intervals over questions", fontsize=11
    )
    figure.tight_layout()
    write_figure(path, figure)


LEARNED = ("image", "image_text", "learned")
