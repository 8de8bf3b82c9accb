"""H2O: heavy hitters and recent tokens stay in the KV cache, the others leave it."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import CachePolicy
from dynllava_plugin.policies.heavy_hitters import HeavyHitterLayer, HeavyHitterTrack, ObservedCache


@dataclass(frozen=True, kw_only=True)
class H2O(CachePolicy):
    """Layers from `start_layer` on hold at most the share `r` of the tokens seen so far.

    Each head of each layer keeps, in equal parts, the most recent tokens and, of the older ones, those that
    received the most attention since they entered. The prompt is attended whole and then cut to the budget.

    The published code fixes the budget at r times the prompt's length; here it grows with the output, so that r = 1
    is full context and r = 0.5 half of it at any length. With grouped queries a key-value head sums the attention of its
    group. What is let go depends on every step before, so that scoring runs step by step and decoding without a
    cache doesn't exist.
    """

    name = "h2o"
    rule = "heavy hitters and recent tokens stay in the cache"
    source = "arXiv 2306.14048"

    def new_cache(self, num_layers: int) -> ObservedCache:
        """Return an empty cache that lets tokens go."""
        track = HeavyHitterTrack(self.r)
        return ObservedCache(num_layers, self.splits, self.cache_rule, HeavyHitterLayer, [track])
