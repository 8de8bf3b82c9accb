"""The demo's chart: short answers and long answers of every mode, harness beside harness."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dynllava_plugin.evaluation.benchmarks import unit_of
from dynllava_plugin.files import write_figure

HARNESS_COLORS = {"lmms-eval": "#33658a", "vlmevalkit": "#f6ae2d"}
TITLES = {
    "easy_vqa": "single images",
    "easy_vqa_scenes": "scenes of four",
    "easy_vqa_describe": "descriptions",
}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG with one panel for each benchmark and metric.

    Parameters
    ----------
    table : DataFrame
        As `read_results` gives it.
    path : Path
        Appears whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(zip(table["benchmark"], table["metric"], strict=True)))
    panels.sort(key=lambda panel: ([*TITLES].index(panel[0]) if panel[0] in TITLES else 9, panel[1]))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.2 + 3.6 * len(panels), 4.2), squeeze=False)
    for axis, (benchmark, metric) in zip(axes[0], panels, strict=True):
        rows = table[(table["benchmark"] == benchmark) & (table["metric"] == metric)]
        modes = list(dict.fromkeys(rows["mode"]))
        harnesses = [name for name in HARNESS_COLORS if name in set(rows["harness"])]
        width = 0.8 / max(1, len(harnesses))
        for offset, harness in enumerate(harnesses):
            values = rows[rows["harness"] == harness].set_index("mode")["value"]
            places = [index + (offset - (len(harnesses) - 1) / 2) * width for index in range(len(modes))]
            heights = [float(values.get(mode, 0.0)) for mode in modes]
            bars = axis.bar(places, heights, width * 0.94, label=harness, color=HARNESS_COLORS[harness])
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1, rotation=90)
        unit = unit_of(metric)
        axis.set_title(
            f"{TITLES.get(benchmark, benchmark)}: {metric}" + (f" [{unit}]" if unit else ""), fontsize=10
        )
        axis.set_xticks(range(len(modes)), modes, rotation=35, ha="right", fontsize=8)
        axis.margins(y=0.16)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="lower right", ncols=len(names))
    figure.suptitle(
        "Dynamic-LLaVA on easy-VQA: what is kept of the image, chosen by the predictor or at random",
        fontsize=11,
    )
    figure.tight_layout()
    write_figure(path, figure)
