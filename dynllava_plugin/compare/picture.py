"""The comparison as a picture: a panel for each benchmark, image tokens across, a few policies in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynllava_plugin.compare.literature import MEAN
from dynllava_plugin.compare.subjects import FULL
from dynllava_plugin.evaluation.benchmarks import UNITS
from dynllava_plugin.files import write_figure

LEARNED = ("image", "image_text", "learned")
_HIGHLIGHTED = 5
_COLORS = ("#c1272d", "#0050a0", "#e69f00", "#008f6b", "#7b3fa0")
_COLUMNS, _PANELS, _SMALL_COLUMNS = 3, 12, 6


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG: figures against equivalent tokens; the learned policies and the best others stand out.

    Bars are intervals, a band of the same colour goes from the lowest to the highest of several trainings.
    """
    panels = _panels(table)[:_PANELS]
    if not panels:
        return
    figure, axes = _grid(len(panels), _COLUMNS, (4.1, 3.3), (1.9, 0.9))
    table = _whole(table)
    colors = dict(zip(highlighted(table), _COLORS, strict=False))
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, _rows(table, panel), colors)
        axis.set_title(panel[0], fontsize=11, loc="left")
        axis.set_ylabel(_measured(panel[1]))
        axis.set_xlabel("image tokens, mean over layers")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        wanted = [name for name in (FULL, *colors, "others") if name in handles]
        figure.legend([handles[name] for name in wanted], wanted, loc="outside right upper", frameon=False)
    write_figure(path, figure)


def draw_policies(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG of the first of `draw`'s panels anew for each policy, which stands out there beside the best learned one."""
    panel = next(iter(_panels(table)), None)
    if panel is None:
        return
    rows = _rows(_whole(table), panel)
    whole = rows.loc[rows["policy"] == FULL, "equivalent_tokens"].max()
    names = [str(name) for name, mine in rows.groupby("policy") if mine["equivalent_tokens"].min() < whole]
    learned = [name for name in highlighted(table) if name.partition(",")[0] in LEARNED][:1]
    names = [name for name in names if name not in learned] or learned
    if not names:
        return
    figure, axes = _grid(len(names), _SMALL_COLUMNS, (2.2, 1.9), (0.6, 0.9), sharex=True, sharey=True)
    for axis, name in zip(axes, names, strict=True):
        _panel(axis, rows, dict(zip([*learned, name], _COLORS, strict=False)))
        axis.set_title(name.replace(",", ",\n"), fontsize=9, loc="left", color=_COLORS[len(learned)])
    marks = ", ".join([f"dashed: {FULL}", *(f"red: {name}" for name in learned)])
    figure.suptitle(f"{panel[0]} ({marks})", fontsize=11)
    figure.supylabel(_measured(panel[1]), fontsize=10)
    figure.supxlabel("image tokens, mean over layers", fontsize=10)
    write_figure(path, figure)


def _measured(metric: str) -> str:
    """The metric with its unit, if it has one."""
    unit = UNITS.get(metric)
    return f"{metric} [{unit}]" if unit else metric


def _grid(
    count: int, columns: int, size: tuple[float, float], around: tuple[float, float], **more: Any
) -> tuple[Any, list[Any]]:
    """A figure with `count` panels in at most so many columns, sizes in inches; returns it and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, count)
    lines = -(-count // columns)
    inches = around[0] + size[0] * columns, around[1] + size[1] * lines
    figure, axes = plt.subplots(lines, columns, figsize=inches, squeeze=False, layout="constrained", **more)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return pairs of benchmark and metric that have a point to draw, the mean over benchmarks first."""
    table = table[table["equivalent_tokens"].notna()]
    panels = list(dict.fromkeys(zip(table["benchmark"], table["metric"], strict=True)))
    return sorted(panels, key=lambda panel: panel[0] != MEAN)


def _rows(table: pd.DataFrame, panel: tuple[str, str]) -> pd.DataFrame:
    mine = (table["benchmark"] == panel[0]) & (table["metric"] == panel[1])
    return table[mine & table["equivalent_tokens"].notna()]


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without those of fewer questions, as of a trial with `--limit`."""
    largest = table.groupby(["benchmark", "metric"])["n"].transform("max")
    return table[table["n"].isna() | (table["n"] == largest)]


def highlighted(table: pd.DataFrame) -> list[str]:
    """Return the learned policies, then those that are the least behind full context at equal tokens, by their mean rank.

    Of policies with the same figures everywhere (of `image` and `image_text`, where answers are one word) the first stands for all.
    A policy that drops no image tokens has no place.
    """
    rows = table[(table["policy"] != FULL) & table["percent"].notna() & table["equivalent_tokens"].notna()]
    rows = rows[rows["equivalent_tokens"] < table.loc[table["policy"] == FULL, "equivalent_tokens"].max()]
    if rows["tokens"].notna().any():  # shares are other budgets for a policy that acts earlier
        rows = rows[rows["tokens"].notna()]
    budget = rows["tokens"].fillna(rows["keep"])
    ranks = (
        rows["percent"]
        .groupby([rows["benchmark"], rows["metric"], budget], dropna=False)
        .rank(ascending=False)
    )
    order = ranks.groupby(rows["policy"]).mean().sort_values(kind="stable").index.tolist()
    there = [name for name in order if name.partition(",")[0] in LEARNED]
    lines: dict[tuple[Any, ...], str] = {}
    for name in [*sorted(there), *(name for name in order if name not in there)]:
        mine = rows.loc[rows["policy"] == name, ["benchmark", "metric", "equivalent_tokens", "value"]]
        lines.setdefault(tuple(mine.sort_values(list(mine)).itertuples(index=False, name=None)), name)
    return list(lines.values())[:_HIGHLIGHTED]


def _panel(axis: Any, rows: pd.DataFrame, colors: dict[str, str]) -> None:
    for policy, mine in rows.groupby("policy", sort=False):
        mine = mine.sort_values("equivalent_tokens")
        if policy == FULL:
            value = float(mine["value"].iloc[0])
            axis.axhline(value, color="0.25", linewidth=1, linestyle=(0, (4, 3)), label=FULL, zorder=1)
            if mine["low"].notna().all():
                axis.axhspan(
                    float(mine["low"].iloc[0]),
                    float(mine["high"].iloc[0]),
                    color="0.25",
                    alpha=0.08,
                    linewidth=0,
                )
            continue
        shown = policy in colors
        bars = None
        if shown and mine["low"].notna().all():
            bars = np.abs([mine["value"] - mine["low"], mine["high"] - mine["value"]])
        axis.errorbar(
            mine["equivalent_tokens"], mine["value"], yerr=bars, label=policy if shown else "others",
            color=colors.get(str(policy), "0.78"), linewidth=2 if shown else 0.9, marker="o",
            # The first stays visible under another line of the same figures.
            markersize=2.5 if not shown else 8 if policy == next(iter(colors)) else 4.5,
            capsize=2.5, elinewidth=1, zorder=3 if shown else 2,
        )  # fmt: skip
        if shown and (mine["trainings"] > 1).any():
            axis.fill_between(
                mine["equivalent_tokens"], mine["lowest"], mine["highest"], color=colors[str(policy)],
                alpha=0.2, linewidth=0, zorder=1,
            )  # fmt: skip
    # The margin behind the last point is a share of the whole axis, from 0 on.
    axis.update_datalim([(0, 0)], updatey=False)
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
