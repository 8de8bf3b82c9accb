"""The order of a table's rows: full context first, controls last, benchmarks as the registry lists them."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from dynllava_plugin.evaluation.benchmarks import BENCHMARKS

_MODES = ("full", "image", "image_text", "random")


def in_order(table: pd.DataFrame, first: tuple[str, ...] = ("checkpoint", "mode")) -> pd.DataFrame:
    """Sorted by the columns `first`, then by the others that name a row."""
    benchmarks = {benchmark.name: rank for rank, benchmark in enumerate(BENCHMARKS)}
    metrics: dict[str, int] = {}
    for benchmark in BENCHMARKS:
        for metric in benchmark.metrics:
            metrics.setdefault(metric.name, len(metrics))
    ranks: dict[str, Any] = {
        "mode": _mode_rank,
        "benchmark": lambda name: benchmarks.get(name, len(benchmarks)),
        "metric": lambda name: metrics.get(name, len(metrics)),
    }

    def key(column: pd.Series) -> pd.Series:
        rank = ranks.get(str(column.name))
        return column if rank is None else column.map(rank)

    order = list(dict.fromkeys([*first, "checkpoint", "mode", "benchmark", "metric", "harness"]))
    return table.sort_values(order, key=key)


def _mode_rank(mode: str) -> str:
    name = re.split("@|, ", mode)[0]
    rank = _MODES.index(name) if name in _MODES else len(_MODES)
    return f"{'@' in mode:d}{rank}{mode}"  # other keep rates follow, method beside control
