"""Confidence intervals from the questions: every policy is measured on the same draws of them, so that differences are paired."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# Which answers a harness's item belongs with: MME's two questions about an image, MMVP's pairs.
_TOGETHER = ("pair_index", "question_id")
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


def resampled(
    items: Sequence[Any], aggregate: Callable[[list[Any]], float], name: str, resamples: int = RESAMPLES
) -> np.ndarray | None:
    """Return float64 [resamples]: a benchmark's figure over questions drawn with replacement.

    Which questions a draw has depends on their number and on `name` alone: two policies' draws belong together.

    Parameters
    ----------
    items : sequence
        What the harness kept of each question, in order: a number, or a dictionary. What belongs together is drawn together.
    aggregate : callable
        The harness's own way from items to the figure.
    name : str
        The benchmark's.

    Returns
    -------
    None where the harness's aggregation doesn't take a part of the questions.
    """
    units = _units(items)
    count = len(units)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    try:
        # A mean over questions, as most figures are (MMMU's is rounded), needs each one's score once.
        scores = np.array([aggregate(unit) for unit in units], dtype=np.float64)
        is_mean = bool(np.isclose(scores.mean(), aggregate(list(items)), rtol=1e-6, atol=1e-5))
        found = np.empty(resamples)
        for place in range(resamples):
            drawn = rng.multinomial(count, np.full(count, 1 / count))
            found[place] = drawn @ scores / count if is_mean else aggregate(_copies(units, drawn))
    except _REFUSALS:
        return None
    return found


def each_score(items: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> list[float]:
    """Return each item's figure by itself, or nothing where the whole one isn't their mean or the harness refuses one alone."""
    try:
        scores = [float(aggregate([item])) for item in items]
        is_mean = bool(scores) and np.isclose(np.mean(scores), aggregate(list(items)), rtol=1e-6, atol=1e-5)
    except _REFUSALS:
        return []
    return scores if is_mean else []


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of a figure's draws, of their differences or ratios; NaN where one of them is."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def _units(items: Sequence[Any]) -> list[list[Any]]:
    units: dict[Any, list[Any]] = {}
    for place, item in enumerate(items):
        keys = [item[key] for key in _TOGETHER if key in item] if isinstance(item, dict) else []
        units.setdefault(str(keys[0]) if keys else place, []).append(item)
    return list(units.values())


def _copies(units: Sequence[list[Any]], drawn: Iterable[int]) -> list[Any]:
    """Return the units as often as they were drawn, each copy under a name of its own: MME asserts two answers an image."""
    found: list[Any] = []
    for unit, count in zip(units, drawn, strict=True):
        for copy in range(count):
            found += [_renamed(item, copy) if copy else item for item in unit]
    return found


def _renamed(item: Any, copy: int) -> Any:
    names = {key: f"{item[key]} {copy}" for key in _TOGETHER if key in item} if isinstance(item, dict) else {}
    return {**item, **names} if names else item
