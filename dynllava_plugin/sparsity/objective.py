"""The training objective: keep losses (Eq. 8-10) beside the language-model loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def keep_loss(
    masks: torch.Tensor, valid: torch.Tensor, counted: torch.Tensor, keep_rate: float | torch.Tensor
) -> torch.Tensor:
    """Return the mean over samples of (r - mean of the sample's mask)^2, one term of Eq. 10 for the target `keep_rate` r, [B] or one.

    `masks` float [B, N] are straight-through keep masks, `valid` bool [B, N] is False on right padding; the samples that are not
    `counted` bool [B] contribute 0 and still count in the mean.
    """
    rate = (masks * valid).sum(1) / valid.sum(1).clamp(min=1)
    return ((keep_rate - rate).square() * counted).mean()


def lm_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the next-token cross entropy in float32 of logits [B, L, V] and labels int64 [B, L], -100 where they are ignored.

    `labels[:, t]` is predicted by `logits[:, t - 1]`. The sum is divided by `num_items`, the labels of a whole accumulated batch, or
    else by this batch's own count.
    """
    target = labels[:, 1:]
    wanted = target != -100
    total = F.cross_entropy(logits[:, :-1][wanted].float(), target[wanted], reduction="sum")
    return total / (wanted.sum().clamp(min=1) if num_items is None else num_items)


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return float32 [n], the log-probabilities of labels [n] under logits [n, V]."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None])[:, 0]
