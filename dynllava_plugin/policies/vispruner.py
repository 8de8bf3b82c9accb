"""VisPruner: patches by the class token's attention, and different ones beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Patches, PatchPolicy, argument, share
from dynllava_plugin.policies.points import descending
from dynllava_plugin.sparsity.selection import at_places, pick

AT_ONCE = 8  # duplicates that one round of matching removes


@dataclass(frozen=True, kw_only=True)
class VisPruner(PatchPolicy):
    """The share `important` of the n tokens by the class token's attention, and of the rest those that are different.

    The others, the most attended first, are split into every first and every second one; of the first part the (at most
    eight) tokens that are most like one of the second (cosine) go, and the rest, the least attended part last, is split anew,
    until as many are left as are wanted.

    Where the first part has fewer tokens than must go, another round removes what is left to remove; the published code
    takes for granted that it hasn't.
    """

    name = "vispruner"
    rule = "patches by CLS attention and, of the others, different ones, before the LLM"
    source = "arXiv 2412.01818"

    important: float = argument(0.5, share)

    def choose(self, patches: Patches, score: torch.Tensor, kept: int) -> torch.Tensor:
        """Return the important patches and the different ones."""
        important = int(kept * self.important)
        unit = torch.nn.functional.normalize(patches.hidden.float(), dim=-1)
        ranked = descending(score)
        rest = ranked[:, important:]
        while (surplus := rest.shape[1] - (kept - important)) > 0:
            first, second = rest[:, ::2], rest[:, 1::2]
            if second.shape[1] == 0:  # one is left, and none is wanted
                rest = rest[:, :0]
                continue
            like = (pick(unit, first) @ pick(unit, second).transpose(1, 2)).amax(-1)
            gone = min(AT_ONCE, surplus, first.shape[1])
            different = descending(like)[:, gone:]
            rest = torch.cat([pick(first, different), second], 1)
        return at_places(torch.cat([ranked[:, :important], rest], 1), score.shape[1])
