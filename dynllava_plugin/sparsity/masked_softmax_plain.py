"""Eq. 7 with the whole [L, L] matrix in memory: what the blockwise and Triton code is checked and timed against."""

from __future__ import annotations

import torch


def context_matrix(keep: torch.Tensor) -> torch.Tensor:
    """G of Eq. 7: [B, L] keep masks -> [B, 1, L, L], G[i, j] = keep[j] and G[i, i] = 1 (a token always sees itself)."""
    length = keep.shape[1]
    diagonal = torch.eye(length, dtype=torch.bool, device=keep.device)
    return torch.where(diagonal, torch.ones_like(keep)[:, None, :], keep[:, None, :])[:, None]


def visible_matrix(valid: torch.Tensor) -> torch.Tensor:
    """Causal order and padding: `valid` bool [B, L] -> bool [B, 1, L, L]."""
    length = valid.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]


def plain_masked_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    max_exponent: float = 8.0,
) -> torch.Tensor:
    """out_i = sum_j e^{x_ij} G_ij v_j / sum_j e^{x_ij} G_ij, its gradients left to autograd: O(L^2) memory.

    Takes `context_matrix` and `visible_matrix` where `masked_softmax.masked_softmax_attention` takes its context.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    kept = visible & (context.detach() > 0)
    # The maximum over kept tokens only: with all of them far below a dropped one the sum must not vanish.
    top = scores.detach().masked_fill(~kept, float("-inf")).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    # masked_fill before exp: a hidden score must not overflow and turn 0 * inf into NaN in the gradient.
    exponent = (scores - top).masked_fill(~visible, float("-inf")).clamp(max=max_exponent)
    weights = exponent.exp() * context
    total = weights.sum(-1, keepdim=True)
    # A row with no kept token: dividing by infinity gives it zeros, and no gradient.
    probabilities = weights / total.masked_fill(total == 0, float("inf"))
    return probabilities.to(value.dtype) @ value
