"""Time and memory against generated tokens, as in the paper's Figure 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynllava_plugin.bench.modes import MODES
from dynllava_plugin.files import write_figure

COLORS = ("#33658a", "#f6ae2d", "#c1292e", "#55a630", "#7b2d8b", "#8d5524", "#2a9d8f", "#6c757d")
PANELS = (
    ("decode", "median_s", 1e3, "one step with cache [ms]"),
    ("nocache", "median_s", 1.0, "one step without cache [s]"),
    ("memory", "cache_bytes", 1 / 2**20, "cache allocated [MiB]"),
    ("memory", "peak_bytes", 1 / 2**30, "peak above weights [GiB]"),
)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """One PNG for every shape, device and batch size that has figures at two lengths or more."""
    groups = dict.fromkeys(
        (row["shape"], row["device"], row["dtype"], row["batch"]) for row in rows if row["phase"] != "load"
    )
    for shape, device, dtype, batch in groups:
        here = [
            r
            for r in rows
            if (r["shape"], r["device"], r["dtype"], r["batch"]) == (shape, device, dtype, batch)
        ]
        panels = [(panel, curves) for panel in PANELS if (curves := _curves(here, panel[0], panel[1]))]
        if panels:
            name = f"{shape}_{device}_{dtype}_batch{batch}.png".replace(" ", "_")
            _draw(panels, f"{shape}, batch {batch}, {device}, {dtype}", folder / name)


def _curves(rows: list[dict[str, Any]], phase: str, field: str) -> dict[str, list[tuple[int, float]]]:
    """mode -> (generated tokens, value) points, for modes with two or more."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for mode in dict.fromkeys([*MODES, *(row["mode"] for row in rows)]):
        points = sorted(
            (row["length"], row[field])
            for row in rows
            if row["phase"] == phase and row["mode"] == mode and row.get("path") == "eager" and row.get(field) is not None
        )  # fmt: skip
        if len(points) > 1:
            curves[mode] = points
    return curves


def _draw(panels: list[Any], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    order = list(dict.fromkeys(mode for _, curves in panels for mode in curves))
    for axis, ((_, _, factor, label), curves) in zip(axes[0], panels, strict=True):
        for mode, points in curves.items():
            color = COLORS[order.index(mode) % len(COLORS)]
            axis.plot(
                *zip(*[(x, y * factor) for x, y in points], strict=True),
                "o-",
                color=color,
                label=MODES[mode].title if mode in MODES else mode,
            )
        axis.set_xlabel("generated tokens")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    write_figure(path, figure, dpi=120)
