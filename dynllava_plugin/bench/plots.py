"""Charts of what was measured: over generated tokens as in the paper's Figure 1, over the length of training, over batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.bench.modes import MODES
from dynllava_plugin.files import write_figure

COLORS = ("#33658a", "#f6ae2d", "#c1292e", "#55a630", "#7b2d8b", "#8d5524", "#2a9d8f", "#6c757d")
PANELS = (
    ("decode", "median_s", 1e3, "one step with cache [ms]"),
    ("nocache", "median_s", 1.0, "one step without cache [s]"),
    ("memory", "cache_bytes", 2**-20, "cache allocated [MiB]"),
    ("memory", "peak_bytes", 2**-30, "peak above weights [GiB]"),
)
NAMES = {"plain": "full matrix", "ours": "ours", "sdpa": "SDPA, causal, no masks"}
TRAINED = {"plain": "#b23a48", "ours": "#33658a", "sdpa": "#8a8a8a"}
KEPT = {"paper": "paper's rates", "all": "all"}


def draw(table: pd.DataFrame, folder: Path) -> None:
    """Write the charts that a table of rows of one kind has figures for, as PNG."""
    if "harness" in table:
        draw_harness(table, folder / "chart.png")
    elif "implementation" not in table:
        for about, rows in table[table["phase"] != "load"].groupby(["shape", "device", "dtype", "batch"]):
            draw_generated(rows, about, folder)
    elif (table["phase"] == "attention").any():
        draw_training(table[table["phase"] == "attention"], folder / "chart.png")


def draw_generated(rows: pd.DataFrame, about: tuple[Any, ...], folder: Path) -> None:
    """Write time and memory over generated tokens, where a mode was measured at two lengths or more."""
    rows = rows[rows.get("path", pd.Series(index=rows.index)) == "eager"]
    modes = [mode for mode in dict.fromkeys([*MODES, *rows["mode"]]) if mode in set(rows["mode"])]
    colors = {MODES.get(mode, mode): COLORS[place % len(COLORS)] for place, mode in enumerate(modes)}
    panels = []
    for phase, field, factor, label in PANELS:
        here = rows[rows["phase"] == phase]
        if field in here and here["length"].nunique() > 1 and here[field].notna().any():
            lines = here.pivot(index="length", columns="mode", values=field).astype(float) * factor
            lines = lines[[mode for mode in modes if mode in lines]].rename(columns=MODES)
            panels.append((lines, {"xlabel": "generated tokens", "ylabel": label}))
    if panels:
        shape, device, dtype, batch = about
        name = f"{shape}_{device}_{dtype}_batch{batch}.png".replace(" ", "_")
        _write(
            folder / name, panels, len(panels), colors, f"{shape}, batch {batch}\n{device}, {dtype}, eager"
        )


def draw_training(table: pd.DataFrame, path: Path) -> None:
    """Write time and peak memory of one attention over N, a row of panels for each device.

    SDPA has no masks, so that its rows of either `kept` are one line.
    """
    unmasked = table["implementation"] == "sdpa"
    names = table["implementation"].map(NAMES)
    table = table.assign(line=names.where(unmasked, names + ", kept: " + table["kept"].map(KEPT)))
    panels = []
    for device in dict.fromkeys(table["device"]):
        here = table[table["device"] == device].drop_duplicates(["line", "length"])
        for column, scale, what in (
            ("median_s", 1e3, "time [ms]"),
            ("peak_bytes", 2**-20, "peak memory [MiB]"),
        ):
            # Per sample: a length whose full matrix doesn't fit is measured with fewer of them.
            here = here.assign(shown=pd.to_numeric(here[column]) * scale / here["batch"])
            lines = here.pivot(index="length", columns="line", values="shown").dropna(axis=1, how="all")
            titles = {"title": f"{device}\n{what} a sample", "xlabel": "sequence length N [tokens]"}
            panels.append((lines, {**titles, "loglog": True}))
    colors = {line: TRAINED[name] for line, name in zip(table["line"], table["implementation"], strict=True)}
    title = "Training attention, forward and backward"
    _write(path, panels, 2, colors, title)


def draw_harness(table: pd.DataFrame, path: Path) -> None:
    """Write questions a second over the batch size, a line a harness."""
    names = table["harness"] + (", " + table["device"] if table["device"].nunique() > 1 else "")
    lines = table.assign(line=names).pivot_table(index="batch", columns="line", values="questions_per_s")
    colors = dict(zip(lines.columns, COLORS * len(lines.columns), strict=False))
    labels = {"xlabel": "batch size", "ylabel": "questions/s", "logx": True}
    _write(path, [(lines, labels)], 1, colors, "Questions a second through the harnesses")


def _write(
    path: Path,
    panels: list[tuple[pd.DataFrame, dict[str, Any]]],
    columns: int,
    colors: dict[str, str],
    title: str = "",
) -> None:
    """Write panels, each the columns of a frame over its index, `columns` in a row and with one legend.

    "all" is dashed with open marks, to be seen around a line of the same figures. An axis that isn't logarithmic begins at 0.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, shape = (4.4 * columns, 3.6 * len(panels) / columns), (len(panels) // columns, columns)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis, (lines, settings) in zip(axes.flat, panels, strict=True):
        for name in map(str, lines):
            style: dict[str, Any] = {"style": "o-", "ms": 4}
            if name.endswith("kept: all"):
                style = {"style": "o--", "ms": 7, "mfc": "none"}
            lines[name].dropna().plot(ax=axis, color=colors[name], label=name, **style, **settings)
        if axis.get_yscale() != "log":
            # Behind the lines: set with the first, it would cut off higher ones.
            axis.set_ylim(0, 1.05 * lines.max().max())
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_xscale() == "log":  # ticks where something was measured, and nowhere else
            axis.set_xticks(lines.index, [str(place) for place in lines.index])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": min(len(labels), 2 * columns), "handlelength": 3}
    if any(lines.isna().to_numpy().any() for lines, _ in panels):
        title += " (behind the end of a line: not measured)"
    figure.legend(handles, labels, frameon=False, fontsize=8, **place)
    figure.suptitle(title, fontsize=11)
    write_figure(path, figure, dpi=120)
