"""Rows as a folder: table.csv, table.md, plots, and the machine they were measured on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from dynllava_plugin.bench.harness_report import write_harness_report
from dynllava_plugin.bench.paper import views
from dynllava_plugin.bench.plots import draw
from dynllava_plugin.bench.rows import COLUMNS, machine_file, read_rows
from dynllava_plugin.bench.train_report import write_training_report
from dynllava_plugin.errors import UserError
from dynllava_plugin.files import write_json, write_text

# phase -> (title, columns of its table)
RATIOS = ("speedup", "ideal_speedup", "of_ideal")
SECTIONS = {
    "prefill": ("Prefill", ("median_s", *RATIOS, "tflops_paper", "tflops_exact")),
    "nocache": ("Decoding without cache, one step", ("median_s", *RATIOS, "tflops_exact")),
    "decode": ("Decoding with cache, one step", (
        "path", "median_s", "tokens_per_s", *RATIOS, "tflops_exact", "kept_share", "cache_bytes", "needed_bytes",
    )),
    "batching": ("Batches of mixed prompt lengths against a batch of one (speed-up in tokens/s)", (
        "path", "median_s", "tokens_per_s", "speedup",
    )),
    "score": ("Scoring an answer in one pass against token by token", (
        "median_s", "baseline_s", "speedup", "max_difference",
    )),
    "memory": ("Memory", (
        "cache_bytes", "resident_bytes", "needed_bytes", "growth_bytes", "peak_bytes", "weight_bytes", "fits",
    )),
    "serve": ("Serving over HTTP: as many clients at once as `batch` says, answers of `at` tokens", (
        "requests_per_s", "speedup", "first_token_s", "first_token_speedup", "requests",
    )),
    "load": ("Loading a checkpoint against reading it with safetensors alone", (
        "path", "median_s", "baseline_s", "speedup", "peak_bytes", "needed_bytes", "weight_bytes",
    )),
}  # fmt: skip
HEADINGS = {
    "requests_per_s": "requests/s", "first_token_s": "ms to the first token", "first_token_speedup": "speed-up to the first",
    "median_s": "ms", "baseline_s": "baseline ms", "tokens_per_s": "tokens/s", "speedup": "speed-up", "ideal_speedup": "ideal",
    "of_ideal": "measured/ideal", "tflops_paper": "TFLOPs (Eq. 13)", "tflops_exact": "TFLOPs (exact)",
    "kept_share": "text kept", "max_difference": "largest difference", "cache_bytes": "cache MiB", "resident_bytes": "in memory MiB",
    "needed_bytes": "needed MiB",
    "growth_bytes": "growth step MiB", "peak_bytes": "peak above weights MiB", "weight_bytes": "weights MiB",
}  # fmt: skip


def report(paths: list[Path], folder: Path) -> None:
    """One report over files of rows, each with its machine's description beside it; `bench train`'s have one of their own.

    Raises
    ------
    UserError
        A file that isn't there or holds something else.
    """
    rows = [row for path in paths for row in read_rows(path, ("phase", "batch"))]
    machines = _machines(paths)
    if not rows:
        raise UserError(f"{paths[0]}: no rows in it; measure something first")
    if all("harness" in row for row in rows):
        write_harness_report(rows, machines, folder)
        return
    if all("implementation" in row for row in rows):
        write_training_report(rows, machines, folder)
        return
    if any(name not in row for row in rows for name in ("mode", "length")):
        raise UserError(
            "report: rows of `bench train`, `bench harness` and other phases don't go into one table; name them apart"
        )
    table = pd.DataFrame(rows, columns=[name for name in COLUMNS if any(name in row for row in rows)])
    write_text(folder / "table.csv", table.to_csv(index=False))
    write_text(folder / "table.md", markdown(rows))
    write_json(folder / "machine.json", machines)
    try:
        draw(rows, folder)
    except ImportError:
        print("no plots: matplotlib isn't installed", file=sys.stderr)


def _machines(paths: list[Path]) -> dict[str, Any]:
    """Device -> its description; a second machine with a device of that name goes by its file's name, too."""
    found: dict[str, Any] = {}
    for path in paths:
        device = next((row["device"] for row in read_rows(path, ("device",))), "cpu")
        described = machine_file(path)
        facts = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else None
        found[device if found.get(device, facts) == facts else f"{device} ({path.stem})"] = facts
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table a phase and shape, then the paper's layouts."""
    parts = [
        "# Efficiency",
        "",
        "Medians of one interleaved run; random weights. ms a call, a step of decoding is one token a sample.",
        "",
    ]
    for shape, device, dtype in dict.fromkeys((row["shape"], row["device"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["shape"], row["device"], row["dtype"]) == (shape, device, dtype)]
        parts += [f"## {shape}, {device}, {dtype}", ""]
        for phase, (title, columns) in SECTIONS.items():
            found = [row for row in here if row["phase"] == phase]
            if found:
                parts += [f"### {title}", "", _table(found, columns), ""]
    return "\n".join([*parts, "## Beside the paper", "", views(rows)])


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    columns = tuple(name for name in columns if any(row.get(name) is not None for row in rows))
    rows = sorted(rows, key=lambda row: (row["batch"], row["length"], row.get("path") or ""))
    head = ["batch", "at", "mode", *(HEADINGS.get(name, name) for name in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            str(row["batch"]),
            str(row["length"]),
            row["mode"],
            *(_cell(name, row.get(name)) for name in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{value / 2**20:.1f}"
    if name in ("median_s", "baseline_s", "first_token_s"):
        return f"{value * 1e3:.2f}"
    if name in ("speedup", "ideal_speedup", "of_ideal", "first_token_speedup"):
        return f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
