"""V2Drop: image tokens that the last layer changed least go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Gate
from dynllava_plugin.policies.staged import StagedPolicy


@dataclass(frozen=True, kw_only=True)
class V2Drop(StagedPolicy):
    """At each of three gates those image tokens stay whose state the layer before changed most (L2 norm of the difference).

    The gates are at 3, 17 and 22 of 32 layers, and at the same shares of another depth. Nothing of attention is looked at, so
    that every attention kernel stays in use.

    arXiv 2509.01552, https://github.com/xuyang-liu16/V2Drop. Its LLaVA-1.5 code leaves 288, 144 and 1 of 576 tokens
    (`shares=0.5-0.25-0.001`, a mean of 203); by `keep`, `ratio` and `tokens` every gate leaves the same share of what reaches it.
    """

    name = "v2drop"
    rule = "image tokens that the layer before changed most, fewer at each of three gates"
    source = "arXiv 2509.01552"
    reads_question = False
    depths = (3 / 32, 17 / 32, 22 / 32)

    def score(self, gate: Gate) -> torch.Tensor:
        """Return the length of what the layer before the gate added."""
        assert gate.entered is not None
        return gate.of_images((gate.hidden.float() - gate.entered.float()).norm(dim=-1))
