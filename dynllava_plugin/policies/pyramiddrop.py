"""PyramidDrop: fewer and fewer image tokens, at several gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Gate
from dynllava_plugin.policies.staged import StagedPolicy


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedPolicy):
    """Behind gate j of `stages` the share ratio^j of each image's tokens stays, those that the last prompt token attends to most.

    The gates divide the layers evenly (8, 16 and 24 of 32). `ratio` is the paper's lambda, 0.5 there.

    Notes
    -----
    The published code ranks with the projections of the layer behind the gate on the states that enter it, a second time
    beside the layer itself; here the attention is the layer's before the gate, as FastV's. The budget holds for each image of
    a prompt; the published code has one image.
    """

    name = "pyramiddrop"
    rule = "image tokens that the last prompt token attends to most, fewer at each of several gates"
    source = "arXiv 2410.17247"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Return the layer before each gate."""
        return tuple(layer - 1 for layer in self.layers)

    def score(self, gate: Gate) -> torch.Tensor:
        """Return `Gate.attention`."""
        assert gate.attention is not None
        return gate.of_images(gate.attention)
