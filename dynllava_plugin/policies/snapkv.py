"""SnapKV: once the prompt is read, each head of the cache keeps what the prompt's end looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import CachePolicy, argument, count, number
from dynllava_plugin.policies.heavy_hitters import (
    CutTrack,
    ObservedCache,
    ObservedLayer,
    pick_of_heads,
    share_of,
)
from dynllava_plugin.policies.points import ranks
from dynllava_plugin.sparsity.selection import pick
from dynllava_plugin.sparsity.tracks import Prefill, packing_order


@dataclass(frozen=True, kw_only=True)
class SnapKV(CachePolicy):
    """Layers from `start_layer` on hold the share `r` of the prompt, and every token behind it.

    The prompt's last `window` tokens stay. Of the others each head keeps those that these attend to most: attention summed
    over the window and averaged along the prompt over `kernel` neighbours.

    The published budget is a number of tokens, here a share of the prompt. The window is at most half of the budget, so that
    short prompts have a choice to make (the published code asks for a budget larger than the window). With grouped
    queries a key-value head ranks by the attention of its group. What comes behind the first prompt part stays whole. As the
    prompt is attended whole before it is cut, there is no decoding without a cache, and scoring runs step by step.
    """

    name = "snapkv"
    rule = "what the prompt's end attends to stays in the cache of the prompt"
    source = "arXiv 2404.14469"

    window: int = argument(32, count)
    kernel: int = argument(
        5, number("not an odd positive integer", lambda value: value >= 1 and value % 2, int)
    )

    @property
    def output_share(self) -> float:
        """Return 1: all of the output stays."""
        return 1.0

    def new_cache(self, num_layers: int) -> ObservedCache:
        """Return an empty cache that cuts the prompt."""
        return self._cache(num_layers, [self.r])

    def _cache(self, num_layers: int, shares: Sequence[float]) -> ObservedCache:
        tracks = [SnapTrack(self, share) for share in shares]
        return ObservedCache(num_layers, self.splits, self.cache_rule, SnapLayer, tracks)


class SnapTrack(CutTrack):
    """A track that holds max(1, floor(share * n)) of a prompt's n tokens."""

    def __init__(self, policy: SnapKV, share: float) -> None:
        self.policy, self.share = policy, share
        super().__init__()

    def budget(self, keep: torch.Tensor) -> torch.Tensor | None:
        """Return what stays of a prompt; None behind it."""
        return share_of(self.full, self.share) if self.lengths is None else None


class SnapLayer(ObservedLayer):
    """Keys and values whose prompt is stored by `observe`, once its attention is known."""

    track: SnapTrack

    def observe(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Store a prompt, cut to the budget."""
        track = self.track
        if not isinstance(track.plan, Prefill):
            return
        assert track._pending is not None
        budget = track._pending[:, None]  # [B, 1]
        window = (budget + 1).div(2, rounding_mode="floor").clamp(max=track.policy.window)
        seen = self._window_attention(query, key, window, scaling)
        order = packing_order(track.arriving) if track.plan.order is None else track.plan.order
        seen = pick(seen.transpose(1, 2), order).transpose(1, 2)
        places = torch.arange(order.shape[1], device=seen.device)
        there, recent = places < track.full[:, None], places >= track.full[:, None] - window
        seen = seen.masked_fill((recent | ~there)[:, None], 0)
        kernel = track.policy.kernel
        score = torch.nn.functional.avg_pool1d(seen, kernel, stride=1, padding=kernel // 2)
        score = score.masked_fill(recent[:, None], math.inf).masked_fill(~there[:, None], -math.inf)
        stays = packing_order((ranks(score) < budget[..., None]).flatten(0, 1)).view(*seen.shape[:2], -1)
        self.dtype, self.device = key.dtype, key.device
        room = track.capacity - stays.shape[2]
        self.keys, self.values = (
            torch.nn.functional.pad(
                pick_of_heads(pick(x.transpose(1, 2), order).transpose(1, 2), stays), (0, 0, 0, room)
            )
            for x in self._prompt
        )
        self.is_initialized, self._prompt = True, None

    def _window_attention(
        self, query: torch.Tensor, key: torch.Tensor, window: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return float32 [B, H_kv, L], what columns receive from their sample's last `window` [B, 1] tokens, mean over the group."""
        arriving = self.track.arriving
        length, groups = query.shape[2], key.shape[1]
        number = arriving.cumsum(1) - 1
        inside = arriving & (number >= self.track.full[:, None] - window)
        rows = packing_order(inside)  # [B, w]
        real = inside.gather(1, rows)
        query = pick(query.transpose(1, 2), rows).transpose(1, 2).unflatten(1, (groups, -1))
        scores = torch.einsum("bhgqd,bhkd->bhgqk", query, key).float() * scaling
        columns = torch.arange(length, device=query.device)
        visible = arriving[:, None] & (columns <= rows[..., None])  # [B, w, L]
        scores = scores.masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min)
        weights = scores.softmax(-1) * real[:, None, None, :, None]
        return weights.sum(3).mean(2)
