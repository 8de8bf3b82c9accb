"""The paper's Tables 4 and 14 with this machine's figures beside its A100's."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

# Ours -> the paper's.
METHODS = {"full": "LLaVA-1.5", "image_text": "Dynamic-LLaVA_I|T", "fastv": "FastV(k=3,r=0.75)"}
Column = tuple[str, str, dict[str, float]]  # heading, the paper's metric, mode -> ours


def paper_figures() -> dict[tuple[str, str, str], float]:
    """Return (table, method, metric) -> value; seconds, milliseconds or GiB as the metric's name says."""
    with (files("dynllava_plugin.bench") / "paper_efficiency.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, comment="#", dtype={"table": str})
    return {(row.table, row.method, row.metric): row.value for row in table.itertuples()}  # type: ignore[misc]


def beside_the_paper(rows: list[dict[str, Any]]) -> list[str]:
    """Return Markdown, the layout of Tables 4 and 14 for every shape and device, without columns that nothing was measured for."""
    found = []
    table = pd.DataFrame([row for row in rows if "mode" in row])
    if not table.empty:
        if "fits" not in table:
            table["fits"] = None
        for (shape, device, dtype), here in table.groupby(["shape", "device", "dtype"], sort=False):
            what, batch = f"{shape} on {device}, {dtype}", int(here["batch"].max())
            found.append(_table(f"As Table 4: {what}, batch {batch}", "4", _table_4(here, batch)))
            found.append(_table(f"As Table 14: {what}, batch 1", "14", _table_14(here[here["batch"] == 1])))
    found = [part for part in found if part]
    return ["## Beside the paper", *found] if found else []


def _table_4(rows: pd.DataFrame, batch: int) -> list[Column]:
    rows = rows[rows["batch"] == batch]
    lengths = {"1K": 1000, "2K": 2000, "4K": 4000}
    columns: list[Column] = [("prefill [s]", "prefill_s", _by_mode(rows, "prefill", 0))]
    for name, length in lengths.items():
        columns.append((f"{name} tokens without cache [s]", f"no_cache_{name}_s", _uncached(rows, length)))
    for name, length in lengths.items():
        columns.append((f"memory at {name} [GiB]", f"cache_{name}_gib", _memory(rows, length)))
    return columns


def _table_14(rows: pd.DataFrame) -> list[Column]:
    lengths = sorted(rows[rows["phase"] == "decode"]["length"])
    middle = lengths[len(lengths) // 2] if lengths else 0
    return [
        ("prefill [ms]", "prefill_ms", _by_mode(rows, "prefill", 0, 1e3)),
        (f"decode, per token at {middle} [ms]", "decode_ms_per_token", _by_mode(rows, "decode", middle, 1e3)),
    ]


def _by_mode(rows: pd.DataFrame, phase: str, length: int, factor: float = 1.0) -> dict[str, float]:
    here = rows[(rows["phase"] == phase) & (rows["length"] == length) & (rows["path"] == "eager")]
    return {row["mode"]: row["median_s"] * factor for row in here.to_dict("records")}


def _uncached(rows: pd.DataFrame, tokens: int) -> dict[str, float]:
    """Seconds of `tokens` steps without cache: the trapezoidal sum over the measured lengths, which must reach from 0 to `tokens`."""
    totals = {}
    here = rows[(rows["phase"] == "nocache") & (rows["length"] <= tokens)].sort_values("length")
    for mode, points in here.groupby("mode"):
        lengths, times = points["length"].to_numpy(float), points["median_s"].to_numpy(float)
        if len(lengths) > 1 and lengths[0] == 0 and lengths[-1] == tokens:
            totals[str(mode)] = float(np.sum(np.diff(lengths) * (times[1:] + times[:-1]) / 2))
    return totals


def _memory(rows: pd.DataFrame, length: int) -> dict[str, float]:
    """GiB at the peak, weights included; on the CPU, where no peak is known, weights and cache."""
    here = rows[(rows["phase"] == "memory") & (rows["length"] == length) & rows["fits"].eq(True)]
    if here.empty:
        return {}
    above = pd.to_numeric(here["peak_bytes"]).fillna(here["cache_bytes"])
    return dict(zip(here["mode"], (above + here["weight_bytes"]) / 2**30, strict=True))


def _table(title: str, number: str, columns: list[Column]) -> str:
    paper, lines = paper_figures(), []
    columns = [column for column in columns if column[2]]
    for mode in METHODS:
        if any(mode in ours for _, _, ours in columns):
            cells = {"mode": mode}
            for name, metric, ours in columns:
                theirs = {key: paper.get((number, METHODS[key], metric)) for key in ("full", mode)}
                cells[name] = _cell(ours.get("full"), ours.get(mode), mode)
                cells[f"{name}: paper, A100, 13B"] = _cell(theirs["full"], theirs[mode], mode)
            lines.append(cells)
    return (
        f"### {title}\n\n{pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)}"
        if lines
        else ""
    )


def _cell(full: float | None, value: float | None, mode: str) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" ({full / value:.2f}x)" if full and mode != "full" else "")
