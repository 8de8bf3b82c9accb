"""The comparison's tables: tidy, as the field prints it, and beside it what papers claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dynllava_plugin.compare.answers import Figure
from dynllava_plugin.compare.bootstrap import interval, resampled
from dynllava_plugin.compare.literature import MEAN
from dynllava_plugin.compare.subjects import FULL, Subject
from dynllava_plugin.evaluation.benchmarks import find_benchmark
from dynllava_plugin.evaluation.results.tables import decimals, frame_text, significant
from dynllava_plugin.policies.downsample import Downsample

COLUMNS = (
    "policy", "keep", "benchmark", "metric", "value", "n", "equivalent_tokens", "prefill_ms",
    "low", "high", "behind_full", "behind_low", "behind_high",
    "image_tokens", "kept_image_tokens", "kept_output_share", "prefill_gflops", "prefill_iqr_ms", "cache_kib",
    "tokens", "percent", "percent_low", "percent_high", "trainings", "lowest", "highest",
    "hard_n", "hard", "hard_low", "hard_high",
)  # fmt: skip
COSTS = ("equivalent_tokens", "prefill_ms", *COLUMNS[13:19])
PERCENT_OF_FULL = "percent of full"
Measured = Iterable[tuple[Subject, str, list[Figure], Mapping[str, Any]]]


def make_table(*trainings: Measured) -> pd.DataFrame:
    """Return one figure a row, and one of the benchmark `MEAN` for each policy and budget.

    Parameters
    ----------
    *trainings : iterable of (Subject, benchmark's name, figures, costs)
        What was measured of each checkpoint; `costs` fills the columns of its names.

    Returns
    -------
    DataFrame
        Columns `COLUMNS`. `low` and `high` are the 95% interval of `value`; `behind_full` is the figure of full context
        minus this one (or the reverse, where less is better) and `percent` this one in percent of it (or the reverse), with their
        paired intervals. NaN where the task's figure can't be resampled, or where full context has none. A subject that several
        checkpoints were asked under has their mean, beside that of full context in the same ones, with `lowest` and `highest`.
    """
    groups: dict[tuple[str, str, int], dict[Subject, dict[int, tuple[Figure, Mapping[str, Any]]]]] = {}
    for number, measured in enumerate(trainings):
        for subject, benchmark, figures, costs in measured:
            for figure in figures:
                group = groups.setdefault((benchmark, figure.metric, figure.n), {})
                group.setdefault(subject, {})[number] = figure, costs
    rows, shares = [], {}
    for (benchmark, metric, n), group in groups.items():
        higher, headline = _of_metric(benchmark, metric)
        wholes = next((found for subject, found in group.items() if subject.name == FULL), {})
        for subject, found in group.items():
            figure, costs = _mean_of([figure for figure, _ in found.values()]), next(iter(found.values()))[1]
            whole = _mean_of([wholes[key][0] for key in found]) if set(found) <= set(wholes) else None
            values = [one.value for one, _ in found.values()]
            row = {
                "policy": subject.name,
                "keep": subject.keep,
                "tokens": subject.tokens,
                "benchmark": benchmark,
            }
            row |= {"metric": metric, "value": figure.value, "n": n}
            row |= {"trainings": len(values), "lowest": min(values), "highest": max(values)}
            row |= _hard(subject, figure, group, benchmark)
            row |= {name: costs[name] for name in COSTS if costs.get(name) is not None}
            draws = np.array(figure.draws)
            row |= _named("", draws)
            if whole is not None:
                base, sign = np.array(whole.draws), 1 if higher else -1
                row["behind_full"] = sign * (whole.value - figure.value)
                paired = base.size == draws.size > 0
                row |= _named("behind_", sign * (base - draws) if paired else draws[:0])
                above, below = (figure.value, whole.value) if higher else (whole.value, figure.value)
                share = (
                    _percent(draws if higher else base, base if higher else draws) if paired else draws[:0]
                )
                row["percent"] = float(_percent(above, below))
                row |= _named("percent_", share)
                if headline:
                    shares[subject, benchmark] = row["percent"], share, row
            rows.append(row)
    table = pd.DataFrame(rows + _means(shares), columns=list(COLUMNS))
    return table.sort_values(
        ["benchmark", "metric", "keep", "tokens", "policy"], ascending=[True, True, False, False, True], na_position="first"
    ).reset_index(drop=True)  # fmt: skip


def _mean_of(figures: Sequence[Figure]) -> Figure:
    """Return the mean of one figure over trainings, draw by draw: all were asked the same questions."""
    value = float(np.mean([figure.value for figure in figures]))
    same = len({len(figure.draws) for figure in figures}) == 1
    draws = np.mean([figure.draws for figure in figures], axis=0).tolist() if same else []
    same = len({len(figure.scores) for figure in figures}) == 1
    scores = np.mean([figure.scores for figure in figures], axis=0).tolist() if same else []
    return Figure(figures[0].metric, value, figures[0].n, draws, scores)


def _hard(subject: Subject, figure: Figure, group: Mapping[Subject, Any], benchmark: str) -> dict[str, Any]:
    """Return a subject's figure on the questions that full context answers and downsampling at the same budget doesn't.

    Both in the first checkpoint (arXiv 2510.07143, VTC-Bench: a policy that isn't better there than pooling chooses nothing).
    """
    if subject.keep is None and subject.tokens is None:
        return {}
    budget = subject.keep, subject.tokens
    same = [one for one in group if (one.keep, one.tokens) == budget]
    pooled = [one for one in same if one.policy.partition(",")[0] == Downsample.name]
    whole = [one for one in group if one.name == FULL]
    if not (pooled and whole and 0 in group[pooled[0]] and 0 in group[whole[0]]):
        return {}
    above, below = (np.array(group[one][0][0].scores) for one in (whole[0], pooled[0]))
    if not above.size == below.size == len(figure.scores) > 0 or not set(above) | set(below) <= {0.0, 100.0}:
        return {}
    scores = np.array(figure.scores)[(above == 100) & (below == 0)].tolist()
    if not scores:
        return {"hard_n": 0}
    draws = resampled(scores, np.mean, f"{benchmark} hard")  # type: ignore[arg-type]
    found = {"hard_n": len(scores), "hard": float(np.mean(scores))}
    return found | _named("hard_", np.empty(0) if draws is None else draws)


def _of_metric(benchmark: str, metric: str) -> tuple[bool, bool]:
    """Return whether more is better, and whether it is the benchmark's first metric."""
    metrics = find_benchmark(benchmark).metrics
    return next(item.higher_is_better for item in metrics if item.name == metric), metric == metrics[0].name


def _percent(above: Any, below: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 100 * np.divide(above, below)
    return np.where(np.isfinite(share), share, np.nan)


def _named(prefix: str, draws: np.ndarray) -> dict[str, float]:
    low, high = interval(draws) if draws.size else (np.nan, np.nan)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _means(shares: Mapping[tuple[Subject, str], Any]) -> list[dict[Any, Any]]:
    """Return a row for each subject that was asked what full context was: the mean percentage over benchmarks."""
    wanted = {benchmark for subject, benchmark in shares if subject.name == FULL}
    rows = []
    for subject in dict.fromkeys(subject for subject, _ in shares):
        found = [shares[subject, name] for name in sorted(wanted) if (subject, name) in shares]
        if len(wanted) < 2 or len(found) < len(wanted):
            continue
        value = float(np.mean([percent for percent, _, _ in found]))
        all_drawn = all(draws.size for _, draws, _ in found)
        draws = np.mean([draws for _, draws, _ in found], axis=0) if all_drawn else np.empty(0)
        costs = pd.DataFrame([row for _, _, row in found]).reindex(columns=COSTS).mean().to_dict()
        row = {"policy": subject.name, "keep": subject.keep, "tokens": subject.tokens, **costs}
        row |= {"benchmark": MEAN, "metric": PERCENT_OF_FULL, "value": value, "percent": value}
        rows.append(row | _named("", draws) | _named("percent_", draws))
    return rows


def field_table(table: pd.DataFrame) -> str:
    """Return Markdown as papers print it: policies by budget, figures and their percentage of full context across, then costs.

    Intervals are those of the percentage, where there is one; of full context those of the figure. In square brackets the lowest
    and highest of several trainings.
    """
    numbers: dict[tuple[str, str], float] = {}
    for benchmark, metric, n in zip(table["benchmark"], table["metric"], table["n"], strict=True):
        numbers[benchmark, metric] = max(n, numbers.get((benchmark, metric), n))
    numbers.pop((MEAN, PERCENT_OF_FULL), None)
    averaged = MEAN in set(table["benchmark"])
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[Any, Any]]] = {}
    order = ["pruned", "keep", "tokens", "policy"]
    pruned = table.assign(pruned=table["policy"] != FULL)
    for row in pruned.sort_values(order, ascending=[True, False, False, True], na_position="first").to_dict(
        "records"
    ):
        subject = row["policy"], _budget(row["keep"], row["tokens"])
        groups.setdefault(subject, {})[row["benchmark"], row["metric"]] = row
    rows = []
    for (policy, budget), found in groups.items():
        cells = {"policy": policy, "budget": budget}
        cells |= {f"{' '.join(pair)} (n = {n:.0f})": _cell(found.get(pair)) for pair, n in numbers.items()}
        cells |= {"mean % of full": _cell(found.get((MEAN, PERCENT_OF_FULL)))} if averaged else {}
        if table["hard_n"].notna().any():
            hard = [f"{pair[0]} {_hard_cell(row)}" for pair, row in found.items() if row["hard_n"] > 0]
            cells["on hard questions"] = "; ".join(hard) or "-"
        for name, title in _COST_TITLES.items():
            if table[name].isna().all():
                continue
            values = {pair[0]: row[name] for pair, row in found.items() if not pd.isna(row[name])}
            values.pop(MEAN, None)
            cells[title] = significant(float(np.mean(list(values.values()))), 4) if values else "-"
        rows.append(cells)
    return frame_text(pd.DataFrame(rows), "markdown")


_COST_TITLES = {
    "equivalent_tokens": "equivalent tokens",
    "prefill_gflops": "prefill GFLOPs",
    "cache_kib": "cache KiB",
    "prefill_ms": "prefill ms",
}


def _hard_cell(row: Mapping[Any, Any]) -> str:
    return f"{row['hard']:.1f} ({row['hard_low']:.1f} to {row['hard_high']:.1f}) of {row['hard_n']:.0f}"


def _budget(keep: float, tokens: float) -> str:
    if not pd.isna(tokens):
        return f"{tokens:g} tokens"
    return "-" if pd.isna(keep) else f"{keep:.0%}"


def _cell(row: Mapping[Any, Any] | None) -> str:
    if row is None:
        return "-"
    digits = 1 if row["benchmark"] == MEAN else decimals(row["metric"], row["value"])
    text = f"{row['value']:.{digits}f}"
    part = "percent_" if row["policy"] != FULL and not pd.isna(row["percent_low"]) else ""
    if row["policy"] != FULL and row["benchmark"] != MEAN and not pd.isna(row["percent"]):
        text, digits = f"{text}, {row['percent']:.1f}%", 1 if part else digits
    low, high = row[f"{part}low"], row[f"{part}high"]
    text += "" if pd.isna(low) else f" ({low:.{digits}f} to {high:.{digits}f})"
    spread = decimals(row["metric"], row["value"])
    several = row["trainings"] > 1
    return f"{text} [{row['lowest']:.{spread}f} to {row['highest']:.{spread}f}]" if several else text


def claims_table(claims: pd.DataFrame, benchmarks: Sequence[str]) -> str:
    """Return Markdown of published percentages, the sources' own claims; empty where there are none."""
    known = set(claims["benchmark"]) - {MEAN}
    rows = []
    for (tokens, method, source, link), group in claims.groupby(
        ["tokens", "method", "source", "link"], sort=False
    ):
        values = group.set_index("benchmark")["value"]
        cells = {"method": method, "tokens": tokens, "mean %": _claimed(values.get(MEAN))}
        cells |= {name: _claimed(values.get(name)) for name in benchmarks if name in known}
        rows.append(cells | {"source": f"{source}, {link}"})
    return frame_text(pd.DataFrame(rows), "markdown") if rows else ""


def _claimed(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{float(value):.1f}"
