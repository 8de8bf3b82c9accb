"""Confidence intervals from the questions: every policy answers the same ones, so resampling is paired."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def resampled_means(scores: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Scores [P, n] of P policies on the same n questions -> float64 [P, resamples] means over resampled questions.

    One draw of questions serves all policies, so that a difference of two rows is a paired bootstrap.
    """
    count = scores.shape[1]
    rng = np.random.default_rng(seed)
    # How often each question is drawn: a product with the scores is as good as drawing them, and smaller.
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # [resamples, n]
    return scores.astype(np.float64) @ weights.T / count


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of resampled means or of their differences."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
