"""What `bench train` measured, for people: table.csv (tidy), table.md, chart.png, machine.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.files import write_figure, write_json, write_text

NAMES = {"plain": "full matrix", "ours": "ours", "sdpa": "SDPA, causal, no masks"}
COLORS = {"plain": "#b23a48", "ours": "#33658a", "sdpa": "#8a8a8a"}
KEPT = {"paper": "paper's rates", "all": "all"}
NOT_MEASURED = "A CUDA GPU: not measured.\n"


def write_training_report(rows: list[dict[str, Any]], machines: dict[str, Any], folder: Path) -> None:
    """Write the four files, `machines` (device -> description) as machine.json; each appears whole or not at all."""
    table = pd.DataFrame(rows)
    write_text(folder / "table.csv", table.to_csv(index=False))
    write_text(folder / "table.md", markdown(rows))
    write_json(folder / "machine.json", machines)
    if "phase" in table and (table["phase"] == "attention").any():
        try:
            draw(table[table["phase"] == "attention"], folder / "chart.png")
        except ImportError:
            print("no chart: matplotlib isn't installed", file=sys.stderr)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Attention and steps, one table each for every device; ratios are to the full matrix in the same run."""
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device and row.get("fits")]
        attention = [row for row in here if row["phase"] == "attention"]
        steps = [row for row in here if row["phase"] == "step"]
        if attention:
            parts.append(f"### One attention, forward and backward: {_what(attention[0])}\n")
            parts.append(_table(attention, {"length": "N", "batch": "batch", "kept": "kept"}, {}))
        if steps:
            parts.append(f"### A whole training step: {_what(steps[0])}\n")
            more = {"samples/s": _samples, "MFU": _mfu, "hours an epoch of 665K": _hours}
            parts.append(_table(steps, {"shape": "shape", "length": "N", "batch": "batch"}, more))
            notes = dict.fromkeys(
                f"{row['shape']}: {row['optimizer']}, gradient checkpointing {'on' if row['checkpointing'] else 'off'}; MFU of "
                f"{row['peak_tflops']:.3g} TFLOP/s ({row['peak_from']})."
                for row in steps
            )
            parts.append("\n".join(notes) + "\n")
    if all(row["device"] == "cpu" for row in rows):
        parts.append(NOT_MEASURED)
    return "\n".join(parts)


def _what(row: dict[str, Any]) -> str:
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['shape']}, {row['dtype']}, {row['device']}{threads}"


def _table(rows: list[dict[str, Any]], about: dict[str, str], more: dict[str, Any]) -> str:
    heads = [
        *about.values(),
        "implementation",
        "time",
        "of full matrix",
        "peak memory",
        "of full matrix",
        *more,
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        peak = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        cells = [KEPT.get(str(row[key]), str(row[key])) for key in about]
        cells += [
            NAMES[row["implementation"]],
            f"{row['median_s'] * 1e3:,.1f} ms",
            _ratio(row, "time_ratio"),
            peak,
        ]
        cells += [_ratio(row, "memory_ratio"), *(cell(row) for cell in more.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(row: dict[str, Any], name: str) -> str:
    if row["implementation"] == "plain":
        return ""
    return "-" if row.get(name) is None else f"{row[name]:.3f}x"


def _samples(row: dict[str, Any]) -> str:
    return f"{row['samples_per_s']:.2f}"


def _mfu(row: dict[str, Any]) -> str:
    return f"{row['mfu']:.1%}"


def _hours(row: dict[str, Any]) -> str:
    pairs = zip(row["devices"], row["epoch_hours"], strict=True)
    return ", ".join(f"{hours:,.0f} on {number}" for number, hours in pairs)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG: time and peak memory of one attention over N, a row of panels for each device.

    SDPA has no masks, so that its rows of either `kept` are one line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    devices = list(dict.fromkeys(table["device"]))
    figure, axes = plt.subplots(len(devices), 2, figsize=(9, 3.6 * len(devices)), squeeze=False)
    for line, device in zip(axes, devices, strict=True):
        here = table[table["device"] == device].sort_values(["implementation", "length", "kept"])
        here.loc[here["implementation"] == "sdpa", "kept"] = "all"
        here = here.drop_duplicates(["implementation", "length", "kept"])
        lengths = sorted(set(here["length"]))
        for axis, column, scale, title in (
            (line[0], "median_s", 1e3, "time [ms]"),
            (line[1], "peak_bytes", 2**-20, "peak memory [MiB]"),
        ):
            for (name, kept), rows in here.groupby(["implementation", "kept"]):
                # Per sample: a length whose full matrix doesn't fit is measured with fewer of them.
                values = rows[column] * scale / rows["batch"]
                if values.isna().all():
                    continue
                label = NAMES[name] if name == "sdpa" else f"{NAMES[name]}, kept: {KEPT[kept]}"
                style = "--" if kept == "all" and name != "sdpa" else "-"
                axis.plot(rows["length"], values, style, marker="o", color=COLORS[name], label=label, ms=4)
            axis.set(xscale="log", yscale="log", xlabel="sequence length N [tokens]")
            axis.set_title(f"{device}\n{title} a sample", fontsize=10)
            axis.set_xticks(lengths, [str(n) for n in lengths])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3)
    title = "Training attention, forward and backward"
    figure.suptitle(f"{title} (behind the end of a line: not measured)", fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    write_figure(path, figure)
