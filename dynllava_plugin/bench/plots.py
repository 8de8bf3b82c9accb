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
    shape, device, dtype, batch = about
    rows = rows[rows.get("path", pd.Series(index=rows.index)) == "eager"]
    order = [name for name in [*MODES, *rows["mode"].unique()] if name in set(rows["mode"])]
    panels = []
    for phase, field, factor, label in PANELS:
        here = rows[(rows["phase"] == phase) & rows[field].notna()] if field in rows else rows[:0]
        curves = {
            mode: points.sort_values("length") for mode, points in here.groupby("mode") if len(points) > 1
        }
        panels += [(label, field, factor, curves)] if curves else []
    if not panels:
        return
    figure, axes = _axes(1, len(panels), (4.2 * len(panels), 3.6))
    colors = dict(zip(dict.fromkeys(order), COLORS * len(order), strict=False))
    for axis, (label, field, factor, curves) in zip(axes[0], panels, strict=True):
        for mode in [mode for mode in colors if mode in curves]:
            title = MODES[mode].title if mode in MODES else mode
            axis.plot(
                curves[mode]["length"], curves[mode][field] * factor, "o-", color=colors[mode], label=title
            )
        axis.set(xlabel="generated tokens", ylabel=label, ylim=(0, None))
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{shape}, batch {batch}, {device}, {dtype}", fontsize=11)
    figure.tight_layout()
    write_figure(folder / f"{shape}_{device}_{dtype}_batch{batch}.png".replace(" ", "_"), figure, dpi=120)


def draw_training(table: pd.DataFrame, path: Path) -> None:
    """Write time and peak memory of one attention over N, a row of panels for each device.

    SDPA has no masks, so that its rows of either `kept` are one line.
    """
    devices = list(dict.fromkeys(table["device"]))
    figure, axes = _axes(len(devices), 2, (9, 3.6 * len(devices)))
    for line, device in zip(axes, devices, strict=True):
        here = table[table["device"] == device].sort_values(["implementation", "length", "kept"])
        here.loc[here["implementation"] == "sdpa", "kept"] = "all"
        here = here.drop_duplicates(["implementation", "length", "kept"])
        for axis, column, scale, title in (
            (line[0], "median_s", 1e3, "time [ms]"),
            (line[1], "peak_bytes", 2**-20, "peak memory [MiB]"),
        ):
            for (name, kept), rows in here.groupby(["implementation", "kept"]):
                # Per sample: a length whose full matrix doesn't fit is measured with fewer of them.
                values = pd.to_numeric(rows[column]) * scale / rows["batch"]
                if values.notna().any():
                    label = NAMES[name] if name == "sdpa" else f"{NAMES[name]}, kept: {KEPT[kept]}"
                    style = "--" if kept == "all" and name != "sdpa" else "-"
                    axis.plot(
                        rows["length"], values, style, marker="o", color=TRAINED[name], label=label, ms=4
                    )
            axis.set_title(f"{device}\n{title} a sample", fontsize=10)
            axis.set(yscale="log", xlabel="sequence length N [tokens]")
            _ticks(axis, here["length"])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3)
    title = "Training attention, forward and backward"
    figure.suptitle(f"{title} (behind the end of a line: not measured)", fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    write_figure(path, figure)


def draw_harness(table: pd.DataFrame, path: Path) -> None:
    """Write questions a second over the batch size, a line a harness."""
    figure, axes = _axes(1, 1, (5.5, 3.6))
    for (device, harness), rows in table.groupby(["device", "harness"]):
        label = harness if table["device"].nunique() == 1 else f"{harness}, {device}"
        axes[0][0].plot(rows["batch"], rows["questions_per_s"], marker="o", label=label)
    axes[0][0].set(xlabel="batch size", ylabel="questions/s", ylim=(0, None))
    _ticks(axes[0][0], table["batch"])
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    write_figure(path, figure)


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ticks(axis: Any, values: pd.Series) -> None:
    """Put a tick at each of `values` of a logarithmic axis, and nowhere else."""
    places = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(places, [str(place) for place in places])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
