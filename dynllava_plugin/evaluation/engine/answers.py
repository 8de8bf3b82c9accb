"""What the engine returns: a generated answer with its token counts, or a score."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dynllava_plugin.flops import OutputCost


@dataclass(frozen=True)
class Answer:
    """A generated answer and its token counts.

    Attributes
    ----------
    prompt_tokens : int
        Tokens of the prompt with image tokens, without padding.
    image_tokens, kept_image_tokens : int
        Before and after the gate.
    generated_tokens : int
        With the end token, where it was reached.
    cached_tokens, kept_tokens : int or None
        Of the generated tokens: those that were fed back, and those of them that layers >= l hold. None with
        beams (they share no one history) or without a cache.
    cost : OutputCost or None
        What the generated tokens cost to decode and to hold; None where they have no one history.
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    kept_image_tokens: int | None
    generated_tokens: int
    cached_tokens: int | None
    kept_tokens: int | None
    cost: OutputCost | None = None


@dataclass(frozen=True)
class Score:
    """Teacher-forced score of a continuation, or of every answer of a conversation, under the sparsified decode.

    Attributes
    ----------
    logprob : float
        Sum over its tokens, nats.
    is_greedy : bool
        Whether greedy decoding would produce exactly these tokens.
    kept_tokens : int
        Those that layers >= l hold.
    cost : OutputCost or None
        Of all scored tokens.
    rounds : tuple of Score
        A conversation's answers, in order; empty for a single one.
    """

    logprob: float
    tokens: int
    is_greedy: bool
    kept_tokens: int = 0
    cost: OutputCost | None = None
    rounds: tuple[Score, ...] = ()

    @property
    def loss(self) -> float:
        """Return the mean negative log-likelihood of a token, nats."""
        return -self.logprob / self.tokens

    @property
    def perplexity(self) -> float:
        """Return exp(mean negative log-likelihood); of a conversation the mean over its rounds, as in the paper."""
        if self.rounds:
            return sum(score.perplexity for score in self.rounds) / len(self.rounds)
        return math.exp(self.loss)


def mean_counts(answers: Sequence[Answer]) -> dict[str, float | int]:
    """Return the means over samples of the answers' token counts, and the share of output tokens kept.

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
    costs = [answer.cost for answer in answers if answer.cost is not None]
    return means | (_mean_costs(costs) if len(costs) == len(answers) else {})


def joined(rounds: Sequence[Answer]) -> Answer:
    """Return a conversation's answers as one: texts line by line, the last prompt, output tokens and costs summed."""
    counted = [answer for answer in rounds if answer.cached_tokens is not None and answer.cost is not None]
    complete = len(counted) == len(rounds)
    costs = [answer.cost for answer in rounds if answer.cost is not None]
    return Answer(
        text="\n".join(answer.text for answer in rounds),
        prompt_tokens=rounds[-1].prompt_tokens,
        image_tokens=rounds[-1].image_tokens,
        kept_image_tokens=rounds[-1].kept_image_tokens,
        generated_tokens=sum(answer.generated_tokens for answer in rounds),
        cached_tokens=sum(answer.cached_tokens or 0 for answer in rounds) if complete else None,
        kept_tokens=sum(answer.kept_tokens or 0 for answer in rounds) if complete else None,
        cost=sum(costs[1:], costs[0]) if complete else None,
    )


def _mean_costs(costs: Sequence[OutputCost]) -> dict[str, float]:
    """Mean of samples: MiB of KV cache, TFLOPs of decoding."""
    if not costs:
        return {}
    return {
        "kv_mib": sum(cost.kv_bytes for cost in costs) / len(costs) / 2**20,
        "decode_tflops": sum(cost.flops for cost in costs) / len(costs) / 1e12,
        "decode_tflops_kept": sum(cost.flops_kept for cost in costs) / len(costs) / 1e12,
    }


def mean_score_counts(scores: Sequence[Score]) -> dict[str, float | int]:
    """Return the means over samples of the scored texts' tokens and costs."""
    means: dict[str, float | int] = {"n": len(scores)}
    for name in ("tokens", "kept_tokens"):
        means[name] = sum(getattr(score, name) for score in scores) / len(scores)
    return means | _mean_costs([score.cost for score in scores if score.cost is not None])
