"""Downsampling: a coarser grid of averaged image tokens, the plain baseline that pruning has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import SQUARE, Choice, InputPolicy, argument, share


@dataclass(frozen=True, kw_only=True)
class Downsample(InputPolicy):
    """The grid of projected image tokens average-pooled to at most the share `r` (or `keep`) of its tokens.

    The pooled grid is the largest near-square that fits the budget: a = floor(sqrt(n)) rows of floor(n / a) tokens.
    """

    name = "downsample"
    rule = "average-pooled image grid"
    source = "arXiv 2510.07143"
    reads_question = False
    needs = SQUARE

    r: float | None = argument(None, share)

    def left(self, total: int) -> tuple[int, ...]:
        """Return rows times columns of the pooled grid."""
        return (math.prod(self.grid(total)),)

    def grid(self, total: int) -> tuple[int, int]:
        """Return rows and columns of the pooled grid of a square one of `total` tokens."""
        side = math.isqrt(total)
        if side * side != total:
            raise UserError(f"{self.name}: {total} image tokens are not a square grid")
        (budget,) = super().left(total)
        rows = math.isqrt(budget)
        return rows, min(budget // rows, side)

    def reduce_tokens(self, features: torch.Tensor, question: Callable[[], torch.Tensor]) -> Choice:
        """Return the pooled tokens, each at the middle of its cell."""
        images, total, width = features.shape
        rows, columns = self.grid(total)
        side = math.isqrt(total)
        grid = features.transpose(1, 2).reshape(images, width, side, side)
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2)
        device = features.device
        middle = [
            ((2 * torch.arange(n, device=device) + 1) * side).div(2 * n, rounding_mode="floor")
            for n in (rows, columns)
        ]
        keep = torch.zeros(images, side, side, dtype=torch.bool, device=device)
        keep[:, middle[0][:, None], middle[1]] = True
        keep = keep.flatten(1)
        tokens = features.clone()
        tokens[keep] = pooled.flatten(0, 1)
        return Choice(keep, tokens=tokens, count=rows * columns)
