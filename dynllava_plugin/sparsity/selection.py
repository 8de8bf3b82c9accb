"""Who stays: the two predictors, and decisions from what they say.

The predictors are Figure 5's (appendix A.4.1), hidden states in, logits out: logit 0 means KEEP and logit 1 DROP, the convention of
the published weights. Top-k image tokens are Eq. 5, argmax text tokens Eq. 6, Gumbel masks in training Eq. 11.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from dynllava_plugin.sparsity.config import SparsityConfig

KEEP = 0


class PredictorBlock(nn.Module):
    """Pre-norm ViT block, bidirectional over one image's tokens: [M, N, c] -> [M, N, c]."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=1e-5)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        images, tokens, dim = x.shape
        qkv = self.qkv_proj(self.attention_norm(x)).view(images, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [M, H, N, c/H]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(images, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))


def _score_head(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
    )


class ImagePredictor(nn.Module):
    """Which tokens of an image stay: [M, N, d] hidden states of M images -> [M, N, 2] logits.

    A later gate's looks at the tokens that earlier gates left: `present` bool [M, N], None where all are there. One that is
    trained for many budgets is told the share of the whole image that is to stay, `rate` float [M]; others don't ask.
    """

    def __init__(self, hidden_size: int, sparsity: SparsityConfig) -> None:
        super().__init__()
        dim = sparsity.predictor_dim
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.in_proj = nn.Linear(hidden_size, dim)
        self.blocks = nn.ModuleList(
            PredictorBlock(dim, sparsity.predictor_heads, sparsity.predictor_ffn_dim)
            for _ in range(sparsity.predictor_layers)
        )
        self.head = _score_head(dim)
        self.rate_proj = nn.Linear(1, dim) if sparsity.vision_keep_range else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        rate: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = F.gelu(self.in_proj(self.norm(hidden_states)))
        if self.rate_proj is not None:
            assert rate is not None
            x = x + self.rate_proj(rate.log().to(x)[:, None, None])
        mask = None
        if present is not None:  # an absent token sees itself: one row of a softmax can't be empty
            own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            mask = (present[:, None, :] | own)[:, None]
        for block in self.blocks:
            x = block(x, mask)
        local, shared = x.chunk(2, dim=-1)
        if present is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            weights = present.to(x)[..., None]
            mean = (shared * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        # Half of the channels tell every token about the whole image.
        x = torch.cat([local, mean.expand_as(shared)], dim=-1)
        return self.head(x)


class TextPredictor(nn.Module):
    """Whether an output token stays as context: [..., d] -> [..., 2] logits, each token on its own."""

    def __init__(self, hidden_size: int, sparsity: SparsityConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.in_proj = nn.Linear(hidden_size, sparsity.predictor_dim)
        self.head = _score_head(sparsity.predictor_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.in_proj(self.norm(hidden_states))))


def num_kept_image_tokens(num_tokens: int, keep_rate: float) -> int:
    """Return floor(r_I * N), at least one. The small term undoes binary rounding (0.29 * 100 is 28.999...)."""
    return max(1, math.floor(keep_rate * num_tokens + 1e-9))


def keep_score(logits: torch.Tensor) -> torch.Tensor:
    """Return [...] a score of logits [..., 2] that grows with the probability of KEEP."""
    return logits[..., KEEP] - logits[..., 1 - KEEP]


def select_image_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return Eq. 5, bool [M, N] of scores [M, N] of M images: True for the `count` highest of each image."""
    return at_places(scores.topk(count, dim=-1).indices, scores.shape[-1])


def pick(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return values [M, n, ...] of `values` [M, N, ...] at `places` int64 [M, n]; on a CPU much faster than `gather`."""
    return values[torch.arange(len(places), device=places.device)[:, None], places]


def at_places(places: torch.Tensor, total: int) -> torch.Tensor:
    """Return bool [M, total], True at the `places` int64 [M, n] of each image."""
    return torch.zeros(len(places), total, dtype=torch.bool, device=places.device).scatter_(1, places, True)


def random_image_scores(seeds: list[int], num_tokens: int, device: torch.device) -> torch.Tensor:
    """Return [M, N] scores by chance, one seed an image, so that an image is treated alike alone and in any batch."""
    rows = [torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, num_tokens, device=device)


def select_text_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Return Eq. 6, bool [...] of `keep_score`s [...]: True where KEEP is the likelier one."""
    return scores > 0


def gumbel_noise(shape: torch.Size | tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return standard Gumbel noise of the given shape, float32."""
    return -torch.empty(shape, device=device).exponential_().log()


def gumbel_keep_mask(logits: torch.Tensor, noise: torch.Tensor, tau: float) -> torch.Tensor:
    """Return Eq. 11, a float32 mask [...] of logits [..., 2]: 0 or 1 forward, the softmax's gradient backward (straight-through)."""
    soft = torch.softmax((logits.float() + noise.float()) / tau, dim=-1)[..., KEEP]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def tau_at(step: int, max_steps: int, start: float = 1.0, end: float = 0.1) -> float:
    """Return the temperature after `step` of `max_steps` optimiser steps: exponential from `start` to `end` (appendix A.4.2)."""
    return start * (end / start) ** (min(step, max_steps) / max(max_steps, 1))


def keep_rates_at(uniform: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return float32 [B] of numbers [B] in [0, 1): keep rates from `low` to `high`, uniform in their logarithm."""
    return (low * (high / low) ** uniform).float()


def last_answer(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return bool [B, L] of labels [B, L], True on the last run of labelled tokens of each sample."""
    labelled = labels != ignore_index
    reversed_ = labelled.flip(1)
    started = reversed_.cumsum(1) > 0
    broken = (started & ~reversed_).cumsum(1) > 0
    return (reversed_ & ~broken).flip(1)
