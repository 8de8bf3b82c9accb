"""Charts of what was measured: over generated tokens as in the paper's Figure 1, over the length of training, over batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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
    rows = rows[rows.get("path", pd.Series(index=rows.index)) == "eager"].sort_values("length")
    modes = [mode for mode in dict.fromkeys([*MODES, *rows["mode"]]) if mode in set(rows["mode"])]
    colors = {mode: COLORS[number % len(COLORS)] for number, mode in enumerate(modes)}
    panels = []
    for phase, field, factor, label in PANELS:
        here = rows[(rows["phase"] == phase) & rows[field].notna()] if field in rows else rows[:0]
        lines = [
            Line(MODES.get(mode, mode), points["length"], points[field] * factor, colors[mode])
            for mode, points in ((mode, here[here["mode"] == mode]) for mode in modes)
            if len(points) > 1
        ]
        panels += [Panel(lines, xlabel="generated tokens", ylabel=label, ylim=(0, None))] if lines else []
    if panels:
        shape, device, dtype, batch = about
        name = f"{shape}_{device}_{dtype}_batch{batch}.png".replace(" ", "_")
        _write(folder / name, panels, len(panels), f"{shape}, batch {batch}, {device}, {dtype}")


def draw_training(table: pd.DataFrame, path: Path) -> None:
    """Write time and peak memory of one attention over N, a row of panels for each device.

    SDPA has no masks, so that its rows of either `kept` are one line.
    """
    panels = []
    for device in dict.fromkeys(table["device"]):
        here = table[table["device"] == device].sort_values(["implementation", "length", "kept"])
        here.loc[here["implementation"] == "sdpa", "kept"] = "all"
        here = here.drop_duplicates(["implementation", "length", "kept"])
        for column, scale, what in (
            ("median_s", 1e3, "time [ms]"),
            ("peak_bytes", 2**-20, "peak memory [MiB]"),
        ):
            lines = []
            for (name, kept), rows in here.groupby(["implementation", "kept"]):
                label = NAMES[name] if name == "sdpa" else f"{NAMES[name]}, kept: {KEPT[kept]}"
                # Per sample: a length whose full matrix doesn't fit is measured with fewer of them.
                values = pd.to_numeric(rows[column]) * scale / rows["batch"]
                style = "--" if kept == "all" and name != "sdpa" else "-"
                lines += (
                    [Line(label, rows["length"], values, TRAINED[name], style)]
                    if values.notna().any()
                    else []
                )
            title, axis = f"{device}\n{what} a sample", "sequence length N [tokens]"
            panels.append(Panel(lines, here["length"], title=title, xlabel=axis, yscale="log"))
    title = "Training attention, forward and backward (behind the end of a line: not measured)"
    _write(path, panels, 2, title)


def draw_harness(table: pd.DataFrame, path: Path) -> None:
    """Write questions a second over the batch size, a line a harness."""
    lines = []
    for number, ((device, harness), rows) in enumerate(table.groupby(["device", "harness"])):
        label = f"{harness}, {device}" if table["device"].nunique() > 1 else str(harness)
        lines.append(Line(label, rows["batch"], rows["questions_per_s"], COLORS[number % len(COLORS)]))
    _write(path, [Panel(lines, table["batch"], xlabel="batch size", ylabel="questions/s", ylim=(0, None))], 1)


class Line(NamedTuple):
    """A line of a chart."""

    label: str
    x: pd.Series
    y: pd.Series
    color: str
    style: str = "-"


class Panel:
    """Lines over one pair of axes; `ticks`: of a logarithmic x axis, one at each of these values and nowhere else."""

    def __init__(self, lines: list[Line], ticks: pd.Series | None = None, **settings: Any) -> None:
        self.lines, self.settings = lines, settings
        self.ticks = [] if ticks is None else sorted(set(ticks))

    def draw(self, axis: Any) -> None:
        """Draw on matplotlib's `axis`."""
        for line in self.lines:
            axis.plot(line.x, line.y, line.style, marker="o", ms=4, color=line.color, label=line.label)
        axis.set(**self.settings)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        if self.ticks:
            axis.set_xscale("log")
            axis.set_xticks(self.ticks, [str(place) for place in self.ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)


def _write(path: Path, panels: list[Panel], columns: int, title: str = "") -> None:
    """Write panels, `columns` in a row, with one legend for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 4.4 * columns, 3.6 * len(panels) / columns
    figure, axes = plt.subplots(
        len(panels) // columns, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel.draw(axis)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=min(len(labels), 2 * columns),
    )
    figure.suptitle(title, fontsize=11)
    write_figure(path, figure, dpi=120)
