"""What each sample's KV cache says about a finished `generate` call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class History:
    """One sample.

    Attributes
    ----------
    context : int
        Tokens of the prompt that layers >= l hold.
    dropped_answers : int
        Tokens of earlier answers in the prompt that they don't.
    keep : list of bool
        For each token that was fed back, whether they hold it; goes on behind the sample's end token.
    """

    context: int
    dropped_answers: int
    keep: list[bool]


def read_histories(cache: Any, steps: int, earlier: torch.Tensor | None) -> list[History] | None:
    """One history a sample; None without a cache of ours.

    Parameters
    ----------
    cache : SparseContextCache
    steps : int
        Decoding steps after the prompt.
    earlier : bool [B, prompt], optional
        The prompt's own output text.
    """
    if cache is None or not hasattr(cache, "kept_lengths"):
        return None
    held = cache.kept_lengths()[-1].tolist()
    decisions = cache.output_keep()
    if decisions is None:
        return [History(length, 0, []) for length in held]
    decisions = decisions.cpu()
    columns = decisions.shape[1] - steps  # of the prompt, where it has output text
    dropped = [0] * len(held)
    if columns and earlier is not None:
        dropped = (earlier.cpu() & ~decisions[:, :columns]).sum(1).tolist()
    generated = decisions[:, columns:]
    kept = generated.sum(1).tolist()
    return [
        History(length - count, lost, keep)
        for length, count, lost, keep in zip(held, kept, dropped, generated.tolist(), strict=True)
    ]
