"""VisionZip: the patches the class token looks at, and the others merged into a few."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynllava_plugin.errors import UserError
from dynllava_plugin.policies.base import Choice, Patches, PatchPolicy, argument, count
from dynllava_plugin.sparsity.selection import at_places, pick


@dataclass(frozen=True, kw_only=True)
class VisionZip(PatchPolicy):
    """`n` tokens of an image: `contextual` merged ones, and as dominant ones the class token and the most attended patches.

    Attention and keys are those of the layer whose output the projector reads. Of the patches that are not dominant
    every (N - dominant) // contextual-th is a target; each other one joins the target with the most similar key
    (cosine of the keys' mean over heads); a target becomes itself plus the mean of what joined it. Without
    `contextual` it is the paper's share, 10 of 64.
    """

    name = "visionzip"
    rule = "dominant tokens by CLS attention and merged context tokens, before the LLM"
    source = "arXiv 2412.04467"

    contextual: int | None = argument(None, count)

    def merged_tokens(self, kept: int) -> int:
        """Return how many of the `kept` tokens are contextual."""
        merged = round(kept * 10 / 64) if self.contextual is None else self.contextual
        if merged >= kept:
            raise UserError(f"{self.name}: contextual={merged} leaves no dominant token among n={kept}")
        return merged

    def reduce_patches(self, patches: Patches) -> Choice:
        """Return the class token first, then dominant and contextual tokens, each in the order of their places.

        With original positions a token stands at its own place, the class token at the first free one.
        """
        total = patches.hidden.shape[1]
        kept = self.kept_tokens(total)
        attention = patches.cls_attention()
        if kept >= total:
            return Choice(torch.ones_like(attention, dtype=torch.bool), attention, patches.hidden)
        merged = self.merged_tokens(kept)
        dominant = attention.topk(kept - merged - 1, dim=-1).indices.sort(dim=-1).values  # [M, D]
        others = (~at_places(dominant, total)).nonzero()[:, 1].view(len(dominant), -1)  # [M, R], in order
        step = max(1, others.shape[1] // max(merged, 1))
        is_target = torch.zeros(others.shape[1], dtype=torch.bool, device=others.device)
        is_target[torch.arange(0, others.shape[1], step, device=others.device)[:merged]] = True
        targets, joining = others[:, is_target], others[:, ~is_target]
        key = patches.key[:, 1:].unflatten(-1, (patches.heads, -1)).float().mean(2)
        key = torch.nn.functional.normalize(key, dim=-1)
        hidden = patches.hidden
        tokens = [patches.cls[:, None], pick(hidden, dominant)]
        if merged:
            similarity = pick(key, joining) @ pick(key, targets).transpose(1, 2)
            joins = torch.nn.functional.one_hot(similarity.argmax(-1), merged).to(hidden)  # [M, J, T]
            mean = joins.transpose(1, 2) @ pick(hidden, joining) / joins.sum(1).clamp(min=1)[..., None]
            tokens.append(pick(hidden, targets) + mean)
        keep = at_places(torch.cat([dominant, targets], 1), total)
        first_free = (~keep).to(torch.uint8).argmax(1, keepdim=True)
        keep.scatter_(1, first_free, True)
        places = torch.cat([first_free, dominant, targets], 1)
        placed = in_places(hidden, torch.cat(tokens, 1), places, self.packed_positions)
        return Choice(keep, attention, placed)

    def check(self) -> None:
        """Check as `PatchPolicy.check`, and that contextual leaves some of n."""
        super().check()
        if self.contextual is not None and self.n is not None:
            self.merged_tokens(self.n)


def in_places(hidden: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, packed: bool) -> torch.Tensor:
    """Return `hidden` [M, N, c] with `tokens` [M, n, c] at `places` [M, n], if `packed` in their own order instead of the places'."""
    if packed:
        places = places.sort(dim=-1).values
    return hidden.scatter(1, places[..., None].expand_as(tokens), tokens.to(hidden))
