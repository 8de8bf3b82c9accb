"""CDPruner: image tokens that are relevant to the question and different from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynllava_plugin.policies.base import Choice, InputPolicy, argument, count


@dataclass(frozen=True, kw_only=True)
class CDPruner(InputPolicy):
    """Greedy MAP of a determinantal point process with kernel relevance_i * cosine_ij * relevance_j; `n` tokens stay.

    The paper's LLaVA code takes relevance from CLIP's image and text embeddings, negated. LLaVA checkpoints have
    neither CLIP's text tower nor its projections, so here relevance is the cosine between a projected image token and
    the mean word embedding of the question, as the paper defines it, not negated; similarity is that of the projected
    tokens too. Both are min-max normalised and combined as in the paper. A port, not a reproduction.
    """

    name = "cdpruner"
    rule = "conditional diversity (relevance-weighted DPP) before the LLM"
    source = "arXiv 2506.10967"

    n: int | None = argument(None, count)

    def reduce_tokens(self, features: torch.Tensor, question: Callable[[], torch.Tensor]) -> Choice:
        """Return the tokens that stay; a score is a token's relevance, in [0, 1]."""
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        asked = torch.nn.functional.normalize(question().float(), dim=-1)
        relevance = torch.einsum("mnd,md->mn", unit, asked)
        low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
        relevance = (relevance - low + 1e-6) / (high - low + 1e-6)
        kernel = relevance[:, :, None] * (unit @ unit.transpose(1, 2)) * relevance[:, None]
        size = self.kept_tokens(features.shape[1])
        return Choice(greedy_map(kernel, size), relevance, count=size)


def greedy_map(kernel: torch.Tensor, size: int) -> torch.Tensor:
    """Return bool [M, N] of positive semidefinite kernels [M, N, N]: `size` items, each the one that raises the determinant most.

    Cholesky rows are updated as items are taken (Chen et al., NeurIPS 2018), in float32: O(N size^2) an image. Where the
    determinant has fallen to 0, the rest are taken in the order of their places.
    """
    images, total, _ = kernel.shape
    rows = torch.arange(images, device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # what an item multiplies the determinant by
    cholesky = kernel.new_zeros(images, size, total)
    keep = torch.zeros(images, total, dtype=torch.bool, device=kernel.device)
    for step in range(size):
        best, taken = gain.masked_fill(keep, -1.0).max(-1)
        before = cholesky[:, :step]
        dot = torch.einsum("ms,msn->mn", before[rows, :, taken], before)
        row = (kernel[rows, taken] - dot) / best.clamp(min=1e-10).sqrt()[:, None]
        row = row * (best > 1e-10)[:, None]
        cholesky[:, step] = row
        keep[rows, taken] = True
        gain = (gain - row**2).clamp(min=0)
    return keep
