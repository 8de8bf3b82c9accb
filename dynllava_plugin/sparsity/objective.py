"""The training objective: keep losses (Eq. 8-10) beside the language-model loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def keep_loss(
    masks: torch.Tensor, valid: torch.Tensor, counted: torch.Tensor, keep_rate: float | torch.Tensor
) -> torch.Tensor:
    """Mean over samples of (r - mean of the sample's mask)^2, one term of Eq. 10.

    Parameters
    ----------
    masks : float [B, N]
        Straight-through keep masks.
    valid : bool [B, N]
        Where `masks` holds a token (right padding is False).
    counted : bool [B]
        Samples that pull on the rate; the others contribute 0 and still count in the mean.
    keep_rate : float, or float [B]
        Target rate r, of all samples or of each.
    """
    rate = (masks * valid).sum(1) / valid.sum(1).clamp(min=1)
    return ((keep_rate - rate).square() * counted).mean()


def lm_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Next-token cross entropy in float32.

    Parameters
    ----------
    logits : [B, L, V]
    labels : int64 [B, L]
        -100 is ignored; `labels[:, t]` is predicted by `logits[:, t - 1]`.
    num_items : int or tensor, optional
        Divide the sum by this many labels (of a whole accumulated batch) instead of this batch's own count.
    """
    target = labels[:, 1:]
    wanted = target != -100
    total = F.cross_entropy(logits[:, :-1][wanted].float(), target[wanted], reduction="sum")
    return total / (wanted.sum().clamp(min=1) if num_items is None else num_items)


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, V] logits, [n] labels -> [n] float32 log-probabilities."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None])[:, 0]
