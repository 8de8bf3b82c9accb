"""The paper's Tables 4 and 14 with this machine's figures beside its A100's."""

from __future__ import annotations

import csv
from importlib.resources import files
from itertools import pairwise
from typing import Any

METHODS = {
    "full": "LLaVA-1.5",
    "image_text": "Dynamic-LLaVA_I|T",
    "fastv": "FastV(k=3,r=0.75)",
}  # ours -> the paper's


def paper_figures() -> dict[tuple[str, str, str], float]:
    """(table, method, metric) -> value; seconds, milliseconds or GiB as the metric's name says."""
    text = (files("dynllava_plugin.bench") / "paper_efficiency.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {
        (row["table"], row["method"], row["metric"]): float(row["value"]) for row in csv.DictReader(lines)
    }


def views(rows: list[dict[str, Any]]) -> str:
    """Markdown: the layout of Tables 4 and 14 for every shape and device in `rows`, without columns that nothing was measured for."""
    parts = []
    for about in dict.fromkeys((row["shape"], row["device"], row["dtype"]) for row in rows):
        here = [row for row in rows if (row["shape"], row["device"], row["dtype"]) == about]
        batch = max((row["batch"] for row in here), default=1)
        title = "{} on {}, {}".format(*about)
        parts.append(_table(f"As Table 4: {title}, batch {batch}", "4", _table_4(here, batch)))
        parts.append(_table(f"As Table 14: {title}, batch 1", "14", _table_14(here)))
    return "\n".join(part for part in parts if part)


def _table_4(rows: list[dict[str, Any]], batch: int) -> list[tuple[str, str, dict[str, float | None]]]:
    columns = [("prefill [s]", "prefill_s", _by_mode(rows, "prefill", batch, 0, "median_s"))]
    for name, length in (("1K", 1000), ("2K", 2000), ("4K", 4000)):
        columns.append(
            (f"{name} tokens without cache [s]", f"no_cache_{name}_s", _uncached_total(rows, batch, length))
        )
    for name, length in (("1K", 1000), ("2K", 2000), ("4K", 4000)):
        columns.append((f"memory at {name} [GiB]", f"cache_{name}_gib", _memory(rows, batch, length)))
    return columns


def _table_14(rows: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, float | None]]]:
    prefill = _by_mode(rows, "prefill", 1, 0, "median_s")
    lengths = [row["length"] for row in rows if row["phase"] == "decode" and row["batch"] == 1]
    middle = sorted(lengths)[len(lengths) // 2] if lengths else 0
    step = _by_mode(rows, "decode", 1, middle, "median_s")
    return [
        ("prefill [ms]", "prefill_ms", {mode: _times(value, 1e3) for mode, value in prefill.items()}),
        (f"decode, per token at {middle} [ms]", "decode_ms_per_token", {m: _times(v, 1e3) for m, v in step.items()}),
    ]  # fmt: skip


def _table(title: str, table: str, columns: list[tuple[str, str, dict[str, float | None]]]) -> str:
    paper = paper_figures()
    columns = [column for column in columns if column[2]]
    if not columns:
        return ""
    modes = [mode for mode in METHODS if any(mode in ours for _, _, ours in columns)]
    lines = [
        f"### {title}",
        "",
        "| mode | " + " | ".join(f"{c[0]} | paper, A100, 13B" for c in columns) + " |",
    ]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for mode in modes:
        cells = []
        for _, metric, ours in columns:
            theirs = {name: paper.get((table, METHODS[name], metric)) for name in ("full", mode)}
            cells += [
                _cell(ours.get("full"), ours.get(mode), mode),
                _cell(theirs["full"], theirs[mode], mode),
            ]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(full: float | None, value: float | None, mode: str) -> str:
    if value is None:
        return "-"
    ratio = f" ({full / value:.2f}x)" if full and mode != "full" else ""
    return f"{value:.4g}{ratio}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _by_mode(
    rows: list[dict[str, Any]], phase: str, batch: int, length: int, field: str
) -> dict[str, float | None]:
    return {
        row["mode"]: row[field]
        for row in rows
        if row["phase"] == phase and row["batch"] == batch and row["length"] == length
        and row.get("path") == "eager" and row.get(field) is not None
    }  # fmt: skip


def _uncached_total(rows: list[dict[str, Any]], batch: int, tokens: int) -> dict[str, float | None]:
    """Seconds of `tokens` steps without cache: the trapezoidal sum over the measured lengths, which must reach from 0 to `tokens`."""
    totals: dict[str, float | None] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = sorted(
            (row["length"], row["median_s"])
            for row in rows
            if row["phase"] == "nocache" and row["mode"] == mode and row["batch"] == batch and row["length"] <= tokens
        )  # fmt: skip
        if len(points) > 1 and points[0][0] == 0 and points[-1][0] == tokens:
            totals[mode] = sum((b - a) * (s + t) / 2 for (a, s), (b, t) in pairwise(points))
    return totals


def _memory(rows: list[dict[str, Any]], batch: int, length: int) -> dict[str, float | None]:
    """GiB at the peak, weights included; on the CPU, where no peak is known, weights and cache."""
    found: dict[str, float | None] = {}
    for row in rows:
        if row["phase"] == "memory" and row["batch"] == batch and row["length"] == length and row.get("fits"):
            above = row["peak_bytes"] if row.get("peak_bytes") is not None else row["cache_bytes"]
            found[row["mode"]] = (above + row["weight_bytes"]) / 2**30
    return found
