"""Decisions from logits: top-k image tokens (Eq. 5), argmax text tokens (Eq. 6), Gumbel masks in training (Eq. 11)."""

from __future__ import annotations

import math

import torch

from dynllava_plugin.sparsity.predictors import KEEP


def num_kept_image_tokens(num_tokens: int, keep_rate: float) -> int:
    """floor(r_I * N), at least one. The small term undoes binary rounding (0.29 * 100 is 28.999...)."""
    return max(1, math.floor(keep_rate * num_tokens + 1e-9))


def keep_score(logits: torch.Tensor) -> torch.Tensor:
    """[..., 2] logits -> [...] score that grows with the probability of KEEP."""
    return logits[..., KEEP] - logits[..., 1 - KEEP]


def select_image_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Eq. 5: [M, N] scores of M images -> [M, N] bool, True for the `count` highest of each image."""
    kept = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def random_image_scores(seeds: list[int], num_tokens: int, device: torch.device) -> torch.Tensor:
    """[M, N] scores by chance, one seed an image, so that an image is treated alike alone and in any batch."""
    rows = [torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, num_tokens, device=device)


def select_text_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Eq. 6: [...] `keep_score`s -> [...] bool, True where KEEP is the likelier one."""
    return scores > 0


def gumbel_noise(shape: torch.Size | tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise of the given shape, float32."""
    return -torch.empty(shape, device=device).exponential_().log()


def gumbel_keep_mask(logits: torch.Tensor, noise: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 11: [..., 2] logits -> [...] float32 mask, 0 or 1 forward, the softmax's gradient backward (straight-through)."""
    soft = torch.softmax((logits.float() + noise.float()) / tau, dim=-1)[..., KEEP]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def tau_at(step: int, max_steps: int, start: float = 1.0, end: float = 0.1) -> float:
    """Temperature after `step` of `max_steps` optimiser steps: exponential from `start` to `end` (appendix A.4.2)."""
    return start * (end / start) ** (min(step, max_steps) / max(max_steps, 1))


def keep_rates_at(uniform: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """[B] numbers in [0, 1) -> [B] float32 keep rates from `low` to `high`, uniform in their logarithm."""
    return (low * (high / low) ** uniform).float()


def last_answer(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """[B, L] labels -> [B, L] bool, True on the last run of labelled tokens of each sample."""
    labelled = labels != ignore_index
    reversed_ = labelled.flip(1)
    started = reversed_.cumsum(1) > 0
    broken = (started & ~reversed_).cumsum(1) > 0
    return (reversed_ & ~broken).flip(1)
