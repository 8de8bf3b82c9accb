"""The comparison as a picture: a panel for each benchmark, image tokens across, a few policies in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dynllava_plugin.compare.literature import MEAN
from dynllava_plugin.compare.subjects import FULL
from dynllava_plugin.files import write_figure

LEARNED = ("image", "image_text", "learned")
_HIGHLIGHTED = 5
_COLORS = ("#c1272d", "#0050a0", "#e69f00", "#008f6b", "#7b3fa0")
_COLUMNS, _PANELS = 3, 12


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG: figures against equivalent tokens, bars are intervals; the learned policies and the best others stand out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(zip(table["benchmark"], table["metric"], strict=True)))
    panels = sorted(panels, key=lambda panel: panel[0] != MEAN)[:_PANELS]
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1.9 + 4.1 * columns, 0.9 + 3.3 * lines), squeeze=False, layout="constrained"
    )
    colors = dict(zip(_highlighted(table), _COLORS, strict=False))
    for axis, panel in zip(axes.flat, panels, strict=False):
        rows = table[(table["benchmark"] == panel[0]) & (table["metric"] == panel[1])]
        _panel(axis, rows[rows["equivalent_tokens"].notna()], colors)
        axis.set_title(panel[0], fontsize=11, loc="left")
        axis.set_ylabel(panel[1])
        axis.set_xlabel("image tokens, mean over layers")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        wanted = [name for name in (FULL, *colors, "others") if name in handles]
        figure.legend([handles[name] for name in wanted], wanted, loc="outside right upper", frameon=False)
    write_figure(path, figure)


def _highlighted(table: pd.DataFrame) -> list[str]:
    """Return the learned policies, then those that are the least behind full context at equal tokens, by their mean rank."""
    rows = table[(table["policy"] != FULL) & table["percent"].notna() & table["equivalent_tokens"].notna()]
    budget = rows["tokens"].fillna(rows["keep"])
    ranks = (
        rows["percent"]
        .groupby([rows["benchmark"], rows["metric"], budget], dropna=False)
        .rank(ascending=False)
    )
    order = ranks.groupby(rows["policy"]).mean().sort_values(kind="stable").index.tolist()
    there = [name for name in LEARNED if name in set(table["policy"])]
    return [*there, *(name for name in order if name not in there)][:_HIGHLIGHTED]


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
            markersize=5 if shown else 2.5, capsize=2.5, elinewidth=1, zorder=3 if shown else 2,
        )  # fmt: skip
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
