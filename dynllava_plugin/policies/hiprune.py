"""HiPrune: patches that the middle of the vision tower looks at, their neighbours, and those that its end looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Patches, PatchPolicy, argument, count, share
from dynllava_plugin.policies.points import ranks
from dynllava_plugin.sparsity.selection import at_places


@dataclass(frozen=True, kw_only=True)
class HiPrune(PatchPolicy):
    """Anchors, buffers and registers, `n` in all.

    Anchors are the round(n * alpha / 5) patches that receive most attention in the tower's `object_layer`; buffers are the
    patches beside, above and below them; registers fill the budget with those that receive most in the layer that the projector reads.
    Attention received is the mean over heads and over all patches, the class token among them.

    arXiv 2508.00553, https://github.com/Danielement321/HiPrune: alpha = 0.1, object layer 9 of CLIP's 24 (counted from 1; the
    same share of another depth). As there a neighbour beyond a row's end is the next row's first, and one outside the image the
    image's first or last patch. Where 5 patches an anchor are more than n there are fewer anchors.
    """

    name = "hiprune"
    rule = "patches that receive most attention in a middle layer, their neighbours, and those of a late layer, before the LLM"
    source = "arXiv 2508.00553"

    alpha: float = argument(0.1, share)
    object_layer: int | None = argument(None, count)

    def earlier_layer(self, depth: int) -> int:
        """Return the object layer, counted from 0."""
        found = max(1, round(depth * 9 / 24)) if self.object_layer is None else self.object_layer
        if found > depth:
            raise UserError(f"{self.name}: object_layer={found}, but the vision tower has {depth} layers")
        return found - 1

    def score_patches(self, patches: Patches) -> torch.Tensor:
        """Return the attention that each patch receives in the layer that the projector reads."""
        return patches.received(patches.query, patches.key)

    def choose(self, patches: Patches, score: torch.Tensor, kept: int) -> torch.Tensor:
        """Return anchors with their neighbours, and registers."""
        assert patches.earlier is not None
        total = score.shape[1]
        side = math.isqrt(total)
        anchors = min(round(kept * self.alpha / 5), kept // 5)
        places = patches.received(*patches.earlier).topk(anchors, dim=-1).indices
        around = torch.tensor([0, -1, 1, -side, side], device=score.device)
        near = (places[..., None] + around).flatten(1).clamp(0, total - 1)
        return ranks(score.masked_fill(at_places(near, total), math.inf)) < kept
