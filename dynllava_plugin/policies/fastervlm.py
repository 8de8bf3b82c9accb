"""FasterVLM and VisPruner: patches by the class token's attention, and, in the second, different ones beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dynllava_plugin.policies.base import Choice, InputPolicy, Patches, count, share, top_tokens
from dynllava_plugin.sparsity.selection import num_kept_image_tokens

AT_ONCE = 8  # duplicates that one round of matching removes


@dataclass(frozen=True, kw_only=True)
class FasterVLM(InputPolicy):
    """The `n` patches (or the share `keep`) that the class token attends to most, in the layer that the projector reads."""

    name = "fastervlm"
    rule = "patches by CLS attention, before the LLM"
    source = "arXiv 2412.01818v1"
    reads_question = False
    reduces_patches = True

    n: int | None = None

    def named_tokens(self, total: int) -> int:
        """n, but no more than there are."""
        return num_kept_image_tokens(total, self.keep) if self.n is None else min(self.n, total)

    def reduce_patches(self, patches: Patches) -> Choice:
        """Patches stay as they are."""
        chosen = top_tokens(patches.cls_attention(), self.kept_tokens(patches.hidden.shape[1]))
        return replace(chosen, tokens=patches.hidden)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `InputPolicy.check`, and n."""
        super().check(num_layers, text_predictor)
        if self.n is not None:
            count(self.name, "n", self.n)


@dataclass(frozen=True, kw_only=True)
class VisPruner(FasterVLM):
    """The share `important` of the n tokens by the class token's attention, and of the rest those that are different.

    The others, the most attended first, are split into every first and every second one; of the first part the (at most
    eight) tokens that are most like one of the second (cosine) go, and the rest, the least attended part last, is split anew,
    until as many are left as are wanted.

    Notes
    -----
    Where the first part has fewer tokens than must go, another round removes what is left to remove; the published code
    takes for granted that it hasn't.
    """

    name = "vispruner"
    rule = "patches by CLS attention and, of the others, different ones, before the LLM"
    source = "arXiv 2412.01818"

    important: float = 0.5

    def reduce_patches(self, patches: Patches) -> Choice:
        """Patches stay as they are."""
        attention = patches.cls_attention()
        images, total = attention.shape
        kept = self.kept_tokens(total)
        important = int(kept * self.important)
        rows = torch.arange(images, device=attention.device)[:, None]
        unit = torch.nn.functional.normalize(patches.hidden.float(), dim=-1)
        ranked = attention.argsort(dim=-1, descending=True, stable=True)
        rest = ranked[:, important:]
        while (surplus := rest.shape[1] - (kept - important)) > 0:
            first, second = rest[:, ::2], rest[:, 1::2]
            if second.shape[1] == 0:  # one is left, and none is wanted
                rest = rest[:, :0]
                continue
            like = (unit[rows, first] @ unit[rows, second].transpose(1, 2)).amax(-1)
            gone = min(AT_ONCE, surplus, first.shape[1])
            different = like.argsort(dim=-1, descending=True, stable=True)[:, gone:]
            rest = torch.cat([first[rows, different], second], 1)
        keep = torch.zeros_like(attention, dtype=torch.bool)
        keep.scatter_(1, torch.cat([ranked[:, :important], rest], 1), True)
        return Choice(keep, attention, patches.hidden, kept)

    def check(self, num_layers: int | None = None, text_predictor: bool = True) -> None:
        """As `FasterVLM.check`, and the share."""
        super().check(num_layers, text_predictor)
        share(self.name, "important", self.important)
