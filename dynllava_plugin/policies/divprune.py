"""DivPrune: the image tokens that are farthest from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Choice, InputPolicy, argument, share


@dataclass(frozen=True, kw_only=True)
class DivPrune(InputPolicy):
    """Greedy max-min diversity: each token taken is the one whose nearest taken token is farthest (1 - cosine).

    The first is the token whose nearest neighbour is farthest. The share `r` (or `keep`) stays.
    """

    name = "divprune"
    rule = "max-min diversity before the LLM"
    source = "arXiv 2503.02175"
    reads_question = False

    r: float | None = argument(None, share)

    def reduce_tokens(self, features: torch.Tensor, question: Callable[[], torch.Tensor]) -> Choice:
        """Return the tokens that stay; a score is the distance at which a token was taken, 0 for the others."""
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        distance = 1 - unit @ unit.transpose(1, 2)  # [M, N, N]
        images, total = features.shape[:2]
        rows = torch.arange(images, device=features.device)
        keep = torch.zeros(images, total, dtype=torch.bool, device=features.device)
        score = torch.zeros(images, total, device=features.device)
        itself = torch.eye(total, dtype=torch.bool, device=features.device)
        nearest = distance.masked_fill(itself, float("inf")).amin(-1)
        for step in range(self.kept_tokens(total)):
            best, taken = nearest.masked_fill(keep, float("-inf")).max(-1)
            keep[rows, taken] = True
            score[rows, taken] = best.nan_to_num(posinf=1.0)
            to_taken = distance[rows, taken]
            nearest = to_taken if step == 0 else torch.minimum(nearest, to_taken)
        return Choice(keep, score, count=self.kept_tokens(total))
