"""PyramidKV: SnapKV with a larger part of the budget in early layers than in late ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynllava_plugin.policies.base import argument, count
from dynllava_plugin.policies.heavy_hitters import ObservedCache
from dynllava_plugin.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """As SnapKV, with a share of the prompt that falls evenly from layer to layer, `r` in the mean.

    The last layer holds r / beta, or 2r - 1 where the first would else hold more than all.

    arXiv 2406.02069, https://github.com/Zefan-Cai/KVCache-Factory: beta = 20, 30 or 40 by set; 20 here, as in kvpress. There
    the window is added to each layer's number of tokens, here it is inside, at most half of it, as in `snapkv`.
    """

    name = "pyramidkv"
    rule = "what the prompt's end attends to stays in the cache of the prompt, less of it in later layers"
    source = "arXiv 2406.02069"

    beta: int = argument(20, count)

    @property
    def splits(self) -> tuple[int, ...]:
        """Return every layer from `start_layer` on: each holds its own number of tokens."""
        return tuple(range(self.start_layer, max(self.num_layers or 0, self.start_layer + 1)))

    def share_at(self, layer: int, num_layers: int) -> float:
        """Return the share of the prompt that `layer` holds."""
        low = max(self.r / self.beta, 2 * self.r - 1)
        steps = num_layers - self.start_layer - 1
        if steps < 1:
            return self.r
        return 2 * self.r - low - (layer - self.start_layer) * 2 * (self.r - low) / steps

    def new_cache(self, num_layers: int) -> ObservedCache:
        """Return a cache with a track for each layer."""
        whole = replace(self, num_layers=num_layers)
        return whole._cache(num_layers, [self.share_at(layer, num_layers) for layer in whole.splits])
