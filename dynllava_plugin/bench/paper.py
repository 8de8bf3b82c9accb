"""The paper's Tables 4 and 14 with this machine's figures beside its A100's."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

# Ours -> the paper's.
METHODS = {"full": "LLaVA-1.5", "image_text": "Dynamic-LLaVA_I|T", "fastv": "FastV(k=3,r=0.75)"}
PHASES = ("prefill", "decode", "nocache", "memory")
LENGTHS = {"1K": 1000, "2K": 2000, "4K": 4000}
Columns = dict[tuple[str, str], pd.Series]  # (heading, the paper's metric) -> ours by mode


def paper_figures() -> dict[tuple[str, str, str], float]:
    """Return (table, method, metric) -> value; seconds, milliseconds or GiB as the metric's name says."""
    with (files("dynllava_plugin.bench") / "paper_efficiency.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, comment="#", dtype={"table": str})
    return {(row.table, row.method, row.metric): row.value for row in table.itertuples()}  # type: ignore[misc]


def beside_the_paper(rows: list[dict[str, Any]]) -> list[str]:
    """Return Markdown, the layout of Tables 4 and 14 for every shape and device, without columns that nothing was measured for."""
    table = pd.DataFrame([row for row in rows if row["phase"] in PHASES])
    if table.empty:
        return []
    table = table.reindex(columns=table.columns.union(["path", "median_s", "fits"]))
    found = []
    for about, here in table.groupby(["shape", "device", "dtype"], sort=False):
        what, batch = "{} on {}, {}".format(*about), int(here["batch"].max())
        largest, single = (_table_4(here[here["batch"] == batch]), _table_14(here[here["batch"] == 1]))
        found.append(_table(f"As Table 4: {what}, batch {batch}", "4", largest))
        found.append(_table(f"As Table 14: {what}, batch 1", "14", single))
    found = [part for part in found if part]
    return ["## Beside the paper", *found] if found else []


def _table_4(rows: pd.DataFrame) -> Columns:
    columns = {("prefill [s]", "prefill_s"): _times(rows, "prefill", 0)}
    for name, tokens in LENGTHS.items():
        columns[f"{name} tokens without cache [s]", f"no_cache_{name}_s"] = _uncached(rows, tokens)
    for name, tokens in LENGTHS.items():
        columns[f"memory at {name} [GiB]", f"cache_{name}_gib"] = _memory(rows, tokens)
    return columns


def _table_14(rows: pd.DataFrame) -> Columns:
    lengths = sorted(rows[rows["phase"] == "decode"]["length"])
    middle = lengths[len(lengths) // 2] if lengths else 0
    return {
        ("prefill [ms]", "prefill_ms"): 1e3 * _times(rows, "prefill", 0),
        (f"decode, per token at {middle} [ms]", "decode_ms_per_token"): 1e3 * _times(rows, "decode", middle),
    }


def _times(rows: pd.DataFrame, phase: str, length: int) -> pd.Series:
    here = rows[(rows["phase"] == phase) & (rows["length"] == length) & (rows["path"] == "eager")]
    return here.set_index("mode")["median_s"]


def _uncached(rows: pd.DataFrame, tokens: int) -> pd.Series:
    """Seconds of `tokens` steps without cache: the trapezoidal sum over the measured lengths, which must reach from 0 to `tokens`."""
    here = rows[(rows["phase"] == "nocache") & (rows["length"] <= tokens)]
    if not {0, tokens} <= set(here["length"]):
        return pd.Series(dtype=float)
    times = here.pivot(index="length", columns="mode", values="median_s")
    steps = np.diff(times.index)[:, None] * (times.to_numpy()[1:] + times.to_numpy()[:-1]) / 2
    return pd.Series(steps.sum(0), times.columns)


def _memory(rows: pd.DataFrame, length: int) -> pd.Series:
    """GiB at the peak, weights included; on the CPU, where no peak is known, weights and cache."""
    here = rows[(rows["phase"] == "memory") & (rows["length"] == length)]
    here = here[here["fits"].eq(True)].set_index("mode") if len(here) else here
    if here.empty:
        return pd.Series(dtype=float)
    return (pd.to_numeric(here["peak_bytes"]).fillna(here["cache_bytes"]) + here["weight_bytes"]) / 2**30


def _table(title: str, number: str, columns: Columns) -> str:
    paper, lines = paper_figures(), []
    columns = {about: ours for about, ours in columns.items() if len(ours)}
    for mode in METHODS:
        if any(mode in ours for ours in columns.values()):
            cells = {"mode": mode}
            for (name, metric), ours in columns.items():
                theirs = {key: paper.get((number, METHODS[key], metric)) for key in ("full", mode)}
                cells[name] = _cell(ours.get("full"), ours.get(mode), mode)
                cells[f"{name}: paper, A100, 13B"] = _cell(theirs["full"], theirs[mode], mode)
            lines.append(cells)
    return (
        f"### {title}\n\n{pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)}"
        if lines
        else ""
    )


def _cell(full: Any, value: Any, mode: str) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.4g}" + (f" ({full / value:.2f}x)" if full and mode != "full" else "")
