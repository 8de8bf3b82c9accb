"""FastV: image tokens by the attention of the last prompt token."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.base import ImagePolicy, argument, gone


@dataclass(frozen=True, kw_only=True)
class FastV(ImagePolicy):
    """Layers 0..k-1 see everything; layers k.. the image tokens that the last prompt token attends to most.

    The attention is layer k-1's, averaged over heads; position ids stay. `r` is the paper's ratio, the share of each
    image's tokens that GOES; without it the share `keep` stays. A later prompt part behind the cache doesn't
    choose again.
    """

    name = "fastv"
    rule = "image tokens that the last prompt token attends to most, in layer k-1"
    source = "arXiv 2403.06764"
    static_prefill = True
    layer_argument = "k"
    follows = False
    looks_at_attention = True

    k: int = 3
    r: float | None = argument(None, gone)

    @property
    def kept_share(self) -> float:
        """Return `keep`, or what `r` leaves."""
        return self.keep if self.r is None else 1 - self.r
