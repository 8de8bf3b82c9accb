"""SparseVLM: image tokens by the attention of the words that the image is about, and what goes is merged into a few."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Choice, Gate, argument, fraction
from dynllava_plugin.policies.points import descending
from dynllava_plugin.policies.staged import StagedPolicy
from dynllava_plugin.sparsity.selection import pick, select_image_tokens


@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedPolicy):
    """At each of three gates those image tokens stay that the raters attend to most, and a few merged ones.

    Raters are words of the question: by the embeddings that enter the LLM, those to which the sample's image tokens are more
    alike than on average (softmax over the words of the products with an image token, mean over image tokens). Of the tokens that
    go, the share `recycled` with the highest score is merged into a tenth as many: centres by density peaks, each other token to
    the nearest centre, the mean of a cluster at its centre's place. The budget counts merged tokens. Gates are at 3, 7 and 16
    of 32 layers, and at the same shares of another depth; attention is that of the layer before, mean over heads and raters.

    arXiv 2410.04417 (v1.5), https://github.com/Gumpest/SparseVLMs, which prunes behind layers 2, 6 and 15 to 300, 200 and 110 of
    576 tokens (`shares=0.521-0.348-0.191`) and recycles 30%. Departures: merged tokens are inside the budget (there: on top), at
    most half of it, and their number comes from the tokens over the budget; a merged token keeps its centre's position id (there
    tokens are counted anew behind each gate); the noise that there breaks ties of density is left out.
    """

    name = "sparsevlm"
    rule = "image tokens that words about the image attend to most, fewer at each of three gates, and merged ones"
    source = "arXiv 2410.04417"
    depths = (3 / 32, 7 / 32, 16 / 32)
    looks_at_attention = True

    recycled: float = argument(0.3, fraction)

    def watched(self, gate: Gate) -> torch.Tensor:
        """Return the raters, bool [B, L]; the last prompt token where a sample has no image."""
        text, hidden = gate.question_text(), gate.hidden.float()
        image = gate.layout.image_mask
        assert image is not None
        like = (hidden @ hidden.transpose(1, 2)).masked_fill(~text[:, None], -math.inf).softmax(-1)
        summed = like.nan_to_num().masked_fill(~image[..., None], 0).sum(1)
        mean = summed / image.sum(1, keepdim=True).clamp(min=1)
        average = mean.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
        return text & (mean > average * (1 - 1e-3))  # rounding decides nothing where all words are alike

    def keep_image(self, gate: Gate) -> Choice:
        """Return the tokens of the highest score, and merged ones in their centres' places."""
        score, states = self.score(gate), gate.of_images(gate.hidden)
        total, budget = score.shape[1], self.budget(gate)
        over = total - budget
        merged = min((int(self.recycled * over) + 1) // 10 + 1, budget // 2) if over and self.recycled else 0
        keep = select_image_tokens(score, budget - merged)
        if not merged:
            return Choice(keep, score, states, budget)
        pool = max(merged, min(int(self.recycled * (total - budget + merged)) + 1, total - budget + merged))
        places = score.masked_fill(keep, -math.inf).topk(pool, dim=-1).indices
        left = pick(states, places).float()
        centres, cluster = density_peaks(left, merged)
        member = torch.nn.functional.one_hot(cluster, merged).float()  # [M, pool, merged]
        mean = member.transpose(1, 2) @ left / member.sum(1)[..., None]
        at = places.gather(1, centres)
        states = states.scatter(1, at[..., None].expand_as(mean), mean.to(states))
        return Choice(keep.scatter(1, at, True), score, states, budget)


def density_peaks(states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` centres int64 [M, count] of states [M, P, d], and the cluster int64 [M, P] that each belongs to.

    A state is a centre by its density (of its `count` nearest, itself among them) times its distance to the nearest denser one
    (DPC-KNN, Du et al. 2016, as in the published code); distances are divided by sqrt(d).
    """
    distance = (
        torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[2] ** 0.5
    )
    density = (-(distance.topk(count, dim=-1, largest=False).values ** 2).mean(-1)).exp()
    farthest = distance.flatten(1).amax(1)[:, None, None]
    denser = density[:, None] > density[:, :, None]
    apart = torch.where(denser, distance, farthest).amin(-1)
    centres = descending(apart * density)[:, :count]
    cluster = pick(distance, centres).argmin(1)
    return centres, cluster.scatter(1, centres, torch.arange(count, device=states.device).expand_as(centres))
