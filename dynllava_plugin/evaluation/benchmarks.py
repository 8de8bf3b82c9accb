"""The registry of benchmarks, `benchmarks.csv`: everything that adapters, suites, tables and docs know of one stands there.

A row is a figure. What is said of the benchmark itself stands in its first row, whose figure is the headline.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

from dynllava_plugin.errors import UserError, nearest

PERCENT = "%"
LMMS_EVAL, VLMEVALKIT = "lmms-eval", "vlmevalkit"
HARNESSES = (LMMS_EVAL, VLMEVALKIT)
BUILT = "build-lvis"  # the command that makes the data


class Place(NamedTuple):
    """Where a harness reports a figure: lmms-eval's task or VLMEvalKit's dataset, and the key in its results file or `status.json`.

    `factor` brings the harness's figure to the metric's unit.
    """

    task: str
    key: str
    factor: float = 1


@dataclass(frozen=True)
class Metric:
    """One figure of a benchmark, by our name.

    Attributes
    ----------
    lmms_eval, vlmevalkit : Place or None
        None where the harness doesn't report it.
    unit : str
        ``%``, or empty for perplexity and scores.
    paper : str
        The same figure's name in the paper's tables (`paper_results.csv`); empty where the paper has none.
    paper_factor : float
        Brings the paper's figure to `unit`.
    """

    name: str
    lmms_eval: Place | None
    vlmevalkit: Place | None
    unit: str
    higher_is_better: bool
    paper: str
    paper_factor: float

    def place(self, harness: str) -> Place | None:
        """Return where `harness` reports it."""
        return self.lmms_eval if harness == LMMS_EVAL else self.vlmevalkit


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its metrics, the first one the headline.

    Attributes
    ----------
    split : str
        What is evaluated.
    judge : bool
        Whether a harness needs a judge model to score it.
    server : bool
        Whether only a server has the answers: a run ends with a submission file.
    data : str
        Where data of our own comes from: `BUILT`, or the extra of this package that has it.
    repo : str
        The hub repository of lmms-eval's task; empty for our own data.
    paper_table : str
        The paper's table that has it: ``1``, ``3``, ``12``, or empty.
    questions : int
        About how many lmms-eval asks; 0: not said.
    note : str
        Where a figure isn't like for like with the paper's or between the harnesses.
    """

    name: str
    metrics: tuple[Metric, ...]
    split: str
    judge: bool
    server: bool
    data: str
    repo: str
    paper_table: str
    questions: int
    note: str

    @property
    def needs(self) -> str:
        """Return what its user has to bring, in Markdown; empty: nothing."""
        if self.judge or self.server:
            return "a judge" if self.judge else "its server"
        return self.data and (f"`{BUILT}`" if self.data == BUILT else f"`{self.data}` extra")

    def tasks(self, harness: str) -> list[str]:
        """Return what the harness is asked to run; empty where it doesn't have the benchmark."""
        places = (metric.place(harness) for metric in self.metrics)
        return list(dict.fromkeys(place.task for place in places if place))


def _read() -> tuple[Benchmark, ...]:
    with (files(__package__) / "benchmarks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == name]
        first, needs = mine[0], mine[0]["needs"]
        found.append(
            Benchmark(
                name,
                metrics=tuple(_metric(row) for row in mine),
                split=first["split"],
                judge=needs == "judge",
                server=needs == "server",
                data="" if first["repo"] else needs,
                repo=first["repo"],
                paper_table=first["paper table"],
                questions=int(first["questions"] or 0),
                note=first["note"],
            )
        )
    return tuple(found)


def _metric(row: dict[str, str]) -> Metric:
    return Metric(
        name=row["metric"],
        lmms_eval=_place(row, LMMS_EVAL),
        vlmevalkit=_place(row, VLMEVALKIT),
        unit=row["unit"],
        higher_is_better=not row["lower is better"],
        paper=row["paper"],
        paper_factor=float(row["paper factor"] or 1),
    )


def _place(row: dict[str, str], harness: str) -> Place | None:
    factor = float(row[f"{harness} factor"] or 1)
    return Place(row[harness], row[f"{harness} key"], factor) if row[harness] else None


def _by_task() -> dict[tuple[str, str], list[tuple[Benchmark, Metric, str, float]]]:
    found: dict[tuple[str, str], list[tuple[Benchmark, Metric, str, float]]] = {}
    for benchmark in BENCHMARKS:
        for metric in benchmark.metrics:
            for harness in HARNESSES:
                if place := metric.place(harness):
                    row = (benchmark, metric, place.key, place.factor)
                    found.setdefault((harness, place.task), []).append(row)
    return found


BENCHMARKS = _read()
# What a harness's task or dataset reports, by (harness, task): benchmark, metric, its key, factor to our unit.
METRICS = _by_task()
UNITS = {metric.name: metric.unit for benchmark in reversed(BENCHMARKS) for metric in benchmark.metrics}


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of our name, of a harness's task, or of a harness's dataset; `UserError` names the nearest ones."""
    names: dict[str, Benchmark] = {}
    for benchmark in BENCHMARKS:
        for known in (*benchmark.tasks(LMMS_EVAL), *benchmark.tasks(VLMEVALKIT)):
            names.setdefault(known.lower(), benchmark)
    names |= {benchmark.name.lower(): benchmark for benchmark in BENCHMARKS}
    if name.lower() in names:
        return names[name.lower()]
    near = nearest(name, (item.name for item in BENCHMARKS), "`dynllava benchmarks` lists them")
    raise UserError(f"{name}: no such benchmark; {near}")
