"""The demo's chart: a panel a benchmark and metric, a line a mode, both harnesses as one point where they agree."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dynllava_plugin.demo.summary import COLUMNS, benchmark_rows, cell
from dynllava_plugin.files import write_figure

# VLMEvalKit's ring stands around lmms-eval's dot where both give the same.
MARKERS = {
    "lmms-eval": {"s": 26, "color": "#33658a"},
    "vlmevalkit": {"s": 90, "facecolors": "none", "edgecolors": "#e08e0b", "linewidths": 1.6},
}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG of `read_results`' rows, whole or not at all: every figure of `summary`, with the same digits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [key for key in COLUMNS if not benchmark_rows(table, key).empty]
    modes = list(dict.fromkeys(table["mode"]))
    shape = (2.4 + 2.9 * len(panels), 1.7 + 0.42 * len(modes))
    figure, axes = plt.subplots(1, len(panels), figsize=shape, squeeze=False, sharey=True)
    for axis, key in zip(axes[0], panels, strict=True):
        rows = benchmark_rows(table, key)
        for harness, marker in MARKERS.items():
            here = rows[rows["harness"] == harness]
            axis.scatter(here["value"], [modes.index(mode) for mode in here["mode"]], label=harness, **marker)
        for place, mode in enumerate(modes):
            text, values = cell(rows[rows["mode"] == mode]), rows[rows["mode"] == mode]["value"]
            if len(values):
                axis.annotate(text, (values.min(), place), (-9, 0), textcoords="offset points",
                    fontsize=8, ha="right", va="center")  # fmt: skip
            else:
                axis.text(0.5, place, "not run", transform=axis.get_yaxis_transform(), fontsize=8,
                    color="#8a8a8a", ha="center", va="center")  # fmt: skip
        axis.set_title(COLUMNS[key], fontsize=10)
        axis.set_yticks(range(len(modes)), modes)
        axis.margins(x=0.12)
        low, high = axis.get_xlim()
        percent = "%" in COLUMNS[key]
        axis.set_xlim(*((0, 106) if percent else (low - 0.8 * (high - low), high)))
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5 if percent else 2)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylim(len(modes) - 0.5, -0.5)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="lower center", ncols=2)
    figure.suptitle(
        "Dynamic-LLaVA on easy-VQA: what is kept of the image, chosen by the predictor or at random",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    write_figure(path, figure)
