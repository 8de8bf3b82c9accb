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
    "METRICS",
    "PERCENT",
    "UNITS",
    "VLMEVALKIT",
    "Benchmark",
    "Metric",
    "Place",
    "find_benchmark",
]


def _by_task() -> dict[tuple[str, str], list[tuple[Benchmark, Metric, str, float]]]:
    found: dict[tuple[str, str], list[tuple[Benchmark, Metric, str, float]]] = {}
    for benchmark in BENCHMARKS:
        for metric in benchmark.metrics:
            for harness in HARNESSES:
                if place := metric.place(harness):
                    row = (benchmark, metric, place.key, place.factor)
                    found.setdefault((harness, place.task), []).append(row)
    return found


# What a harness's task or dataset reports, by (harness, task): benchmark, metric, its key, factor to our unit.
METRICS = _by_task()
UNITS = {metric.name: metric.unit for benchmark in reversed(BENCHMARKS) for metric in benchmark.metrics}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of our name, of a harness's task, or of a harness's dataset.

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
