"""DART: image tokens that repeat least what a few pivot tokens say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Choice, Gate, ImagePolicy, argument, count
from dynllava_plugin.sparsity.selection import at_places, pick


@dataclass(frozen=True, kw_only=True)
class DART(ImagePolicy):
    """`pivots` image tokens of each image and as many of the prompt's text are pivots; the rest is what is least like them.

    Pivots are the tokens with the largest L1 norm. The image's pivots stay. Then each pivot in turn, the image's first, takes
    the tokens with the lowest cosine to it among those that no one has taken; the budget is divided evenly, what is left over
    goes to the first pivots.

    Norms and cosines are of the hidden states that enter the layer. The published code takes norms of the keys of the layer
    before (the paper finds the choice of pivots of little consequence) and cosines of the states behind the final norm.
    Its number of tokens is a multiple of the number of pivots, here it is the budget exactly. Text pivots are of the whole prompt
    (there: of what follows the image); a prompt of fewer text tokens than pivots uses the image's pivots in their place.
    """

    name = "dart"
    rule = "image tokens least like a few pivot tokens"
    source = "arXiv 2502.11494"

    layer: int = 2
    pivots: int = argument(4, count)

    def keep_image(self, gate: Gate) -> Choice:
        """Return the tokens that stay; a score is a token's highest cosine to a pivot, negated."""
        states = gate.of_images(gate.hidden).float()  # [M, N, d]
        budget = self.budget(gate)
        own = states.abs().sum(-1).topk(min(self.pivots, budget), dim=-1).indices
        keep = at_places(own, states.shape[1])
        pivots = pick(states, own)
        pivots = torch.cat([pivots, self._text_pivots(gate, pivots)], 1)
        normal = torch.nn.functional.normalize
        cosine = normal(pivots, dim=-1) @ normal(states, dim=-1).transpose(1, 2)  # [M, P, N]
        share, more = divmod(budget - own.shape[1], pivots.shape[1])
        for number in range(pivots.shape[1]):
            taken = share + (number < more)
            if taken:
                like = cosine[:, number].masked_fill(keep, float("inf"))
                keep = keep.scatter(1, like.topk(taken, largest=False).indices, True)
        return Choice(keep, -cosine.amax(1), count=budget)

    def _text_pivots(self, gate: Gate, own: torch.Tensor) -> torch.Tensor:
        """[M, P, d]: of each image's sample the prompt text's states of the largest norm, else `own`."""
        assert gate.layout.image_mask is not None
        columns = torch.arange(gate.hidden.shape[1], device=gate.hidden.device)
        text = gate.valid & ~gate.layout.image_mask & gate.layout.before_output(columns)
        hidden = gate.hidden.float()
        norm = hidden.abs().sum(-1).masked_fill(~text, -1.0)
        wanted = min(own.shape[1], norm.shape[1])
        found = norm.topk(wanted, dim=-1)
        rows = [gate.layout.image_rows[image] for image in gate.images]
        chosen = pick(hidden, found.indices)[rows]
        return torch.where((found.values[rows] >= 0)[..., None], chosen, own[:, :wanted])
