"""PruMerge+: patches that the class token singles out, more of them evenly spaced, and each merged with its like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dynllava_plugin.policies.base import Choice, Patches, PatchPolicy, argument, count, share
from dynllava_plugin.policies.visionzip import in_places


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PatchPolicy):
    """How many tokens stay is the image's own affair, unless `keep`, `n` or `tokens` fixes it.

    The class token's attention in the vision tower's last layer is taken over all channels at once. Outliers of it
    (above the third quartile by more than 1.5 interquartile ranges) stay, and so do patches spaced evenly at a third of
    the outliers' mean spacing. Each adds the attention-weighted sum of the `neighbours` other patches whose keys are most
    like its own; one more token is the weighted sum of all that do not stay.

    With `keep`, `n` or `tokens`, a quarter of the tokens are the most attended ones, the rest evenly spaced. An image without
    an outlier keeps its most attended patch. In a batch every image has its own number (the published code takes the first's).
    """

    name = "prumerge+"
    rule = "outliers of CLS attention and evenly spaced tokens, merged, before the LLM"
    source = "arXiv 2403.15388"
    vision_layer = "last"
    own_budget: ClassVar[bool] = True

    keep: float | None = argument(None, share)  # type: ignore[assignment]
    neighbours: int = argument(32, count)

    @property
    def fixed(self) -> bool:
        """Return whether the user says how many stay."""
        return not (self.keep is None and self.n is None and self.tokens is None)

    def chosen(self, attention: torch.Tensor) -> torch.Tensor:
        """float32 [N] -> int64 [n] places that stay, the most attended first, then the evenly spaced ones."""
        total = len(attention)
        if not self.fixed:
            low, high = torch.quantile(attention, torch.tensor([0.25, 0.75]).to(attention))
            outliers = max(1, int((attention > high + 1.5 * (high - low)).sum()))
            spacing = max(1, int(int(total / outliers) / 3))
            spaced = torch.arange(0, total - 1, spacing, device=attention.device)
        else:
            budget = self.kept_tokens(total)
            budget -= budget > 1  # the token of all others
            outliers = max(1, budget // 4)
            spaced = None
        top = attention.topk(outliers).indices
        if spaced is None:
            free = torch.ones(total, dtype=torch.bool, device=attention.device)
            free[top] = False
            places = free.nonzero()[:, 0]
            wanted = budget - outliers
            middle = (2 * torch.arange(wanted, device=attention.device) + 1) * len(places)
            spaced = places[middle.div(2 * max(wanted, 1), rounding_mode="floor")]
        return torch.cat([top, spaced[~torch.isin(spaced, top)]])

    def reduce_patches(self, patches: Patches) -> Choice:
        """Image by image: the numbers differ."""
        attention = patches.cls_attention(heads=1)
        parts = [
            self._reduce_one(hidden, key, row)
            for hidden, key, row in zip(patches.hidden, patches.key[:, 1:], attention, strict=True)
        ]
        tokens, keep = (torch.stack(column) for column in zip(*parts, strict=True))
        return Choice(keep, attention, tokens)

    def _reduce_one(
        self, hidden: torch.Tensor, key: torch.Tensor, attention: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, c] patches -> the same with merged tokens in their places, and bool [N]."""
        total = len(hidden)
        keep = torch.zeros(total, dtype=torch.bool, device=hidden.device)
        whole = self.fixed and self.kept_tokens(total) == total
        if whole:
            return hidden, ~keep
        places = self.chosen(attention)
        keep[places] = True
        unit = torch.nn.functional.normalize(key.float(), dim=-1)
        similarity = unit[places] @ unit.T  # [n, N]
        similarity[torch.arange(len(places), device=hidden.device), places] = -float("inf")
        near = similarity.topk(min(self.neighbours, total - 1), dim=-1).indices
        weighted = hidden.float() * attention[:, None]
        tokens = [hidden[places].float() + weighted[near].sum(1)]
        if not bool(keep.all()) and (not self.fixed or self.kept_tokens(total) > 1):
            tokens.append(weighted[~keep].sum(0, keepdim=True))
            first_free = (~keep).to(torch.uint8).argmax()[None]
            places = torch.cat([places, first_free])
            keep[first_free] = True
        placed = in_places(hidden[None], torch.cat(tokens)[None], places[None], self.packed_positions)
        return placed[0], keep
