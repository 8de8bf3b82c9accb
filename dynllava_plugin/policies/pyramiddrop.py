"""PyramidDrop: fewer and fewer image tokens, at several gates."""

from __future__ import annotations

from dataclasses import dataclass

from dynllava_plugin.policies.staged import StagedPolicy


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedPolicy):
    """Behind gate j of `stages` the share ratio^j of each image's tokens stays, those that the last prompt token attends to most.

    The gates divide the layers evenly (8, 16 and 24 of 32). `ratio` is the paper's lambda, 0.5 there.

    The published code ranks with the projections of the layer behind the gate on the states that enter it, a second time
    beside the layer itself; here the attention is the layer's before the gate, as FastV's. The budget holds for each image of
    a prompt; the published code has one image.
    """

    name = "pyramiddrop"
    rule = "image tokens that the last prompt token attends to most, fewer at each of several gates"
    source = "arXiv 2410.17247"
    looks_at_attention = True
