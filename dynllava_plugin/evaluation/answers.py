"""What the engine returns: a generated answer with its token counts, or a score."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A generated answer and its token counts.

    Attributes
    ----------
    text : str
    prompt_tokens : int
        Tokens of the prompt with image tokens, without padding.
    image_tokens, kept_image_tokens : int
        Before and after the gate.
    generated_tokens : int
        With the end token, where it was reached.
    cached_tokens, kept_tokens : int or None
        Of the generated tokens: those that were fed back, and those of them that layers >= l hold. None with
        beams (they share no one history) or without a cache.
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    kept_image_tokens: int | None
    generated_tokens: int
    cached_tokens: int | None
    kept_tokens: int | None


@dataclass(frozen=True)
class Score:
    """Teacher-forced score of a continuation under the sparsified decode.

    Attributes
    ----------
    logprob : float
        Sum over its tokens, nats.
    tokens : int
    is_greedy : bool
        Whether greedy decoding would produce exactly these tokens.
    """

    logprob: float
    tokens: int
    is_greedy: bool

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        return -self.logprob / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood)."""
        return math.exp(self.loss)


def mean_counts(answers: Sequence[Answer]) -> dict[str, float | int]:
    """Means over samples of the answers' token counts, and the share of output tokens kept.

    Counts that weren't measured are left out.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        for name in ("prompt_tokens", "image_tokens", "kept_image_tokens", "generated_tokens", "kept_tokens"):
            value = getattr(answer, name)
            if value is not None:
                columns[name].append(value)
    means: dict[str, float | int] = {"n": len(answers)}
    means |= {name: sum(values) / len(values) for name, values in columns.items()}
    cached = sum(answer.cached_tokens or 0 for answer in answers)
    if cached and "kept_tokens" in columns:
        means["kept_output_share"] = sum(columns["kept_tokens"]) / cached
    return means
