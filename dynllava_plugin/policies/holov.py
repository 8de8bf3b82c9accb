"""HoloV: the budget is spread over crops of the image, more of it where attention and diversity are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Patches, PatchPolicy, argument, count, number
from dynllava_plugin.policies.points import descending, ranks


@dataclass(frozen=True, kw_only=True)
class HoloV(PatchPolicy):
    """Each of `crops` runs of patches gets a part of the budget, and keeps its patches that the class token attends to most.

    A crop's part is its mean over patches of attention + `beta` * variance, where variance is that of a patch's cosines to
    the crop's other patches, scaled so that its mean is the attention's. Parts are rounded down, and what is left goes to the
    crops of the largest parts, one token each.

    arXiv 2510.02912, https://github.com/obananas/HoloV: 16 crops, alpha = 1, beta = 0.09. As there a patch's cosine to itself
    counts as 0 in the variance. Departures: cosines are of the patches before the projector, so that only what stays is projected
    (there: behind it), and what a crop can't hold goes to the next ones (there its places are zeros). Crops are runs of the
    raster order, as in the published code.
    """

    name = "holov"
    rule = "patches by CLS attention within crops that share the budget by attention and diversity, before the LLM"
    source = "arXiv 2510.02912"

    crops: int = argument(16, count)
    beta: float = argument(0.09, number("not a number of at least 0", lambda value: value >= 0))

    def choose(self, patches: Patches, score: torch.Tensor, kept: int) -> torch.Tensor:
        """Return the most attended patches of each crop."""
        total = score.shape[1]
        sizes = [len(part) for part in torch.arange(total).tensor_split(min(self.crops, total))]
        crops, attention = patches.hidden.float().split(sizes, 1), score.split(sizes, 1)
        weights = torch.stack([self._weight(*crop) for crop in zip(crops, attention, strict=True)], 1)
        room = torch.tensor(sizes, device=score.device)
        parts = _divide(weights, kept, room)  # [M, crops]
        return torch.cat([ranks(part) for part in attention], 1) < parts.repeat_interleave(room, dim=1)

    def _weight(self, states: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Return float32 [M], the weight of a crop of states [M, n, c] with attention [M, n]."""
        number = states.shape[1]
        if number == 1:
            return attention.mean(1)
        unit = torch.nn.functional.normalize(states, dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        cosine = cosine * ~torch.eye(number, dtype=torch.bool, device=states.device)
        mean = cosine.sum(-1, keepdim=True) / (number - 1)
        variance = ((cosine - mean) ** 2).sum(-1) / (number - 1)
        scale = attention.mean(1) / variance.mean(1).clamp(min=1e-12)
        return (attention + self.beta * variance * scale[:, None]).mean(1)


def _divide(weights: torch.Tensor, kept: int, room: torch.Tensor) -> torch.Tensor:
    """Return int64 [M, crops], `kept` tokens of each image by weights [M, crops], no more than `room` [crops] has."""
    wanted = weights / weights.sum(1, keepdim=True) * kept
    parts = wanted.floor().long()
    parts = parts + (ranks(weights) < kept - parts.sum(1, keepdim=True))
    parts = parts.minimum(room)
    for crop in descending(weights).unbind(1):  # what full crops couldn't take
        more = (kept - parts.sum(1)).minimum(room[crop] - parts.gather(1, crop[:, None])[:, 0])
        parts.scatter_add_(1, crop[:, None], more[:, None])
    return parts
