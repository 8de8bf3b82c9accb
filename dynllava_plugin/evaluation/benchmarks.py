"""The registry of benchmarks: what is looked up in it, by our names and by the harnesses'.

Adapters, suite, tables and docs read this registry and nothing else, so that a benchmark is one row of it.
"""

from __future__ import annotations

from dynllava_plugin.errors import UserError, nearest
from dynllava_plugin.evaluation.benchmark import (
    HARNESSES,
    LMMS_EVAL,
    PERCENT,
    VLMEVALKIT,
    Benchmark,
    Metric,
    Place,
)
from dynllava_plugin.evaluation.benchmark_list import BENCHMARKS

__all__ = [
    "BENCHMARKS",
    "HARNESSES",
    "LMMS_EVAL",
    "PERCENT",
    "VLMEVALKIT",
    "Benchmark",
    "Metric",
    "Place",
    "find_benchmark",
    "find_metrics",
    "unit_of",
]


def find_metrics(harness: str, task: str) -> list[tuple[Benchmark, Metric, str, float]]:
    """What a harness's task or dataset reports: (benchmark, metric, its key, factor to our unit)."""
    found = []
    for benchmark in BENCHMARKS:
        for metric in benchmark.metrics:
            place = metric.place(harness)
            if place is not None and place.task == task:
                found.append((benchmark, metric, place.key, place.factor))
    return found


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of our name, of a harness's task, or of a harness's dataset.

    Raises
    ------
    UserError
        Naming the nearest ones.
    """
    names: dict[str, Benchmark] = {}
    for benchmark in BENCHMARKS:
        for known in (*benchmark.tasks(LMMS_EVAL), *benchmark.tasks(VLMEVALKIT)):
            names.setdefault(known.lower(), benchmark)
    names |= {benchmark.name.lower(): benchmark for benchmark in BENCHMARKS}
    if name.lower() in names:
        return names[name.lower()]
    near = nearest(name, (item.name for item in BENCHMARKS), "`dynllava benchmarks` lists them")
    raise UserError(f"{name}: no such benchmark; {near}")


def unit_of(metric: str) -> str:
    """The unit of a metric of ours."""
    for benchmark in BENCHMARKS:
        for item in benchmark.metrics:
            if item.name == metric:
                return item.unit
    return ""
