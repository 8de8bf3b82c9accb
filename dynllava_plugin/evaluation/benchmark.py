"""What a benchmark is: its metrics, and where each harness says which figure of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PERCENT = "%"
LMMS_EVAL, VLMEVALKIT = "lmms-eval", "vlmevalkit"
HARNESSES = (LMMS_EVAL, VLMEVALKIT)


class Place(NamedTuple):
    """Where a harness reports a figure.

    Attributes
    ----------
    task : str
        lmms-eval's task or VLMEvalKit's dataset.
    key : str
        In lmms-eval's results file, or in VLMEvalKit's `status.json`.
    factor : float
        Brings the harness's figure to the metric's unit.
    """

    task: str
    key: str
    factor: float = 1


@dataclass(frozen=True)
class Metric:
    """One figure of a benchmark.

    Attributes
    ----------
    name : str
        Our name.
    lmms_eval, vlmevalkit : Place or None
        None where the harness doesn't report it.
    unit : str
        ``%``, or empty for perplexity and scores.
    higher_is_better : bool
        What `dynllava benchmarks` marks where it isn't so.
    paper : str
        The same figure's name in the paper's tables (`paper_results.csv`); empty where the paper has none.
    paper_factor : float
        Brings the paper's figure to `unit`.
    """

    name: str
    lmms_eval: Place | None = None
    vlmevalkit: Place | None = None
    unit: str = PERCENT
    higher_is_better: bool = True
    paper: str = ""
    paper_factor: float = 1

    def place(self, harness: str) -> Place | None:
        """Return where `harness` reports it."""
        return self.lmms_eval if harness == LMMS_EVAL else self.vlmevalkit


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its metrics, the first one the headline.

    Attributes
    ----------
    name : str
    metrics : tuple of Metric
    split : str
        What is evaluated.
    judge : bool
        Whether a harness needs a judge model to score it.
    server : bool
        Whether only a server has the answers: a run ends with a submission file.
    questions : int
        Of such a benchmark, whose size nobody expects who asked for the scores; 0: not said.
    repo : str
        The hub repository of lmms-eval's task; empty for our own data.
    extra : str
        The extra of this package that our own data comes with; empty where `dynllava build-lvis` makes it.
    paper_table : str
        The paper's table that has it: ``1``, ``3``, ``12``, or empty.
    note : str
        Where a figure isn't like for like with the paper's or between the harnesses.
    """

    name: str
    metrics: tuple[Metric, ...] = ()
    split: str = ""
    judge: bool = False
    server: bool = False
    questions: int = 0
    repo: str = ""
    extra: str = ""
    paper_table: str = ""
    note: str = ""

    @property
    def needs(self) -> str:
        """Return what its user has to bring beyond the harnesses, in Markdown; empty: nothing."""
        if self.judge or self.server:
            return "a judge" if self.judge else "its server"
        if self.repo:
            return ""
        return f"`{self.extra}` extra" if self.extra else "`build-lvis`"

    def tasks(self, harness: str) -> list[str]:
        """Return what the harness is asked to run; empty where it doesn't have the benchmark."""
        places = (metric.place(harness) for metric in self.metrics)
        return list(dict.fromkeys(place.task for place in places if place))
