"""How many digits of a figure a table for reading shows; CSV and JSON are never rounded."""

from __future__ import annotations

from decimal import Decimal
from math import floor, isnan, log10

from dynllava_plugin.evaluation.benchmarks import PERCENT, unit_of

_PPL = "ppl"
_MOST = 12  # what is smaller still is rounding


def figure_text(metric: str, value: float, percent: int = 2) -> str:
    """The figure, without its unit; ``-`` for NaN."""
    return "-" if isnan(value) else f"{value:.{decimals(metric, value, percent)}f}"


def decimals(metric: str, value: float, percent: int = 2) -> int:
    """Of percentages `percent`; of small amounts three digits; else two.

    Of perplexities near 1 at least four, and two digits of what is above 1.
    """
    if unit_of(metric) == PERCENT:
        return percent
    if metric == _PPL:
        return max(4, _place(value - 1) + 1) if value < 2 else 2
    return max(2, _place(value) + 2) if abs(value) < 1 else 2


def significant(value: float, digits: int) -> str:
    """That many digits, never with an exponent: ``10100``, ``0.00312``."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


def _place(value: float) -> int:
    """The decimal of the first digit that isn't 0."""
    return -floor(log10(abs(value))) if abs(value) >= 10**-_MOST else 0
